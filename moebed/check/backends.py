"""What the ladder found of the experts backends, written to where ``experts_backend: auto`` looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moebed.check.contract import Verdict
from moebed.check.record import ADVICE, Record
from moebed.machine import storage

# Whose rows must all be right before a type's kernels are used; and in which type their speed is measured.
GATES = {
    "bfloat16": ("kernels_bfloat16", "kernels_models", "kernels_launches"),
    "float16": ("kernels_float16", "kernels_launches"),
    "float32": ("kernels_float32", "kernels_launches"),
}
TIMED_IN = {"bfloat16": "bfloat16", "float16": "bfloat16", "float32": "float32"}


def write(records: Mapping[str, Record], device: str) -> Path | None:
    """Write what all steps together say of a device; nothing, while its speed, or all of a type, was not measured.

    A part of the ladder, such as ``--only`` asks for, leaves what a whole one found.
    """
    if not records["speed"].findings:
        return None
    from moebed.model import measured  # imports torch, as peers does: on a lent machine seconds

    rows = list(timed(records["speed"]))
    known = [dtype for dtype, steps in GATES.items() if all(records[step].is_complete for step in steps)]
    if not (rows and known):
        return None
    found = {
        dtype: least_work((work, ratio) for work, ratio, timed_in in rows if timed_in == TIMED_IN[dtype])
        if all(is_right(records[step]) for step in GATES[dtype])
        else None
        for dtype in known
    }
    return storage.write_text(measured.path_of(device), measured.content(device, found), ADVICE)


def is_right(record: Record) -> bool:
    """Whether no row is wrong."""
    return all(each.verdict != Verdict.WRONG for each in record.all_findings())


def timed(speed: Record) -> Iterator[tuple[float, float, str]]:
    """Of each row where both agree with the reference: work, how many times as fast the kernels are, and type."""
    from moebed.bench.peers import OWN

    triton, base = OWN + "triton", OWN + "grouped_mm"
    for finding in speed.findings.values():
        by_name: dict[str, Mapping[str, Any]] = {row["name"]: row for row in finding.figures.get("rows", ())}
        if triton in by_name and base in by_name and by_name[triton]["agrees"] and by_name[base]["agrees"]:
            seconds = f"{finding.figures['phase']}_seconds"
            ratio = by_name[base][seconds] / by_name[triton][seconds]
            yield float(finding.figures["work"]), ratio, finding.figures["dtype"]


def least_work(rows: Iterable[tuple[float, float]]) -> float | None:
    """The least measured work from which on the kernels were never slower; None where at the most they were."""
    least = None
    for work, ratio in sorted(rows, reverse=True):
        if ratio < 1:
            break
        least = work
    return least
