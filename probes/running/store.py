"""Results on disk: arrays of the latest probing, a summary of it, and the history of all probings of a run.

Everything is written by moebed.machine.storage, so a reader or an interrupted run never sees half a file.

    <out>/results/<probe>.npz       arrays of the latest probing
    <out>/results/history.jsonl     one line a probing: step, scalars, headlines' values
    <out>/summary.json              headlines of the latest probing, with their sentences
    <out>/figures/<probe>_<figure>.png
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moebed.errors import UserError
from moebed.machine import storage
from moebed.machine.mapped import mapped_arrays
from probes.contract import Arrays, Headline, ProbeResult
from probes.running.published import paper_model, published


def results_dir(out: Path) -> Path:
    """Where a run's arrays and history lie."""
    return out / "results"


def picture_path(out: Path, name: str, figure: str) -> Path:
    """Where a probe's picture lies."""
    return out / "figures" / f"{name}_{figure}.png"


def arrays_path(out: Path, name: str) -> Path:
    """Where a probe's arrays lie."""
    return results_dir(out) / f"{name}.npz"


def save_arrays(out: Path, name: str, arrays: Arrays, note: str = "") -> Path:
    """Write ``results/<name>.npz``, and in it a note of what the arrays were made from."""
    return storage.write_arrays(arrays_path(out, name), arrays, note)


def load_arrays(out: Path, name: str) -> dict[str, np.ndarray]:
    """Read ``results/<name>.npz``, large arrays when they are used; nothing pickled is ever loaded.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = arrays_path(out, name)
    try:
        large = mapped_arrays(path)
        with np.load(path, allow_pickle=False) as file:
            return {key: large[key] if key in large else file[key] for key in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; probe first") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({storage.reason_of(error)}); delete it and probe again") from error


def save_summary(
    out: Path,
    step: int,
    results: Mapping[str, ProbeResult],
    model: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    made_from: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``summary.json``: for each probe its headlines and notes; the step; which model it was, and all that the
    numbers were made from. The same probing gives the same file.

    ``notes`` are what a person should know of the model itself: what was passed over, in what it was computed.

    A headline has a value, a sentence, and for the paper's own models what the paper says, where it says something.
    """
    known = model or {}
    named = paper_model(known.get("model_type"), known.get("num_hidden_layers"), known.get("hidden_size"))

    def entry(probe: str, key: str, headline: Headline) -> dict[str, Any]:
        found: dict[str, Any] = {"value": _finite(headline.value), "sentence": headline.sentence}
        if headline.interval is not None:
            found["interval"] = [_finite(bound) for bound in headline.interval]
        beside = published(f"{probe}/{key}", named)
        return found | ({"paper": beside._asdict()} if beside is not None else {})

    probes = {
        name: {
            "headlines": {key: entry(name, key, headline) for key, headline in result.headlines.items()},
            "notes": list(result.notes),
        }
        for name, result in results.items()
    }
    path = out / "summary.json"
    summary: dict[str, Any] = {"step": step, "notes": list(notes), "probes": probes}
    summary |= {"model": dict(model)} if model else {}
    summary |= {"provenance": dict(made_from)} if made_from else {}
    return storage.write_text(path, json.dumps(summary, indent=2))


def load_summary(out: Path) -> dict[str, Any]:
    """Read ``summary.json``; empty where there is none.

    Raises:
        UserError: The file is damaged.
    """
    path = out / "summary.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({storage.reason_of(error)}); delete it and probe again") from error


def history_line(step: int, results: Mapping[str, ProbeResult]) -> dict[str, Any]:
    """What the history keeps of one probing, as ``<probe>/<quantity>[/layer_07]`` and ``<probe>/<headline>``."""
    return {
        "step": step,
        "scalars": {f"{p}/{k}": _finite(v) for p, result in results.items() for k, v in result.scalars.items()},
        "headlines": {
            f"{p}/{k}": _finite(h.value) for p, result in results.items() for k, h in result.headlines.items()
        },
    }


def append_history(out: Path, line: Mapping[str, Any]) -> None:
    """Add a probing; a line of the same or a later step, left by an interrupted run, gives way to it."""
    _rewrite_history(out, lambda step: step < line["step"], line)


def truncate_history(out: Path, step: int) -> None:
    """Drop the lines after ``step``: a run that is resumed there writes them anew."""
    if (results_dir(out) / "history.jsonl").exists():
        _rewrite_history(out, lambda other: other <= step)


def load_history(out: Path) -> list[dict[str, Any]]:
    """All probings of a run, by step; a line that was torn when a run was stopped is left out."""
    path = results_dir(out) / "history.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def _rewrite_history(out: Path, keep: Callable[[int], bool], extra: Mapping[str, Any] | None = None) -> None:
    lines: list[Mapping[str, Any]] = [line for line in load_history(out) if keep(line["step"])]
    lines += [extra] if extra is not None else []
    with storage.new_file(results_dir(out) / "history.jsonl") as file:
        for line in lines:
            file.write(json.dumps(line).encode() + b"\n")


def _finite(value: float) -> float | None:
    """JSON has no NaN; null says that there is no number."""
    return float(value) if math.isfinite(value) else None
