"""What a study found, from the content of ``study.json`` alone: means, paired differences, and what may be said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from moebed.study.code import differing_code
from moebed.study.gain import ROLES, GainShare, gain_share
from moebed.study.statistics import Difference, compare, deviation_range, pairs_needed, pooled_freedom, t_interval
from probes.measures.significance import holm

Run = Mapping[str, Any]
T = TypeVar("T")


@dataclass
class ArmResult:
    """One arm.

    Args:
        name: The arm.
        settings: What it changes, in a few words.
        finished: Seeds whose run is finished and did not diverge.
        loss: Mean loss on held-out text over them, in nats a token; None where there is none.
        loss_deviation: Standard deviation over seeds; None with fewer than two.
        bits_per_byte: Mean.
        tokens_per_second: Mean over runs of each run's median.
        facts: Tokens, parameters, FLOPs, as in the file.
        difference: Loss minus the baseline's, over seeds finished in both; None for the baseline or without pairs.
        holm: The difference's p, adjusted for all comparisons of the study.
        by_step: The same difference at every validation that all pairs have.
        over_floor: Of planted text, mean loss over its floor, in nats a token.
        gain: Share of the oracle's gain, where the study names its references.
        marks: What the reader must know: runs that are missing, failed or diverged.
    """

    name: str
    settings: str
    finished: list[int]
    loss: float | None
    loss_deviation: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    facts: Mapping[str, Any]
    difference: Difference | None = None
    holm: float | None = None
    by_step: Mapping[int, Difference] = field(default_factory=dict)
    over_floor: float | None = None
    gain: GainShare | None = None
    marks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeadlineResult:
    """A probe's headline at the last probing of one arm's runs, or their bits per byte on one domain's text.

    Args:
        mean: Over finished seeds.
        interval: Of that mean, 95 %; None with one seed.
        difference: From the baseline, paired; None for the baseline or without pairs.
    """

    mean: float
    interval: tuple[float, float] | None
    difference: Difference | None


@dataclass
class Comparison:
    """A whole study.

    Args:
        study: Content of ``study.json``.
        arms: By name, the baseline first.
        headlines: ``<probe>/<headline>`` -> arm -> result, where the baseline or any arm has it.
        domains: Domain of the text -> arm -> bits per byte; empty with one domain.
        warnings: What holds for the whole study, in words.
    """

    study: Mapping[str, Any]
    arms: dict[str, ArmResult]
    headlines: dict[str, dict[str, HeadlineResult]]
    domains: dict[str, dict[str, HeadlineResult]]
    warnings: list[str]

    @property
    def baseline(self) -> str:
        """Name of the arm that others are compared with."""
        return self.study["baseline"]


def compare_arms(study: Mapping[str, Any]) -> Comparison:
    """All that is computed from a study: deterministic, so that tables and figures can be made again."""
    baseline = study["baseline"]
    names = [baseline, *(name for name in study["arms"] if name != baseline)]
    arms = {name: _arm(name, study["arms"][name]) for name in names}
    losses = {name: _by_seed(study["arms"][name], lambda run: run["loss"]) for name in names}
    compared: list[tuple[ArmResult, float]] = []
    for name in names[1:]:
        arm, found = arms[name], _paired(losses[name], losses[baseline])
        missing = sorted(set(study["seeds"]) - (set(losses[name]) & set(losses[baseline])))
        if missing:
            seeds = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            arm.marks.append(f"{found.pairs if found else 0} of {len(study['seeds'])} pairs: without {seeds}")
        arm.marks += _unmatched(arm.facts, arms[baseline].facts, study["tolerance"])
        arm.difference = found
        arm.by_step = _paired_by_step(study["arms"][name], study["arms"][baseline])
        if found is not None and found.p is not None:
            compared.append((arm, found.p))
    if references := study.get("gain"):
        random, oracle = (losses[references[role]] for role in ROLES)
        for name in names:
            arms[name].gain = gain_share(losses[name], random, oracle)
    for (arm, _), adjusted in zip(compared, holm([p for _, p in compared]), strict=True):
        arm.holm = adjusted
    return Comparison(study, arms, _headlines(study, names), _domains(study, names), _warnings(study, len(compared)))


def _unmatched(facts: Mapping[str, Any], baseline: Mapping[str, Any], tolerance: float) -> list[str]:
    """Sizes in which an arm differs from the baseline: whatever its loss is, that may be why."""
    marks = []
    for key in ("total_parameters", "active_parameters", "active_flops_per_token"):
        ratio = facts[key] / baseline[key]
        if abs(ratio - 1) > tolerance:
            marks.append(f"has {ratio:.3g} times the baseline's {key.replace('_', ' ').replace('flops', 'FLOPs')}")
    return marks


def _by_seed(arm: Mapping[str, Any], value: Callable[[Run], T | None]) -> dict[int, T]:
    """Something of each run that finished and did not diverge."""
    found = {int(seed): value(run) for seed, run in arm["runs"].items() if run["status"] == "finished"}
    return {seed: number for seed, number in found.items() if number is not None}


def _paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    seeds = [seed for seed in arm if seed in baseline]
    return compare([arm[seed] for seed in seeds], [baseline[seed] for seed in seeds]) if seeds else None


def _paired_by_step(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[int, Difference]:
    def curve(run: Run) -> dict[int, float] | None:
        points = zip(run["curve"]["step"], run["curve"]["loss"], strict=True)
        return {step: loss for step, loss in points if loss is not None} if run["loss"] is not None else None

    curves, base = _by_seed(arm, curve), _by_seed(baseline, curve)
    seeds = [seed for seed in curves if seed in base]
    shared = [set(of_arm[seed]) for of_arm in (curves, base) for seed in seeds]
    steps = sorted(set.intersection(*shared)) if shared else []
    return {step: compare([curves[s][step] for s in seeds], [base[s][step] for s in seeds]) for step in steps}


def _arm(name: str, arm: Mapping[str, Any]) -> ArmResult:
    losses = _by_seed(arm, lambda run: run["loss"])
    bits = _by_seed(arm, lambda run: run["bits_per_byte"])
    speeds = _by_seed(arm, lambda run: run["tokens_per_second"])
    marks = [
        f"seed {seed} {run['status'].upper() if run['status'] != 'not run' else 'not run'}"
        + (f": {run['why']}" if run["why"] else "")
        for seed, run in arm["runs"].items()
        if run["status"] != "finished"
    ]
    marks += _guessing(arm)
    before = [
        f"{kind} " + ", ".join(f"{_short(key)} {value}" for key, value in settings.items())
        for kind, settings in arm["steps_before"]
    ]
    own = ", ".join(f"{_short(key)} {value}" for key, value in arm["settings"].items())
    return ArmResult(
        name,
        "; then ".join([*before, own or "the base recipe"]),
        sorted(losses),
        _mean(losses),
        float(np.std(list(losses.values()), ddof=1)) if len(losses) > 1 else None,
        _mean(bits),
        _mean(speeds),
        {key: value for key, value in arm.items() if key != "runs"},
        over_floor=_mean(_by_seed(arm, lambda run: run.get("over_floor"))),
        marks=marks,
    )


def _guessing(arm: Mapping[str, Any]) -> list[str]:
    """Finished runs that have learned nothing, which are part of every mean: too few steps, or too small a rate."""
    losses = _by_seed(arm, lambda run: run["loss"])
    known = {seed: arm["runs"][str(seed)].get("guessing_loss") for seed in losses}  # files of earlier versions: not
    bad = [seed for seed, loss in losses.items() if (guessing := known[seed]) is not None and loss >= guessing]
    if not bad:
        return []
    seeds = f"seed{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))}"
    return [f"{seeds} NO BETTER THAN GUESSING, whose loss is {known[bad[0]]:.3f}"]


def _short(key: str) -> str:
    return key.removeprefix("model.config.").removeprefix("model.").removeprefix("trainer.")


def _mean(values: Mapping[int, float]) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def _headlines(study: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, HeadlineResult]]:
    def last(run: Run, key: str) -> float | None:
        series = run["headlines"].get(key)
        return series["value"][-1] if series else None

    return _by_arm(study, names, lambda run: run["headlines"], last)


def _domains(study: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, HeadlineResult]]:
    def of(run: Run) -> Mapping[str, float | None]:
        return run.get("domains", {})  # of which files of earlier versions know nothing

    found = _by_arm(study, names, of, lambda run, key: of(run).get(key))
    return found if len(found) > 1 else {}


class _ValueOf(Protocol):
    def __call__(self, run: Run, key: str) -> float | None: ...


def _by_arm(
    study: Mapping[str, Any],
    names: Sequence[str],
    keys: Callable[[Run], Iterable[str]],
    value: _ValueOf,
) -> dict[str, dict[str, HeadlineResult]]:
    """Key -> arm -> mean over its runs, and paired difference from the baseline, of every key that any run has."""
    known = dict.fromkeys(key for name in names for run in study["arms"][name]["runs"].values() for key in keys(run))
    found: dict[str, dict[str, HeadlineResult]] = {}
    for key in known:
        values = {name: _by_seed(study["arms"][name], partial(value, key=key)) for name in names}
        base = values[study["baseline"]]
        found[key] = {
            name: _headline(list(of_arm.values()), _paired(of_arm, base) if name != study["baseline"] else None)
            for name, of_arm in values.items()
            if of_arm
        }
    return {key: by_arm for key, by_arm in found.items() if by_arm}


def _headline(values: list[float], difference: Difference | None) -> HeadlineResult:
    interval = t_interval(values) if len(values) > 1 else None
    return HeadlineResult(float(np.mean(values)), interval, difference)


def _warnings(study: Mapping[str, Any], compared: int) -> list[str]:
    warnings = []
    if len(study["seeds"]) == 1:
        warnings.append("ONE SEED: no interval, nothing can be concluded.")
    left_out = [
        f"{name}, seed {seed}: {run['status']}"
        for name, arm in study["arms"].items()
        for seed, run in arm["runs"].items()
        if run["status"] != "finished"
    ]
    if left_out:
        warnings.append(f"LEFT OUT of every mean and difference: {'; '.join(left_out)}.")
    warnings += [said] if (said := differing_code(study)) else []
    if compared > 1:
        warnings.append(
            f"{compared} comparisons: if no arm differed, the interval of at least one would exclude 0 in up to "
            f"{100 * (1 - 0.95**compared):.0f} % of such studies; Holm's p takes that into account."
        )
    return warnings


def power(found: Comparison) -> str:
    """How far apart pairs lie in this study, and what more of them would see; empty without two pairs of an arm."""
    arms = [arm for arm in found.arms.values() if arm.difference is not None and arm.difference.deviation]
    deviations = [arm.difference.deviation for arm in arms if arm.difference is not None and arm.difference.deviation]
    if not deviations:
        return ""
    pooled = float(np.sqrt(np.mean(np.square(deviations))))
    losses = {name: _by_seed(found.study["arms"][name], lambda run: run["loss"]) for name in found.arms}
    base, together = losses[found.baseline], []
    likely = deviation_range(pooled, _freedom([losses[arm.name] for arm in arms], base))
    needed = {d: [pairs_needed(deviation, d) for deviation in likely] for d in (0.05, 0.03, 0.02, 0.01)}
    takes = [f"{difference} nats {_pairs(*pairs)}" for difference, pairs in needed.items()]
    for arm in arms:
        seeds = [seed for seed in losses[arm.name] if seed in base]
        both = [[values[seed] for seed in seeds] for values in (losses[arm.name], base)]
        if len(seeds) > 2 and min(np.ptp(both, axis=1)) > 0:
            together.append(float(np.corrcoef(both)[0, 1]))
    gain = f" Losses of a seed correlate with the baseline's at {_range(together, '+.2f')}." if together else ""
    return (
        f"Paired differences have standard deviations of {_range(deviations, '.4f')} nats, pooled {pooled:.4f} "
        f"(95 % interval {likely[0]:.4f} to {likely[1]:.4f}).{gain} Over that interval, to see a difference (80 % "
        f"power at 5 %) takes pairs: {', '.join(takes)}."
    )


def _freedom(arms: Sequence[Mapping[int, float]], base: Mapping[int, float]) -> float:
    """Degrees of freedom of the deviation of all arms' pairs, from losses by seed."""
    every = [seed for seed in base if all(seed in losses for losses in arms)]
    if len(every) > 1:
        return pooled_freedom(np.array([[losses[seed] - base[seed] for seed in every] for losses in arms]))
    return max(len(losses.keys() & base.keys()) for losses in arms) - 1


def _pairs(least: int | None, most: int | None) -> str:
    if least is None:
        return "more than 200"
    if most is None:
        return f"{least} to more than 200"
    return str(least) if least == most else f"{least} to {most}"


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def verdict(arm: ArmResult, baseline: str) -> str:
    """What may be said of an arm, with its interval, in a sentence."""
    found = arm.difference
    if found is None:
        return f"{arm.name}: no pair of finished runs, so it cannot be compared with {baseline}."
    if found.interval is None:
        return f"{arm.name}: {found.mean:+.4f} nats from {baseline} in one pair; no interval, nothing can be concluded."
    pairs = f"{found.pairs} pairs"
    if found.deviation == 0.0 and found.mean == 0.0:
        return f"{arm.name}: equal to {baseline} in every one of {pairs}; no difference."
    low, high = found.interval
    numbers = f"{found.mean:+.4f} nats, 95 % interval [{low:+.4f}, {high:+.4f}], {pairs}"
    if found.called:
        word = "a higher loss than" if found.mean > 0 else "a lower loss than"
        doubt = ""
        if arm.holm is not None and arm.holm > 0.05:
            doubt = f"; among all comparisons of the study it may still be chance (Holm's p {arm.holm:.2g})"
        return f"{arm.name}: {word} {baseline} ({numbers}){doubt}."
    assert found.detectable is not None
    low, high = found.detectable_range or (found.detectable, found.detectable)
    return (
        f"{arm.name}: no difference from {baseline} was found ({numbers}); one below {found.detectable:.4f} would have "
        f"been missed more often than in one of five such studies ({low:.4f} to {high:.4f}, as these pairs' deviation "
        "is known)."
    )
