"""``moebed upcycle DENSE --out DIR --method M``: an MoE checkpoint from a dense one, a layer at a time."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.arguments import OneLineParser, add_text_options, number, whole
from moebed.checkpoints.hub import find_checkpoint, require_nameable
from moebed.checkpoints.text_options import TextOptions
from moebed.errors import ConfigError
from moebed.machine.places import require_empty
from moebed.machine.progress import Progress, say, waiting
from moebed.machine.units import human, parse_bytes
from moebed.names import FAMILIES, OWN_LAYOUT
from moebed.upcycling.settings import Settings

if TYPE_CHECKING:
    import torch

    from moebed.checkpoints.checkpoint import Checkpoint
    from moebed.upcycling.contract import TextFacts
    from moebed.upcycling.first_loss import FirstLosses
    from moebed.upcycling.upcycle import Plan

# The names are those of moebed.upcycling.methods.METHODS, which needs torch; a test holds the two together.
METHOD_LINES = {
    "copy": "exact copies; the new model's logits are the dense model's (2212.05055)",
    "noise": "copies, with N(0, noise-std) added to a fraction of the entries",
    "drop": "copies, with a fraction of each expert's neurons drawn anew from their mean and deviation (2502.19261)",
    "split": "each copy cut into shards that are routed together; logits are the dense model's (2410.07524)",
    "cluster": "the neurons in balanced groups by k-means on gate rows as they are, an expert each (2110.01786)",
    "partition": "the neurons dealt out as --by says, an expert each (LLaMA-MoE, 2406.16554)",
    "scratch": "random experts beside the dense model's attention and embeddings",
}
_FILES = ("text", "input_ids", "domain")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed upcycle",
        description="Make an MoE checkpoint from a dense one (mistral, llama, qwen2, or a dense run's .ckpt).",
        epilog="methods:\n" + "\n".join(f"  {name:<9}{line}" for name, line in METHOD_LINES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("dense", help="folder of a dense checkpoint, its hub id, or a .ckpt file of a dense run")
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder for the MoE checkpoint")
    parser.add_argument("--method", choices=METHOD_LINES, required=True, help="how experts are made; see below")
    parser.add_argument("--num-experts", type=whole(1), metavar="E", help="experts of a layer, before split; default 8")
    parser.add_argument(
        "--num-experts-per-tok", type=whole(1), metavar="K", help="experts of a token, before split; default 2"
    )
    parser.add_argument("--granularity", type=whole(1), metavar="G", help="split: shards of each copy; default 2")
    parser.add_argument(
        "--fraction", type=number(0, 1), metavar="R", help="noise, drop: part that changes; default 0.5"
    )
    parser.add_argument("--noise-std", type=number(0), metavar="S", help="noise: its standard deviation; default 0.02")
    _add_partition(parser)
    parser.add_argument(
        "--init-std",
        type=number(0),
        metavar="S",
        help="standard deviation of random weights, the router's too; default 0.02",
    )
    parser.add_argument("--seed", type=whole(), metavar="N", help="decides all that is random; default 0")
    parser.add_argument("--dense-layers", metavar="0,5", help="layers that stay dense; default none")
    parser.add_argument(
        "--shared-experts",
        type=whole(0),
        metavar="N",
        help="shared experts beside the routed, silent at first; default 0",
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="layout of the output; default the first of mixtral, olmoe, qwen2_moe and qwen3_moe that expresses the "
        "model, else moebed's own (moebed)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default as in the dense checkpoint"
    )
    _add_text(parser)
    return parser


def _add_partition(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("partition")
    group.add_argument(
        "--output-scale",
        type=_scale,
        metavar="X",
        help="and cluster: factor on down: a number; published, E / K (the default); sum, K; norm, the root of E·K; "
        "mean, E; or calibrate, for each channel, on text",
    )
    group.add_argument(
        "--by",
        metavar="RULE",
        help="random (the default), contiguous, cluster (k-means with equal sizes), inner (each expert the neurons "
        "most important for its texts), or inter (those that many would list into residual experts first)",
    )
    group.add_argument("--rows", metavar="M", help="cluster, router centroid: rows of gate, up (the default) or down")
    group.add_argument("--normalise", type=_truth, metavar="B", help="divide each row by its length; default true")
    group.add_argument("--starts", type=whole(1), metavar="N", help="cluster: starts of the k-means; default 10")
    group.add_argument(
        "--router",
        metavar="R",
        help="random (the default); centroid, of the neurons' rows; hidden_centroid, of an expert's texts; or noisy, "
        "the random gate of router noisy_topk",
    )
    group.add_argument("--residual-experts", type=whole(0), metavar="R", help="inter: default 1")
    group.add_argument(
        "--sharing", type=_truth, metavar="B", help="inter: experts may have neurons in common; default true"
    )
    group.add_argument(
        "--expert-width", type=whole(1), metavar="F", help="inner, inter: neurons of an expert; default D / (E + R)"
    )
    group.add_argument(
        "--text-clusters",
        metavar="C",
        help="inner, inter: an expert's texts are clusters of tokens (the default) or domains",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text, for the first loss, and where a method asks for it")
    add_text_options(group)
    group.add_argument("--memory-budget", metavar="SIZE", help="for weights and text at a time; default 8GiB")


def _scale(text: str) -> float | str:
    """A number, or a word."""
    try:
        return float(text)
    except ValueError:
        return text


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"is {text!r}; give true or false")
    return text.lower() == "true"


def run(command: str, arguments: Sequence[str]) -> None:
    """Upcycle.

    Raises:
        UserError: The dense checkpoint cannot be read, the options do not fit it, or the folder cannot be written.
    """
    options = read_options(arguments)
    settings = plain_settings(options)
    if "family" in options:
        FAMILIES.require(options["family"], "--family", also=(OWN_LAYOUT,))
    wanted, out = TextOptions.of(options), Path(options["out"])
    require_nameable(options["dense"])
    require_empty(out)
    budget = parse_bytes(options.get("memory_budget", "8GiB"))
    if not wanted and "memory_budget" in options:
        raise ConfigError(
            "--memory-budget does nothing without text, where upcycling holds a matrix at a time; leave it out"
        )
    # Heavy imports wait until the options are known to be well formed.
    with waiting("loading PyTorch"):
        import torch

        from moebed.checkpoints.checkpoint import Checkpoint
        from moebed.checkpoints.writing_bar import WritingBar
        from moebed.model.flops import count_parameters
        from moebed.upcycling.upcycle import plan_upcycling, upcycle

    method, layers = options["method"], read_layers(options)
    require_read(options, settings)
    path = find_checkpoint(options["dense"])
    source = Checkpoint.open(path)
    plan = plan_upcycling(source, method, settings, options.get("shared_experts", 0), layers, options.get("family"))
    for note in source.notes:
        say(f"note: {note}")
    total, active = count_parameters(plan.config)
    before, _ = count_parameters(source.config)
    say(
        f"{source.name} ({source.family.model_type}, {human(before)} parameters) becomes "
        f"{plan.family.model_type}: {human(total)} parameters, {human(active)} active a token"
    )
    dtype = getattr(torch, options["dtype"]) if "dtype" in options else None
    facts, first = _ask_text(options, wanted, budget, path, source, plan, settings, dtype)
    with WritingBar() as bar:
        notes = upcycle(source, path, plan, method, settings, out, dtype, bar.start, bar.update, facts, first)
    for note in notes:
        say(f"note: {note}")
    say(f"checkpoint: {out}; to train from it: moebed fit --config RECIPE.yaml --config {out / 'start.yaml'}")


def _ask_text(
    options: Mapping[str, Any],
    wanted: TextOptions,
    budget: int,
    path: Path,
    source: Checkpoint,
    plan: Plan,
    settings: Settings,
    dtype: torch.dtype | None,
) -> tuple[dict[int, TextFacts] | None, FirstLosses | None]:
    """What the text that was given tells; nothing without one."""
    from moebed.checkpoints.texts import read_texts
    from moebed.upcycling.from_text import ask_text, layers_passed

    if not wanted:
        return None, None
    text, notes = read_texts(wanted, path, source.config)
    for note in notes:
        say(note)
    method = options["method"]
    progress = Progress(layers_passed(plan, settings, method), "layer", description="text")

    def on_layer() -> None:
        progress.update(progress.done + 1)

    try:
        scratch = Path(options["out"]).resolve().parent
        found = ask_text(source, plan, method, settings, text, budget, scratch, dtype, on_layer)
    finally:
        progress.close()
    facts, first = found
    for fact in facts.values():
        if fact.note:
            say(f"note: {fact.note}")
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in first.moe.items())
    say(f"first loss on {first.tokens:,} tokens, nats: dense {first.dense:.4f}; {losses}")
    return found


def read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that were given, by name; raises ConfigError if one is unknown or missing."""
    options: dict[str, Any] = vars(build_parser().parse_args(arguments))
    read_layers(options)
    return options


def plain_settings(options: Mapping[str, Any]) -> Settings:
    """How the experts are made; raises ConfigError for what no method can do."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in options.items() if name in fields})


def read_settings(options: Mapping[str, Any]) -> Settings:
    """The same; raises ConfigError for an option that the method does not read as well."""
    settings = plain_settings(options)
    require_read(options, settings)
    return settings


def require_read(options: Mapping[str, Any], settings: Settings) -> None:
    """Raise ConfigError for an option that the method does not read, and where it needs text and there is none."""
    from moebed.upcycling.methods import METHODS

    method = options["method"]
    for name in sorted(frozenset().union(*(kind.uses for kind in METHODS.values())) - METHODS[method].uses):
        if name in options:
            readers = ", ".join(other for other, kind in METHODS.items() if name in kind.uses)
            raise ConfigError(f"--{name.replace('_', '-')} does nothing with method {method}; it is for {readers}")
    for name in METHODS[method].uses - METHODS[method].reads(settings):
        if name in options:
            raise ConfigError(
                f"--{name.replace('_', '-')} does nothing with by {settings.by} and router {settings.router}; "
                "leave it out"
            )
    if (why := METHODS[method].asks_text(settings)) and not any(name in options for name in _FILES):
        raise ConfigError(f"method {method} needs text: {why}; give --text FILE or --domain NAME=FILE")


def text_files(options: Mapping[str, Any]) -> dict[str, Path]:
    """Files that hold the text, by what the options call them."""
    named = [*options.get("text", []), *options.get("input_ids", [])]
    named += [one.partition("=")[2] for one in options.get("domain", [])]
    return {name: Path(name) for name in named if Path(name).is_file()}


def read_layers(options: Mapping[str, Any]) -> list[int]:
    """Layers that stay dense, from "0,5"."""
    parts = [part.strip() for part in options.get("dense_layers", "").split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal():
            raise ConfigError(f"dense-layers: {part!r} is no layer; write numbers such as 0,5")
    return sorted({int(part) for part in parts})
