"""What a study will be able to see, and what seeing more takes, from the runs that are finished by now.

n pairs of an arm and the baseline; σ the standard deviation of their differences, which few pairs leave wide open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from moebed.errors import UserError
from moebed.study.comparison import ArmResult, Comparison
from moebed.study.statistics import detectable, deviation_range, pairs_needed
from moebed.study.tables import format_difference, print_rows

WANTED = (0.05, 0.03, 0.02, 0.01)  # nats


@dataclass(frozen=True)
class Power:
    """What n pairs of an arm tell of the power of more.

    Args:
        arm: Name.
        pairs: n.
        deviation: σ; 0 where all pairs differ by the same.
        likely: Its 95 % interval.
    """

    arm: str
    pairs: int
    deviation: float
    likely: tuple[float, float]

    def seeds(self, difference: float, comparisons: int = 1) -> list[int | None]:
        """Seeds that it takes to see a difference (80 % power at 5 %, by Bonferroni of so many comparisons).

        At the least, as estimated and at the most that σ may be; None for more than can be looked for.
        """
        sigmas = (self.likely[0], self.deviation, self.likely[1])
        return [pairs_needed(sigma, difference, comparisons=comparisons) for sigma in sigmas]


def power_of(arm: ArmResult) -> Power | None:
    """Of an arm with two pairs or more; None of another."""
    found = arm.difference
    if found is None or found.deviation is None:
        return None
    likely = deviation_range(found.deviation, found.pairs - 1) if found.deviation else (0.0, 0.0)
    return Power(arm.name, found.pairs, found.deviation, likely)


def pilot_runs(found: Comparison, arms: Sequence[str], pairs: int) -> list[tuple[str, int]]:
    """Arms and seeds that give each of these arms so many pairs with the baseline, of seeds with the fewest new runs.

    Raises:
        UserError: There are not so many seeds, or too few are asked for.
    """
    seeds = found.study["seeds"]
    if not 2 <= pairs <= len(seeds):
        raise UserError(f"--pilot is {pairs}; give at least 2 pairs, and at most the study's {len(seeds)} seeds")
    names = list(dict.fromkeys([found.baseline, *arms]))
    missing = {seed: sum(seed not in found.arms[name].finished for name in names) for seed in seeds}
    chosen = sorted(seeds, key=lambda seed: missing[seed])[:pairs]
    return [(name, seed) for seed in chosen for name in names]


def print_pilot(found: Comparison, wanted: Sequence[float], jobs: int) -> None:
    """The table of what each arm takes, and what the study takes as a whole, on standard output."""
    print_rows(f"pilot of {found.study['name']}", columns(found, wanted), rows(found, wanted))
    for sentence in sentences(found, wanted, jobs):
        print(sentence)


def columns(found: Comparison, wanted: Sequence[float]) -> list[str]:
    """Of the table."""
    could = f"{len(found.study['seeds'])} seeds could see"
    return ["arm", "pairs", "Δ loss [95 %]", "σ [95 %]", could, *(f"seeds for {one:g}" for one in wanted), "s a run"]


def rows(found: Comparison, wanted: Sequence[float]) -> list[list[str]]:
    """A row an arm, the baseline first; seeds as σ is estimated, and over its interval."""
    cells = []
    for arm in found.arms.values():
        power, seconds = power_of(arm), seconds_of(found, arm.name)
        time = "–" if seconds is None else f"{seconds:.0f}"
        if power is None:
            what = "baseline" if arm.name == found.baseline else format_difference(arm.difference)
            pairs = arm.difference.pairs if arm.difference else len(arm.finished)
            cells.append([arm.name, str(pairs), what, *(["–"] * (2 + len(wanted))), time])
            continue
        could = detectable(power.deviation, len(found.study["seeds"])) if len(found.study["seeds"]) > 1 else 0.0
        cells.append(
            [
                arm.name,
                str(power.pairs),
                format_difference(arm.difference),
                f"{power.deviation:.4f} [{power.likely[0]:.4f}, {power.likely[1]:.4f}]",
                f"{could:.4f}",
                *(_seeds(power.seeds(one)) for one in wanted),
                time,
            ]
        )
    return cells


def _seeds(numbers: Sequence[int | None]) -> str:
    low, middle, high = (str(number or "over 200") for number in numbers)
    return middle if low == high else f"{middle} ({low} to {high})"


def sentences(found: Comparison, wanted: Sequence[float], jobs: int) -> list[str]:
    """What the whole study takes to see each difference in every arm, and how sure that is."""
    powers = [power for arm in found.arms.values() if (power := power_of(arm)) is not None]
    if not powers:
        return ["No arm has two pairs of finished runs, so that nothing is known of how far apart pairs lie."]
    others, worst = len(found.arms) - 1, max(powers, key=lambda power: power.deviation)
    said = [
        f"σ is the standard deviation of paired differences; {worst.arm} has the largest. Few pairs leave it open, "
        "over its interval. Seeds: for 80 % power at 5 % in one comparison, as σ is estimated (over its interval)."
    ]
    each = [seconds_of(found, name) for name in found.arms]
    for difference in wanted:
        alone, together = (worst.seeds(difference, comparisons)[1] for comparisons in (1, others))
        if alone is None or together is None:
            said.append(f"To see {difference:g} nats in every arm takes more than 200 seeds.")
            continue
        line = f"To see {difference:g} nats in every arm takes {alone} seeds"
        line += f", or {together} if all {others} comparisons are to hold together" if others > 1 else ""
        known = [seconds for seconds in each if seconds is not None]
        if known:
            left = sum(_left(found, name, together) for name in found.arms)
            hours = left * float(np.mean(known)) / jobs
            line += f": {left} more runs, {_time(hours)} with --jobs {jobs}"
        said.append(line + ".")
    return said


def _left(found: Comparison, arm: str, seeds: int) -> int:
    return max(0, seeds - len(found.arms[arm].finished))


def _time(seconds: float) -> str:
    return f"{ceil(seconds / 60)} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def seconds_of(found: Comparison, arm: str) -> float | None:
    """Mean time of an arm's finished runs; where it was not measured, training alone, by its tokens a second."""
    content = found.study["arms"][arm]
    times = []
    for run in content["runs"].values():
        if run["status"] == "finished" and run.get("seconds"):
            times.append(run["seconds"])
        elif run["status"] == "finished" and run["tokens_per_second"]:
            times.append(content["tokens"] / run["tokens_per_second"])
    return float(np.mean(times)) if times else None
