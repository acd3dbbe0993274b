"""What the ladder is made of: rungs of steps, steps of rows, and what each row found. Imports nothing heavy.

A row is one thing measured, with a verdict. A step is a process that measures its rows one after another, within its
own time. Steps of one rung run side by side, where right or wrong is the question and not how fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

MINUTES = 8.0  # what the seconds of the steps are made for


class Verdict(StrEnum):
    """What came of a row."""

    WORKS = "works"
    WRONG = "wrong"
    SLOW = "slow"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Found:
    """What a row returns.

    Args:
        said: A sentence, with the figures that a person asks for.
        figures: All figures, as plain data.
        verdict: The verdict.
    """

    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict = Verdict.WORKS


@dataclass(frozen=True)
class Finding:
    """What is kept of a row that was measured, with its name and the seconds that it took."""

    name: str
    verdict: Verdict
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class NotRun(Exception):
    """A row cannot be measured here; the message says why."""


class Row(NamedTuple):
    """One thing to measure.

    An exception of ``measure`` is a finding too: NotRun and a package that is not installed say so, all else is wrong.
    Where there are fewer than ``gpus`` GPUs it is not called, and costs nothing.
    """

    name: str
    measure: Callable[[], Found]
    gpus: int = 0


@dataclass(frozen=True)
class Place:
    """Where a step is.

    Args:
        device: ``cuda`` or ``cpu``.
        gpus: How many GPUs there are.
        folder: A folder for the step's own files, which goes when the step ends.
        found: What the step's rows have found so far, by name; in an earlier process too.
    """

    device: str
    gpus: int
    folder: Path
    found: Mapping[str, Finding]


@dataclass(frozen=True)
class Step:
    """A process of its own, within its own time.

    Args:
        name: Of its file, and for ``--only``.
        question: What it answers.
        rows: ``module:function``, which makes the rows of a Place; imported in the step's process alone.
        seconds: Its time, where there are eight minutes for all steps; of more or less it has its share.
        row_seconds: Time of one row; one that takes longer is ended, and the next one begun.
        needs_gpu: Nothing of it can be told without.
        environment: Set for its process.
        without_gpu: The same, where there is no GPU.
    """

    name: str
    question: str
    rows: str
    seconds: float
    row_seconds: float
    needs_gpu: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    without_gpu: Mapping[str, str] = field(default_factory=dict)

    def rows_of(self, place: Place) -> Sequence[Row]:
        """The rows, in the order of what must be known first; imports the step's module."""
        module, _, name = self.rows.partition(":")
        return getattr(importlib.import_module(module), name)(place)


Ladder = Sequence[Sequence[Step]]
