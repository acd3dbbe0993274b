"""What a run left in its folder: config, final numbers, logged scalars, probe results. Whatever is missing is empty."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebed.arguments import require_run_folder
from moebed.errors import UserError
from moebed.machine.storage import reason_of
from probes.contract import ProbeResult
from probes.registry import PROBES
from probes.running import store
from probes.running.provenance import Provenance, read_note
from probes.running.tags import is_of_probes, present_tag

Curve = tuple[list[int], list[float]]  # steps, values


@dataclass
class RunFolder:
    """One run or checkpoint, as found on disk.

    Args:
        folder: Where it is.
        name: What the report calls it.
        config: Text of ``config.yaml``.
        numbers: ``run_summary.json``, final numbers by name.
        curves: Logged scalars by tag, without those of the probes, which ``history`` has.
        summary: ``summary.json`` of the latest probing.
        history: All probings, by step.
        results: What each probe says of its stored arrays, where they were made from what the summary was.
        left_out: Results that lie there and were made from something else, and why they are not reported.
    """

    folder: Path
    name: str
    config: str
    numbers: dict[str, Any]
    curves: dict[str, Curve]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    results: dict[str, ProbeResult]
    left_out: dict[str, str] = field(default_factory=dict)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "run_summary.json", "summary.json", "tensorboard"))


def _require_no_folder_of_runs(folder: Path) -> None:
    """Raise UserError for the folder that runs lie in, whose events would be taken for those of one run."""
    inside = [str(one.parent) for one in sorted(folder.glob("*/run_summary.json"))]
    if inside and not _is_run(folder):
        more = " ..." if len(inside) > 3 else ""
        raise UserError(f"{folder} holds runs and is none itself; give them: {' '.join(inside[:3])}{more}")


def read_run(folder: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        UserError: There is no such folder, or nothing in it to report, or a file in it is damaged.
    """
    require_run_folder(folder)
    config, numbers = folder / "config.yaml", folder / "run_summary.json"
    _require_no_folder_of_runs(folder)
    run = RunFolder(
        folder=folder,
        name=folder.resolve().name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        numbers=_read_numbers(numbers) if numbers.exists() else {},
        curves=read_curves(folder),
        summary=store.load_summary(folder),
        history=store.load_history(folder),
        results={},
    )
    _read_results(run)
    if not (run.numbers or run.curves or run.history or run.results):
        raise UserError(f"{folder} holds no results, events or run_summary.json; train or probe into it first")
    return run


def _read_results(run: RunFolder) -> None:
    """The probes' results, without those of another text, model, argument or version than the summary's."""
    made_from = Provenance(run.summary.get("provenance", {}))
    for path in sorted(store.results_dir(run.folder).glob("[!.]*.npz")):
        if path.stem not in PROBES:
            run.left_out[path.stem] = "no probe of that name is known here (--plugins)"
    for name, probe in PROBES.items():
        path = store.arrays_path(run.folder, name)
        if not path.exists():
            continue
        note = read_note(path)
        if note.get("fingerprint") != (made_from.fingerprint(name) if made_from.record else None):
            run.left_out[name] = "made from other files, text, layers or types, or by another version, than the summary"
            continue
        result = run.results[name] = probe.describe(store.load_arrays(run.folder, name))
        # A layer that could not be read has left no array, only a note.
        kept = [*note.get("notes", []), *run.summary.get("probes", {}).get(name, {}).get("notes", [])]
        result.notes.extend(said for said in dict.fromkeys(kept) if said not in result.notes)


def _read_numbers(path: Path) -> dict[str, Any]:
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); delete it, and probe or train again") from error
    return numbers if isinstance(numbers, dict) else {}


def read_curves(folder: Path) -> dict[str, Curve]:
    """Scalars of all TensorBoard event files under a run's folder, without those of its probes.

    A resumed run writes some steps again, into another file: of each step the value written last is kept.
    """
    paths = sorted(folder.rglob("*tfevents*"))
    if not paths:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars_only = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    latest: dict[str, dict[int, tuple[float, float]]] = {}
    probes = {*PROBES, *(path.stem for path in store.results_dir(folder).glob("*.npz"))}  # plug-ins' as well
    for path in paths:
        events = EventAccumulator(str(path), size_guidance=scalars_only, purge_orphaned_data=False).Reload()
        for logged in events.Tags()["scalars"]:
            tag = present_tag(logged)
            if is_of_probes(tag, probes):
                continue
            steps = latest.setdefault(tag, {})
            for event in events.Scalars(logged):
                if event.step not in steps or event.wall_time >= steps[event.step][0]:
                    steps[event.step] = (event.wall_time, event.value)
    return {
        tag: ([step for step, _ in sorted(steps.items())], [value for _, (_, value) in sorted(steps.items())])
        for tag, steps in latest.items()
    }
