"""``moebed prune CHECKPOINT --keep 1/2 --by reap --out DIR``: the same model with some of its experts.

Experts are scored on every other text of each domain; the loss before and after is that of the other texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.arguments import OneLineParser, add_text_options, whole
from moebed.checkpoints.hub import find_checkpoint, require_nameable
from moebed.checkpoints.text_options import TextOptions
from moebed.errors import ConfigError, UserError
from moebed.machine import storage
from moebed.machine.places import require_empty
from moebed.machine.progress import say, waiting
from moebed.machine.units import parse_bytes
from moebed.names import RANDOM, SCORES

if TYPE_CHECKING:
    import numpy as np

    from moebed.checkpoints.pretrained import PretrainedMoE
    from moebed.views.layer import HeadView, ProbeText


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed prune",
        description="Write a checkpoint with fewer experts, and say its loss before and after on text that chose none "
        "of them. Layers of equal size are written in the checkpoint's own layout where that expresses them, others "
        "in moebed's.",
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint, its hub id, or a .ckpt file")
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder to write")
    parser.add_argument("--keep", metavar="1/2", required=True, help="share of the experts that stay, or how many")
    parser.add_argument(
        "--by",
        default="reap",
        metavar="SCORE",
        help="frequency, probability, ean, reap, weighted, easy_ep or random; default reap",
    )
    parser.add_argument(
        "--ragged",
        action="store_true",
        help="the best of all layers together, each beside its layer's mean, so that layers differ in size; at least "
        "one in each",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the draw, by random")
    text = parser.add_argument_group("text: several sequences, every other one of which experts are scored on")
    add_text_options(text)
    parser.add_argument("--memory-budget", default="8GiB", metavar="8GiB", help="for weights and the work on them")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Prune.

    Raises:
        UserError: The checkpoint cannot be read or pruned, or the folder cannot be written.
    """
    options = build_parser().parse_args(arguments)
    share, count = _kept(options.keep)
    text, out = TextOptions.of(vars(options)), Path(options.out)
    require_nameable(options.checkpoint)
    SCORES.require(options.by, "--by", also=(RANDOM,))
    if not text:
        raise ConfigError("moebed prune needs text to score experts on and to judge by: --text, --input-ids, --domain")
    require_empty(out)
    parse_bytes(options.memory_budget)
    # Heavy imports wait until the options are known to be well formed.
    with waiting("loading PyTorch"):
        from moebed.checkpoints.pretrained import PretrainedMoE
        from moebed.checkpoints.writing_bar import WritingBar
        from moebed.exporting.content import prune
        from moebed.exporting.export import export, plan_export
        from probes.keep_k import ONE_TEXT
        from probes.measures.expert_scores import calibration_texts

    model = PretrainedMoE(options.checkpoint, text=text, memory_budget=options.memory_budget)
    assert model.text is not None
    for note in model.notes:
        say(f"note: {note}")
    apart = ~calibration_texts(model.text.domain.numpy())
    if apart.all():
        raise UserError(f"moebed prune: {ONE_TEXT}")
    every = {index: range(model.config.layer(index).num_experts) for index in model.config.moe_layers}
    prune(model.config, every)  # refused before anything runs
    before, scores = _scored(model, options.by, options.seed)
    kept = _chosen(scores, share, count, options.ragged)
    pruned = prune(model.config, kept)
    plan = plan_export(model.checkpoint, _own_family(model, pruned.config), pruned.config)
    with WritingBar() as bar:
        path = find_checkpoint(options.checkpoint)
        notes = export(model.checkpoint, path, plan, out, None, bar.start, bar.update, pruned)
    for note in notes:
        say(f"note: {note}")
    after = _head(PretrainedMoE(str(out), text=model.text, memory_budget=options.memory_budget), "loss after")
    judged = _judged(model.text, before, after, apart)
    sizes = [len(some) for some in kept.values()]
    found = {"score": options.by, "kept": {str(index): list(some) for index, some in kept.items()}} | judged
    storage.write_text(out / "pruning.json", json.dumps(found, indent=2) + "\n")
    many = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    within = " [{:+.4f}, {:+.4f}]".format(*judged["interval"]) if judged["interval"] else ""
    say(
        f"experts by {options.by}: {many} a layer; loss on {judged['texts']} texts kept apart "
        f"({judged['tokens']:,} tokens): {judged['loss_before']:.4f} before, {judged['loss_after']:.4f} after, "
        f"{judged['change']:+.4f}{within}"
    )
    say(f"checkpoint: {out} ({plan.family.model_type})")


def _judged(text: ProbeText, before: HeadView, after: HeadView, apart: np.ndarray) -> dict[str, Any]:
    """The loss on texts (B,) bool that are kept apart, before and after, and how sure the change is."""
    from probes.measures.effects import Texts, effect_of

    texts = Texts(text, before.loss)
    tokens = texts.tokens[apart]
    rise = texts.sums((after.loss - before.loss).nan_to_num()).rise[apart]
    effect = effect_of(rise, tokens, texts.domain[apart])
    start = float(texts.sums(before.loss.nan_to_num()).rise[apart].sum() / max(1, tokens.sum()))
    return {
        "loss_before": start,
        "loss_after": start + effect.mean,
        "change": effect.mean,
        "interval": effect.interval,
        "p": effect.p,
        "texts": int(apart.sum()),
        "tokens": int(tokens.sum()),
    }


def _kept(text: str) -> tuple[float, int]:
    """A share of the experts, or a number of them; the other one is 0."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if 0 < value < 1:
        return float(value), 0
    if value >= 1 and value.denominator == 1:
        return 0.0, int(value)
    raise ConfigError(f"--keep is {text!r}; write a share such as 1/2 or .25, or how many of each layer, such as 4")


def _scored(model: PretrainedMoE, by: str, seed: int) -> tuple[HeadView, dict[int, np.ndarray]]:
    """The model's predictions, and its experts' scores (E,) by layer."""
    from moebed.checkpoints.reading_bar import walk
    from moebed.views.layer import HeadView
    from probes.contract import by_layer
    from probes.keep_k import KeepK
    from probes.measures.expert_scores import random_scores
    from probes.running.driver import ProbePass

    if by == RANDOM:
        layers = model.config.moe_layers
        return _head(model, "loss before"), {
            n: random_scores(model.config.layer(n).num_experts, n, seed) for n in layers
        }
    probe, found = KeepK(), None
    one_pass = ProbePass([probe])
    for view in walk(model, model.text, KeepK.needs, "scoring experts"):
        if isinstance(view, HeadView):
            found = view
        elif not one_pass.show(view):
            raise UserError(f"layer {view.index} cannot be scored: {one_pass.missing.get(view.index)}")
    if found is None:
        raise UserError("the text did not come through the model")
    return found, by_layer(probe.arrays, "score", by)


def _head(model: PretrainedMoE, description: str) -> HeadView:
    """What a model predicts on its text."""
    from moebed.checkpoints.reading_bar import walk
    from moebed.views.layer import HeadView, Need

    views = walk(model, model.text, frozenset({Need.PREDICTIONS}), description)
    found = [view for view in views if isinstance(view, HeadView)]
    if not found:
        raise UserError("the text did not come through the model")
    return found[0]


def _chosen(scores: Mapping[int, np.ndarray], share: float, count: int, ragged: bool) -> dict[int, tuple[int, ...]]:
    """The experts of each layer that stay."""
    from probes.measures.expert_scores import best, best_over_layers

    for index, of in scores.items():
        if count > len(of):
            raise ConfigError(f"--keep {count}: layer {index} has {len(of)} experts")
    if ragged:
        total = sum(map(len, scores.values()))
        return best_over_layers(scores, share or count * len(scores) / total)
    return {n: best(of, count or max(1, round(share * len(of)))) for n, of in scores.items()}


def _own_family(model: PretrainedMoE, config: Any) -> str | None:
    """The checkpoint's own family where it expresses the pruned model; else whichever does."""
    from moebed.checkpoints.families.registry import FAMILIES

    family = model.checkpoint.family
    if FAMILIES.get(family.model_type) is not family:
        return None
    try:
        family.write_config(config)
    except ConfigError:
        return None
    return family.model_type
