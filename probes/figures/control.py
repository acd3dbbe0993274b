"""What the router sees of hidden states, what tells where tokens go next, and how far layers go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "share of the squared norm": {
        "control_share": "control",
        "control_share_data": "directions drawn from the data",
        "control_chance": "of all directions, r/H",
    },
    "next layer's first expert, named": {
        "next_by_control": "by control, r numbers",
        "next_by_content_narrow": "by content, r numbers",
        "next_by_content": "by content, 128 numbers",
        "next_by_random": "in directions drawn, r numbers",
        "next_by_most_common": "as the most used",
    },
    "variance between token ids": {
        "id_share_control": "control",
        "id_share_content": "content",
        "id_share_control_shuffled": "control, ids shuffled",
    },
    "first choices go together (nats)": {
        "total_correlation": "as they are",
        "total_correlation_same_id": "shuffled within an id",
        "total_correlation_shuffled": "shuffled",
    },
}
CHANCE = ("chance", "data", "random", "most_common", "shuffled", "same_id")  # ends of what is drawn dashed


def draw_control(found: Mapping[str, Mapping[int, float]]) -> Figure:
    """Four panels over depth; chance is dashed."""
    from probes.figures import drawing

    fig = drawing.new_figure(15.0, 3.8, "Control, what the router sees of a hidden state, and content, the rest")
    for ax, (title, lines) in zip(fig.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for (key, label), colour in zip(lines.items(), drawing.SERIES, strict=False):
            drawing.depth_line(ax, found[key], colour, label, dashed=key.endswith(CHANCE))
        ax.set_title(title, fontsize=10)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        drawing.legend(ax, "too little text")
    return fig
