"""A checkpoint, a run's ``.ckpt`` above all, written anew in a family's layout, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.companions import copy_tokenizer, special_ids
from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.choice import IN_TRANSFORMERS, choose_family
from moebed.checkpoints.families.keys import KeyMap
from moebed.checkpoints.families.own import MOEBED
from moebed.checkpoints.families.registry import family_of
from moebed.checkpoints.run import is_run
from moebed.checkpoints.writer import FolderWriter, stored_dtypes
from moebed.exporting.card import Run, model_card
from moebed.exporting.content import Copied, Kept, Pruned
from moebed.model.config import ModelConfig


class Plan(NamedTuple):
    """What is about to be written.

    Args:
        family: In whose layout.
        note: What a person should know of it, in one line; often nothing.
    """

    family: Family
    note: str

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has a class for the family."""
        return any(self.family.model_type in names for names in IN_TRANSFORMERS.values())


def plan_export(source: Checkpoint, family: str | None = None, config: ModelConfig | None = None) -> Plan:
    """The family in whose layout a checkpoint is written.

    Args:
        source: The checkpoint.
        family: Its ``model_type``; the first that transformers loads and that expresses the model, if not given.
        config: What is written of its model; all of it if not given.

    Raises:
        ConfigError: The family is unknown, or cannot express the model.
    """
    config = config or source.config
    if family is None:
        found = choose_family(config)
        return Plan(found.family, found.note)
    plan = Plan(family_of(family, "family"), "")
    plan.family.write_config(config)
    if plan.in_transformers:
        return plan
    return plan._replace(note=f"transformers has no class for {family}; moebed reads it")


@torch.no_grad()
def export(
    source: Checkpoint,
    source_path: Path,
    plan: Plan,
    folder: Path,
    dtype: torch.dtype | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_write: Callable[[int], None] = lambda count: None,
    pruned: Pruned | None = None,
) -> list[str]:
    """Write weights, config, tokenizer, generation config and model card.

    Args:
        source: The checkpoint.
        source_path: Its folder or ``.ckpt`` file.
        plan: From :func:`plan_export`.
        folder: A new or empty folder.
        dtype: What the weights are stored in; each as in the checkpoint, if not given.
        on_start: Called with the bytes that will be written.
        on_write: Called with the bytes of every band that is written.
        pruned: The experts that are written; all of them if not given.

    Returns:
        Notes for the person who asked.

    Raises:
        UserError: A weight is NaN or Inf, or the folder cannot be written.
    """
    config = source.config if pruned is None else pruned.config
    dtypes = stored_dtypes(source)
    stored = dtype or dtypes["embed_tokens.weight"]
    notes = [note for note in (plan.note, _precision_note(dtypes, dtype)) if note]
    ids = special_ids(source_path, source.settings)
    # What decides how transformers would train the model on.
    trained: dict[str, Any] = {"initializer_range": config.initializer_range}
    if config.moe_layers:
        trained |= plan.family.balancing(config)
    written = {**plan.family.write_config(config), **(trained if plan.family is not MOEBED else {}), **ids}
    keys = KeyMap(plan.family, config)
    kept = dtypes if dtype is None else {name: dtypes[name] for name in keys.state}
    writer = FolderWriter(keys, written, stored, dtypes=kept)
    on_start(writer.total)
    run = Run.of(source_path)

    def finish(partial: Path) -> None:
        source.require_unchanged()
        tokenizer, note = copy_tokenizer(source_path, partial)
        notes.extend([note] if note else [])
        if is_run(source_path):
            generation = {**run.sampling, **ids}
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        name = run.name or source.name
        card = model_card(name, config, plan.family, plan.in_transformers, run, tokenizer is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")

    writer.write(folder, Copied(source) if pruned is None else Kept(source, pruned), finish, on_write)
    return notes


def _precision_note(dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None) -> str:
    """What becomes of routers that are stored more precisely than the rest, whose rounding changes choices."""
    routers = [kind for name, kind in dtypes.items() if name.endswith("mlp.router.weight")]
    if not routers:
        return ""
    router, rest = str(routers[0]).removeprefix("torch."), dtype or dtypes["embed_tokens.weight"]
    if routers[0].itemsize <= rest.itemsize:
        return ""
    written = str(rest).removeprefix("torch.")
    if dtype is not None:
        return (
            f"the routers' weights are rounded from {router} to {written}, as --dtype asks, which changes some choices "
            "of experts; without --dtype they stay as they are"
        )
    return (
        f"the routers' weights stay {router} beside {written}; transformers rounds them to config.json's {written} "
        f"unless it is told dtype={router}"
    )
