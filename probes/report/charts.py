"""The report's own charts: logged curves of several runs, and what the probes saw over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moebed.machine.tags import LAYERS
from probes.figures import drawing
from probes.figures.letters import apart
from probes.report.units import unit_of

if TYPE_CHECKING:
    from probes.running.run_folder import Curve, RunFolder

# The order in which a reader wants them; other tags follow.
LOSSES = {
    "loss (nats a token)": ("train/loss", "val/loss"),
    "bits per byte": ("train/bits_per_byte", "val/bits_per_byte"),
}
FIRST_TAGS = (
    *(tag for tags in LOSSES.values() for tag in tags),
    "train/load_balancing_loss",
    "train/max_violation",
    "train/max_violation_worst",
    "train/idle_experts",
    "train/router_entropy",
    "train/router_z_loss",
    "train/grad_norm",
)
LEFT_OUT = ("epoch", "hp_metric")
MOST_PANELS = 24
SMOOTHED_FROM = 60
NAME_LETTERS = 40  # of a run's name


def run_colours(runs: Sequence[RunFolder]) -> dict[str, str]:
    """A colour for each run, the same all over the report."""
    return {run.name: drawing.MANY[index % len(drawing.MANY)] for index, run in enumerate(runs)}


def tags_in_order(runs: Sequence[RunFolder]) -> list[str]:
    """Tags of all runs that are worth a small chart; those of ``draw_losses`` are not among them."""
    drawn = {*LEFT_OUT, *(tag for tags in LOSSES.values() for tag in tags)}
    found = {
        tag
        for run in runs
        for tag, (steps, _) in run.curves.items()
        if len(steps) > 1 and tag not in drawn and not tag.startswith(f"{LAYERS}/")
    }
    rest = sorted(found - set(FIRST_TAGS))
    return [tag for tag in FIRST_TAGS if tag in found] + rest


def draw_losses(runs: Sequence[RunFolder]) -> Figure:
    """Loss and bits per byte of all runs in large: training as a line, validation as dots."""
    panels = {title: tags for title, tags in LOSSES.items() if any(tag in run.curves for run in runs for tag in tags)}
    fig = drawing.new_figure(11.6, 3.8, "")
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    colours = run_colours(runs)
    names = apart((run.name for run in runs), NAME_LETTERS)
    for ax, (title, (train, validation)) in zip(axes, panels.items(), strict=True):
        for run in runs:
            name = names[run.name]
            if train in run.curves:
                _draw_curve(ax, run.curves[train], colours[run.name], f"{name}: train")
            if validation in run.curves:
                drawing.style_axes(ax)
                style = {"marker": "o", "ms": 5, "ls": ":", "lw": 1.2, "mec": "white"}
                ax.plot(*run.curves[validation], color=colours[run.name], label=f"{name}: validation", **style)
        _limit(ax, [run.curves[tag] for run in runs for tag in (train, validation) if tag in run.curves])
        ax.set_title(title, fontsize=10.5)
        ax.set_xlabel("step", fontsize=9)
    drawing.legend_above(fig, axes)
    return fig


def draw_curves(runs: Sequence[RunFolder], tags: Sequence[str]) -> Figure:
    """One panel a tag, one line a run; a long curve is drawn smoothed over its raw values."""
    fig, axes = small_panels(min(len(tags), MOST_PANELS), 4)
    colours = run_colours(runs)
    names = apart((run.name for run in runs), NAME_LETTERS)
    for ax, tag in zip(axes, tags, strict=False):
        for run in runs:
            if tag in run.curves:
                _draw_curve(ax, run.curves[tag], colours[run.name], names[run.name])
        _limit(ax, [run.curves[tag] for run in runs if tag in run.curves])
        _say(ax, tag, unit_of(tag))
    if len(runs) > 1:
        drawing.legend_above(fig, axes)
    return fig


def _draw_curve(ax: Axes, curve: Curve, colour: str, name: str) -> None:
    steps, values = np.array(curve[0]), np.array(curve[1])
    drawing.style_axes(ax)
    if len(values) < SMOOTHED_FROM:
        ax.plot(steps, values, color=colour, lw=1.4, marker="o" if len(values) < 12 else None, ms=3, label=name)
        return
    ax.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
    ax.plot(steps, _smooth(values), color=colour, lw=1.5, label=name)


def _limit(ax: Axes, curves: Sequence[Curve]) -> None:
    """Leave out the highest half percent of long curves: a spike at the start would flatten all that follows."""
    values = np.concatenate([values for _, values in curves])
    values = values[np.isfinite(values)]
    if len(values) >= SMOOTHED_FROM:
        low, high = np.quantile(values, (0.0, 0.995))
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fortieth of the curve, unbiased at its start."""
    decay = 1 - 1 / max(2.0, len(values) / 40)
    total = weight = 0.0
    out = np.empty_like(values)
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        out[index] = total / weight if weight else np.nan
    return out


def trained_layers(curves: Mapping[str, Curve]) -> dict[str, dict[int, Curve]]:
    """What a run logged by layer at its steps: ``train/<quantity>`` -> layer -> curve."""
    found: dict[str, dict[int, Curve]] = {}
    for tag, curve in curves.items():
        quantity, _, layer = tag.rpartition("/layer_")
        if quantity.startswith(f"{LAYERS}/") and layer.isdigit():
            found.setdefault(quantity.removeprefix(f"{LAYERS}/"), {})[int(layer)] = curve
    return found


def layer_series(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Curve]]:
    """What the history holds by layer: ``<probe>/<quantity>`` -> layer -> curve over steps."""
    found: dict[str, dict[int, Curve]] = {}
    for line in history:
        for name, value in line.get("scalars", {}).items():
            quantity, _, layer = name.rpartition("/layer_")
            if quantity and layer.isdigit() and value is not None:
                steps, values = found.setdefault(quantity, {}).setdefault(int(layer), ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def headline_series(runs: Sequence[RunFolder]) -> dict[str, dict[str, Curve]]:
    """Headlines that were probed more than once: ``<probe>/<headline>`` -> run -> curve over steps."""
    found: dict[str, dict[str, Curve]] = {}
    for run in runs:
        for line in run.history if len(run.history) > 1 else ():
            for name, value in line.get("headlines", {}).items():
                if value is not None:
                    steps, values = found.setdefault(name, {}).setdefault(run.name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
    return found


def draw_headlines(series: Mapping[str, Mapping[str, Curve]], runs: Sequence[RunFolder]) -> Figure:
    """One panel a headline, one line a run."""
    fig, axes = small_panels(len(series), 4)
    colours = run_colours(runs)
    names = apart((run.name for run in runs), NAME_LETTERS)
    for ax, (name, by_run) in zip(axes, series.items(), strict=True):
        drawing.style_axes(ax)
        for run, (steps, values) in by_run.items():
            ax.plot(steps, values, color=colours[run], lw=1.6, marker="o", ms=3, label=names[run])
        probe, _, key = name.partition("/")
        _say(ax, f"{probe}: {key}", unit_of(name))
    if len(runs) > 1:
        drawing.legend_above(fig, axes)
    return fig


def draw_history(series: Mapping[str, Mapping[int, Curve]], columns: int) -> Figure:
    """One panel a quantity, one line a layer, from light (first) to dark (last)."""
    fig, axes = small_panels(len(series), columns)
    layers = sorted({layer for by_layer in series.values() for layer in by_layer})
    scale = Normalize(layers[0] - 0.6 * max(1, layers[-1] - layers[0]), max(layers[-1], layers[0] + 1))
    colours = {layer: colormaps["YlGnBu"](float(scale(layer))) for layer in layers}
    for ax, (quantity, by_layer) in zip(axes, series.items(), strict=False):
        drawing.style_axes(ax)
        for layer, (steps, values) in sorted(by_layer.items()):
            mark = "o" if len(steps) < 25 else None
            ax.plot(steps, values, color=colours[layer], lw=1.4, marker=mark, ms=2.5, label=f"layer {layer}")
        probe, _, name = quantity.partition("/")
        _say(ax, f"{probe}: {name}", unit_of(quantity))
    drawing.legend_above(fig, axes, [f"layer {layer}" for layer in drawing.pick(layers, 8)])
    return fig


def _say(ax: Axes, title: str, unit: str) -> None:
    """What a small panel shows; a long title is written small enough for its panel."""
    ax.set_title(title, fontsize=min(9.0, 260 / len(title)))
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)


def small_panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` small panels, at most so many a row."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    fig = drawing.new_figure(2.9 * columns, 2.2 * rows + 0.3, "")
    fig.suptitle("")
    axes = fig.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]
