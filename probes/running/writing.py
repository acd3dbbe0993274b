"""What a probing leaves: files in a folder, and numbers, sentences and pictures in loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from moebed.errors import UserError
from moebed.machine import storage
from moebed.training.loggers import log_numbers, log_picture, log_texts
from probes.contract import ProbeResult
from probes.running import store, tags
from probes.running.provenance import Provenance, note_of


def require_same_model(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise UserError if a folder holds the results of another model."""
    earlier = store.load_summary(out)
    if earlier and earlier.get("model") != identity:
        other = earlier.get("model", {}).get("name", "a training run")
        raise UserError(f"{out} holds the results of {other}; choose another folder for those of {identity['name']}")


def save_results(
    out: Path,
    results: Mapping[str, ProbeResult],
    made_from: Provenance,
    step: int,
    model: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write each probe's arrays, and the summary of all."""
    for name, result in results.items():
        store.save_arrays(out, name, result.arrays, note_of(made_from, name, result.notes))
    store.save_summary(out, step, results, model, notes, made_from.record)


def draw_pictures(trainer: Trainer, out: Path, results: Mapping[str, ProbeResult], step: int) -> None:
    """Draw every picture, into a file and into every logger that takes it."""
    from probes.figures.drawing import to_png

    for name, result in results.items():
        for key, build in result.figures.items():
            picture = to_png(build())
            storage.write_bytes(store.picture_path(out, name, key), picture)
            for tag in tags.picture_tags(name, key):
                log_picture(trainer, tag, picture, step)


def log_results(trainer: Trainer, results: Mapping[str, ProbeResult], cost: Mapping[str, float], step: int) -> None:
    """Numbers and sentences to every logger, and what probing cost, by name."""
    numbers = tags.scalars(results) | {f"{tags.COST}/{name}": value for name, value in cost.items()}
    log_numbers(trainer, numbers, step)
    log_texts(trainer, "sentences", tags.sentences(results), step)
