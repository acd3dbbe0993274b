"""How the time of a check is shared among its steps. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moebed.check.contract import Step


def share(step: Step, waiting: Sequence[Sequence[Step]], left: float, cores: int) -> float:
    """Seconds of a step that begins now, its own among those of all that is to be done.

    So what a step leaves over goes to all that come after it, and what is not asked for costs nothing.

    Args:
        step: The step.
        waiting: Its rung and those after it: of each, the steps that have not ended, ``step`` among them.
        left: Seconds for all of them.
        cores: How many steps of a rung run side by side.
    """
    return left * step.seconds / sum(rung_seconds(rung, cores) for rung in waiting)


def rung_seconds(steps: Sequence[Step], cores: int) -> float:
    """What a rung takes by its steps' own times, a step a core."""
    return math.ceil(len(steps) / cores) * max((step.seconds for step in steps), default=0.0)
