"""The pictures of a study, from a comparison: loss curves, paired differences, headline probes over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from moebed.study.comparison import Comparison
from probes.figures import drawing
from probes.figures.letters import apart
from probes.report.charts import small_panels
from probes.report.units import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Mapping[str, Sequence[Any]]
NAME_LETTERS = 44  # of an arm's name


def draw_all(found: Comparison) -> dict[str, Callable[[], Figure]]:
    """Name -> function that draws it, for every picture that there is something to show in."""
    pictures: dict[str, Callable[[], Figure]] = {}
    if any(_curves(found, name, "loss") for name in found.arms):
        pictures["loss_curves"] = lambda: draw_loss_curves(found)
    if any(arm.difference is not None for arm in found.arms.values()):
        pictures["differences"] = lambda: draw_differences(found)
    if found.headlines:
        pictures["headlines"] = lambda: draw_headlines(found)
    return pictures


def _styles(found: Comparison) -> dict[str, dict[str, Any]]:
    """The baseline broad and grey below the others in colours, which are dashed when those have been through once."""
    others = [name for name in found.arms if name != found.baseline]
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)))
    styles: dict[str, dict[str, Any]] = {found.baseline: {"color": drawing.MUTED, "ls": "-", "lw": 3.2, "alpha": 0.6}}
    for index, name in enumerate(others):
        turn, colour = divmod(index, len(drawing.MANY))
        styles[name] = {"color": drawing.MANY[colour], "ls": dashes[turn % len(dashes)], "lw": 1.5}
    return styles


def _curves(found: Comparison, arm: str, key: str) -> dict[str, dict[int, float]]:
    """Seed -> step -> value of the validation curves of runs that count."""
    runs = found.study["arms"][arm]["runs"]
    curves = {seed: _by_step(run["curve"], key) for seed, run in runs.items() if run["status"] == "finished"}
    return {seed: curve for seed, curve in curves.items() if curve}


def _by_step(series: Series, key: str) -> dict[int, float]:
    return {step: value for step, value in zip(series["step"], series[key], strict=True) if value is not None}


def _band(ax: Axes, curves: Mapping[str, Mapping[int, float]], style: Mapping[str, Any], label: str) -> None:
    """Mean over seeds as a line, least to most as a faint band; steps that every seed has."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []
    if not steps:
        return
    values = np.array([[curve[step] for step in steps] for curve in curves.values()])  # (seeds, steps)
    least, most = values.min(axis=0), values.max(axis=0)
    if len(steps) == 1:  # which has no width
        ax.vlines(steps, least, most, color=style["color"], alpha=0.4, lw=1.5)
    elif len(values) > 1:
        ax.fill_between(steps, least, most, color=style["color"], alpha=0.1, lw=0)
    ax.plot(steps, values.mean(axis=0), marker="o", ms=3, label=label, **style)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if ax.dataLim.width == 0:  # a single step: whole ones around it
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    else:
        ax.autoscale(axis="x")


def draw_loss_curves(found: Comparison) -> Figure:
    """Loss on held-out text over steps, and its paired difference from the baseline, where arms lie close together."""
    fig = drawing.new_figure(11.6, 4.4, "")
    left, right = fig.subplots(1, 2)
    styles, base = _styles(found), _curves(found, found.baseline, "loss")
    written = apart(found.arms, NAME_LETTERS)
    for name in found.arms:
        curves = _curves(found, name, "loss")
        _band(left, curves, styles[name], written[name])
        if name == found.baseline:
            continue
        pairs = {
            seed: {step: value - base[seed][step] for step, value in curve.items() if step in base[seed]}
            for seed, curve in curves.items()
            if seed in base
        }
        _band(right, pairs, styles[name], written[name])
    right.axhline(0, color=drawing.MUTED, lw=1, ls="--", zorder=1)
    titles = "loss on held-out text (nats a token)", f"paired difference from {written[found.baseline]}"
    for ax, title in zip((left, right), titles, strict=True):
        drawing.style_axes(ax)
        ax.set_title(title, fontsize=10.5)
        ax.set_xlabel("step", fontsize=9)
    drawing.legend_above(fig, [left])
    _say_bands(fig)
    return fig


def draw_differences(found: Comparison) -> Figure:
    """Forest plot: the paired differences, their mean and interval, and what the study could not have seen."""
    arms = [arm for arm in found.arms.values() if arm.difference is not None]
    fig = drawing.new_figure(9.5, 1.5 + 0.5 * len(arms), "")
    ax = fig.subplots()
    ax.use_sticky_edges = False  # a bar's left end would be the picture's
    drawing.style_axes(ax)
    styles, base = _styles(found), _final(found, found.baseline)
    written = apart(found.arms, NAME_LETTERS)
    for row, arm in enumerate(arms):
        assert arm.difference is not None
        difference, colour = arm.difference, styles[arm.name]["color"]
        values = [value - base[seed] for seed, value in _final(found, arm.name).items() if seed in base]
        if difference.detectable is not None:
            ax.barh(row, 2 * difference.detectable, left=-difference.detectable, height=0.62, color=drawing.GRID, lw=0)
        if difference.interval is not None:
            ax.plot(difference.interval, [row, row], color=colour, lw=2.2, solid_capstyle="butt")
        ax.plot(values, [row + 0.2] * len(values), "o", ms=3.5, mfc="none", mec=colour, mew=1, zorder=3)
        ax.plot([difference.mean], [row], "D", ms=6, color=colour, zorder=4)
    ax.axvline(0, color=drawing.INK, lw=1)
    named = [written[arm.name] + (" *" if _called(arm.difference) else "") for arm in arms]
    ax.set_yticks(range(len(arms)), named)
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.tick_params(axis="y", labelsize=9.5)
    ax.set_title(
        f"loss minus that of {written[found.baseline]}, paired over seeds (nats a token; less is better)",
        fontsize=10.5,
    )
    ax.set_xlabel(
        "diamond: mean, line: 95 % interval, rings: pairs, * interval excludes 0\n"
        "grey: differences that this many pairs would miss in more than one of five studies",
        fontsize=8.5,
        color=drawing.MUTED,
    )
    return fig


def _called(difference: Any) -> bool:
    return difference is not None and difference.called


def _final(found: Comparison, arm: str) -> dict[str, float]:
    """Seed -> final loss of the runs that count."""
    runs = found.study["arms"][arm]["runs"]
    return {s: run["loss"] for s, run in runs.items() if run["status"] == "finished" and run["loss"] is not None}


def draw_headlines(found: Comparison) -> Figure:
    """One panel a headline: a line an arm, a band over its seeds."""
    names = list(found.headlines)
    fig, axes = small_panels(len(names), 4)
    styles = _styles(found)
    written = apart(found.arms, NAME_LETTERS)
    for ax, headline in zip(axes, names, strict=True):
        drawing.style_axes(ax)
        for arm in found.arms:
            runs = found.study["arms"][arm]["runs"]
            curves = {
                seed: _by_step(run["headlines"][headline], "value")
                for seed, run in runs.items()
                if run["status"] == "finished" and headline in run["headlines"]
            }
            _band(ax, curves, styles[arm], written[arm])
        probe, _, key = headline.partition("/")
        ax.set_title(f"{probe}: {key}", fontsize=8.5)
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel(unit_of(headline), fontsize=8)
    drawing.legend_above(fig, axes)
    _say_bands(fig)
    return fig


def _say_bands(fig: Figure) -> None:
    fig.supxlabel("mean over seeds; bands from the least to the most", fontsize=8.5, color=drawing.MUTED)
