"""The pictures of a fitted law: contours of the loss, frontiers over budgets, residuals; or of efficiency leverage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moebed.laws.choices import optimum
from moebed.laws.contract import Array, LossLaw
from moebed.laws.findings import SHAPES, Fitted
from moebed.laws.leverage import Leverage
from probes.figures import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 3
_POINTS = 48


def draw_all(found: Fitted) -> dict[str, Callable[[], Figure]]:
    """Name -> function that draws it."""
    law = found.law
    pictures: dict[str, Callable[[], Figure]] = {}
    if isinstance(law, LossLaw):
        pictures["law_loss_contours"] = lambda: draw_contours(found, law)
        pictures["law_frontiers"] = lambda: draw_frontiers(found, law)
    elif isinstance(law, Leverage):
        pictures["law_leverage"] = lambda: draw_leverage(found, law)
    pictures["law_residuals"] = lambda: draw_residuals(found)
    return pictures


def _of_shape(found: Fitted, shape: Any) -> Array:
    """Which runs have a shape, (n,)."""
    columns = found.table.columns
    return np.all([np.isclose(columns[name], getattr(shape, name)) for name in ("E", "K", "G")], axis=0)


def _log(ax: Axes, x: str, y: str = "") -> None:
    drawing.style_axes(ax)
    ax.set_xscale("log")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def _reach(values: Array, factor: float) -> tuple[float, float]:
    return float(values.min() / factor), float(values.max() * factor)


def _band(ax: Axes, x: Array, draws: Array, colour: str, label: str) -> None:
    """The fit as a line, 95 % of the resamples as a band; draws (1 + B, points)."""
    low, high = np.nanquantile(draws[1:], (0.025, 0.975), axis=0)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    ax.plot(x, draws[0], color=colour, lw=1.6, label=label)


def draw_contours(found: Fitted, law: LossLaw) -> Figure:
    """Loss over N and tokens, a panel a shape: the law as contours, runs as dots in the same colours."""
    columns, shapes = found.table.columns, drawing.pick(found.shapes, PANELS)
    size = np.geomspace(*_reach(columns["N"], 4), _POINTS)
    tokens = np.geomspace(*_reach(columns["tok"], 4), _POINTS)
    grid = np.meshgrid(size, tokens)
    fits = {name: value[0] for name, value in found.constants.items()}
    losses = [law.loss(fits, *grid, shape) for shape in shapes]
    levels = np.linspace(min(map(np.min, losses)), max(map(np.max, losses)), 15)
    fig = drawing.new_figure(1.2 + 3.8 * len(shapes), 4.3, "")
    axes = np.atleast_1d(fig.subplots(1, len(shapes), sharex=True, sharey=True))
    image: Any = None
    for ax, shape, loss in zip(axes, shapes, losses, strict=True):
        image = ax.contourf(size, tokens, loss, levels, cmap="viridis")
        _log(ax, "N (parameters)", "tokens" if ax is axes[0] else "")
        ax.set_yscale("log")
        runs = _of_shape(found, shape)
        values = {"c": columns["loss"][runs], "vmin": levels[0], "vmax": levels[-1], "cmap": "viridis"}
        ax.scatter(columns["N"][runs], columns["tok"][runs], s=34, edgecolors="white", lw=0.9, zorder=3, **values)
        budgets = np.geomspace(*_reach(columns["flops"], 100), 60)
        best = optimum(law, fits, budgets, shape)
        ax.plot(best.size, best.tokens, color="white", lw=1.8)
        for budget in found.budgets:
            ax.plot(size, budget / law.flops_per_token(size, shape), color="white", lw=0.9, ls="--")
        ax.set_xlim(size[0], size[-1])
        ax.set_ylim(tokens[0], tokens[-1])
        ax.set_title(shape.words(found.parts), fontsize=10.5)
    fig.colorbar(image, ax=list(axes), label="loss (nats a token)", format="%.2f")
    fig.supxlabel(
        "dots: runs, in the colour of their own loss; line: loss-optimal; dashed: "
        + " and ".join(f"{budget:.2g}" for budget in found.budgets)
        + " FLOPs",
        fontsize=8.5,
        color=drawing.MUTED,
    )
    return fig


def draw_frontiers(found: Fitted, law: LossLaw) -> Figure:
    """The lowest loss of each shape over budgets, with the runs; and the size that has it."""
    columns = found.table.columns
    budgets = np.geomspace(columns["flops"].min(), max(columns["flops"].max() * 10, *found.budgets), 24)
    fig = drawing.new_figure(11.6, 4.6, "")
    left, right = fig.subplots(1, 2)
    for shape, colour in zip(found.shapes, drawing.MANY, strict=False):
        best = [optimum(law, found.constants, budget, shape) for budget in budgets]
        _band(left, budgets, np.stack([one.loss for one in best], axis=1), colour, shape.words(found.parts))
        _band(right, budgets, np.stack([one.size for one in best], axis=1), colour, shape.words(found.parts))
        if law.published:
            theirs = optimum(law, law.published, budgets, shape)
            right.plot(budgets, theirs.size, color=colour, lw=1, ls=":")
        runs = _of_shape(found, shape)
        left.plot(columns["flops"][runs], columns["loss"][runs], "o", ms=3.5, mfc="none", mec=colour, mew=0.9)
    for ax, title in ((left, "lowest loss (nats a token)"), (right, "loss-optimal N (parameters)")):
        _log(ax, "training FLOPs")
        ax.axvline(columns["flops"].max(), color=drawing.MUTED, lw=1, ls="--")
        ax.set_title(title, fontsize=10.5)
    right.set_yscale("log")
    left.legend(fontsize=8.5, frameon=False)
    dotted = "; dotted: by the published constants" if law.published else ""
    fig.supxlabel(
        f"bands: 95 % of the fits to resampled runs; rings: runs; right of the dashed line: beyond all runs{dotted}",
        fontsize=8.5,
        color=drawing.MUTED,
    )
    return fig


def draw_residuals(found: Fitted) -> Figure:
    """What was measured over what the law says, over training FLOPs."""
    columns = found.table.columns
    fig = drawing.new_figure(8.2, 3.6, "")
    ax = fig.subplots()
    error = 100 * np.expm1(-found.fit.residuals)
    groups: Mapping[str, Array] = {"runs": np.ones(len(error), dtype=bool)}
    if isinstance(found.law, LossLaw):
        groups = {shape.words(found.parts): _of_shape(found, shape) for shape in found.shapes}
    for (label, runs), colour in zip(groups.items(), drawing.MANY, strict=False):
        ax.plot(columns["flops"][runs], error[runs], "o", ms=4.5, mfc="none", mec=colour, mew=1.1, label=label)
    others = ~np.any(list(groups.values()), axis=0)
    if others.any():
        ax.plot(columns["flops"][others], error[others], ".", color=drawing.MUTED, ms=4, label="other shapes")
    _log(ax, "training FLOPs", f"measured over fitted {found.law.target}, − 1 (%)")
    ax.axhline(0, color=drawing.INK, lw=1)
    if len(groups) > 1:
        ax.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def draw_leverage(found: Fitted, law: Leverage) -> Figure:
    """Leverage over the active share, and over granularity, at the largest budget of the runs."""
    columns, budget = found.table.columns, float(found.table.columns["flops"].max())
    fig = drawing.new_figure(11.6, 4.4, "")
    panels = fig.subplots(1, 2, sharey=True)
    low, high = _reach(columns["leverage"], 1.5)
    ticks = [v for v in (0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50) if low < v < high]
    for ax, name, other in zip(panels, ("A", "G"), ("G", "A"), strict=True):
        x = np.geomspace(*_reach(columns[name], 1.5), _POINTS)
        for value, colour in zip(drawing.pick(np.unique(columns[other]).tolist(), SHAPES), drawing.MANY, strict=False):
            place = {name: x, other: value, "flops": budget}
            _band(ax, x, law.predict(found.constants, **place), colour, f"{other} {value:.3g}")
            ax.plot(x, law.predict(law.published, **place), color=colour, lw=1, ls=":")
            runs = (columns["flops"] == budget) & (columns[other] == value)
            ax.plot(columns[name][runs], columns["leverage"][runs], "o", ms=4, mfc="none", mec=colour)
        _log(ax, {"A": "active share of experts A", "G": "granularity G"}[name])
        ax.set_yscale("log")
        ax.set_xticks(values := drawing.pick(np.unique(columns[name]).tolist(), SHAPES), [f"{v:.3g}" for v in values])
        ax.set_yticks(ticks, [f"{v:g}" for v in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=8.5, frameon=False)
    panels[0].set_title(f"leverage at {budget:.2g} FLOPs", fontsize=10.5)
    fig.supxlabel(
        "bands: 95 % of the fits to resampled runs; rings: runs; dotted: by the published constants",
        fontsize=8.5,
        color=drawing.MUTED,
    )
    return fig
