"""The one precision of a study: chosen by the machine that begins it, kept by whichever goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moebed.machine.precision import choose_precision
from moebed.study.files import read_json, write_json
from moebed.training.trainer import AUTO

KEY = "trainer.precision"


def study_precision(out: Path, accelerator: str) -> tuple[str, str]:
    """What ``precision: auto`` is in a study, and a line that says so.

    Args:
        out: The study's folder; one that was begun says it.
        accelerator: Of the run that asks.
    """
    kept = _kept(out)
    if kept is not None:
        return kept, f"precision auto: {kept}, as the study in {out} was begun"
    choice = choose_precision(accelerator)
    return choice.precision, str(choice)


def keep_precision(out: Path, precision: str) -> str:
    """Note it beside the runs, unless another call of the study was first; returns what holds."""
    path = _path(out)
    if _kept(out) is None:
        mine = write_json(path.with_name(f"{path.name}.{os.getpid()}"), precision)
        try:
            os.link(mine, path)  # fails where another one is
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return _kept(out) or precision


def _path(out: Path) -> Path:
    return out / "status" / "precision.json"


def _kept(out: Path) -> str | None:
    noted: Any = read_json(_path(out))
    if noted is not None:
        return noted
    for path in sorted((out / "status").glob("*/*/*.json")):  # of a run that was begun when nothing was noted
        precision = read_json(path)["identity"].get(KEY, AUTO)
        if precision != AUTO:
            return precision
    return None
