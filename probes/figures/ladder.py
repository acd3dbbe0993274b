"""What routing can be predicted from: over depth, and on average beside what chance and less text give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Explained(Protocol):
    """What a predictor explains: by layer, on average with its interval, and of two comparisons."""

    @property
    def layers(self) -> dict[int, float]:
        """By layer."""
        ...

    @property
    def value(self) -> float:
        """On average."""
        ...

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %."""
        ...

    @property
    def half(self) -> float:
        """Learned from half the text."""
        ...

    @property
    def shuffled(self) -> float:
        """Of choices shuffled over tokens."""
        ...


def draw_ladder(rows: Mapping[str, Explained], labels: Mapping[str, str], ceiling: str) -> Figure:
    """Shares explained by layer, and their means, whose labels name the lines as well; the ceiling dashed."""
    from probes.figures import drawing

    fig = drawing.new_figure(13.0, 5.2, "Share of a token's experts that is explained, on texts not learned from")
    over_depth, means = fig.subplots(1, 2, width_ratios=(1.15, 1))
    place, shown = {}, list(rows)
    drawing.layer_axis(over_depth)
    for number, (rung, row) in enumerate(rows.items()):
        colour = drawing.MUTED if rung == ceiling else drawing.MANY[number % len(drawing.MANY)]
        line, mark = ("--", "D") if rung == ceiling else ("-", "o") if number < len(drawing.MANY) else (":", "s")
        over_depth.plot(list(row.layers), list(row.layers.values()), line, color=colour, marker=mark, ms=4, lw=1.4)
        place[rung] = len(shown) - 1 - number
        if row.interval is not None:
            means.plot(row.interval, [place[rung]] * 2, color=colour, lw=2, solid_capstyle="butt")
        means.plot([row.value], [place[rung]], mark, ms=5, color=colour)
    means.plot([row.half for row in rows.values()], list(place.values()), "|", ms=10, color=drawing.INK,
               label="from half the text")  # fmt: skip
    means.plot([row.shuffled for row in rows.values()], list(place.values()), "x", ms=5, color=drawing.MUTED,
               label="choices shuffled")  # fmt: skip
    drawing.style_axes(means)
    means.set_yticks(list(place.values()), [labels[rung] for rung in rows], fontsize=8)
    means.set_xlabel("mean over layers, with 95 % interval over texts", fontsize=9)
    for line in (over_depth.axhline, means.axvline):
        line(0, color=drawing.MUTED, lw=1, ls=":")
    means.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.1), ncols=2)
    over_depth.set_title("by layer, in the colours and marks of the right", fontsize=10)
    over_depth.set_ylabel("share explained", fontsize=9)
    return fig
