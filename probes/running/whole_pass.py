"""One pass over what is in memory as a whole: a model of transformers, or a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from moebed.training.trainer import looking_trainer
from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from probes.contract import ProbeResult
from probes.registry import Settings, make_probes
from probes.running.driver import Timing, needs_of, run_probes
from probes.running.provenance import Provenance
from probes.running.writing import draw_pictures, log_results, require_same_model, save_results


class Probed(Protocol):
    """What is looked at."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another in a summary; its name among that."""
        ...

    @property
    def notes(self) -> list[str]:
        """What a person should know of it; it may grow with the views."""
        ...

    def record(self) -> dict[str, Any]:
        """All that decides what the views show, but the text: plain data."""
        ...

    def views(self, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
        """Its layers in order, and what it predicts, as probes ask for them."""
        ...


def probe_whole(
    probed: Probed, text: ProbeText | None, names: Sequence[str], out: Path, options: Settings, left_out: Sequence[str]
) -> dict[int, str]:
    """Probe it, and write what was found.

    Args:
        probed: The model or the trace.
        text: Its text, or what goes through it.
        names: Of the probes.
        out: Folder of the results.
        options: Settings of probes.
        left_out: What is to be said of other probes.

    Returns:
        Layers that are missing from the results, and why.

    Raises:
        UserError: The folder holds the results of another model.
    """
    require_same_model(out, probed.identity)
    probes, timing = make_probes(names, options), Timing()
    missing: dict[int, str] = {}
    results = run_probes(probed.views(text, needs_of(probes)), probes, timing, missing)
    record = {**probed.record(), "text": text.fingerprint() if text is not None else None}
    made_from = Provenance(record | ({"options": options} if options else {}))
    save_results(out, results, made_from, 0, probed.identity, [*probed.notes, *left_out])
    log_and_draw(out, results, timing)
    return missing


def log_and_draw(out: Path, results: dict[str, ProbeResult], timing: Timing) -> None:
    """Pictures, and TensorBoard's events."""
    trainer = looking_trainer(out)
    draw_pictures(trainer, out, results, 0)
    cost = {"forward_seconds": timing.forward} | {f"{name}_seconds": value for name, value in timing.probe.items()}
    log_results(trainer, results, cost, 0)
    trainer.logger.finalize("success")  # type: ignore[union-attr]
