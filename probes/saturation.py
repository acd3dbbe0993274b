"""Router saturation: when in training are the choices settled? (OLMoE, arXiv 2409.02060, section 5)

T tokens, E experts, K experts per token, C probings of the run so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, finite, numbers, per_layer
from probes.measures.choices import NONE, assignments
from probes.measures.resampling import SHARE, WITHOUT, interval_of, unit_notes, units_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PROBINGS = 64
MOST_BYTES = 32 << 20  # of all choices kept
UNKNOWN = -2  # the choice of a layer that an earlier probing did not see
SETTLED = 0.8


class Saturation(Probe):
    """How many of the experts that a token has now it had at each probing before.

    Stored for each layer: ``topk_index (C, T, K)`` int16, -2 where a probing did not see the layer, -1 where a token
    has no further expert; ``saturation
    (C,)``, mean over tokens of ∣top-K(then) ∩ top-K(now)∣ / K, the last one 1; ``saturation_previous (C,)``, the same
    against the probing before each, the first one NaN; ``saturation_random``, K/E. Stored once: ``steps (C,)``;
    ``token_ids (T,)``.

    At most 64 probings and 32 MiB of choices are kept: when one is too many, the one nearest to its neighbours goes, so
    that they stay spread over training. The text must be the same at each probing; if it is not, the record starts
    anew. Probings may be of checkpoints that were given: their names are then stored as ``step_names (C,)``, and
    ``steps`` are their places.
    """

    name = "saturation"
    question = "When in training are the choices settled?"
    needs = frozenset({Need.CHOICES})

    def __init__(self) -> None:
        super().__init__()
        self._step = 0
        self._earlier: dict[str, np.ndarray] = {}
        self._past: dict[int, np.ndarray] = {}  # choices by layer
        self._name = ""

    def begin(self, step: int, earlier: Arrays, name: str = "") -> None:
        """Take over the choices of the probings before ``step``, thinned where they are many.

        Args:
            step: Of this probing.
            earlier: Arrays of the probing before, or of checkpoints as :func:`joined`.
            name: What this probing is called, where it is of a checkpoint.
        """
        self._step, self._earlier, self._name = step, {}, name
        if "steps" not in earlier or "token_ids" not in earlier:
            return
        choices, steps = by_layer(earlier, "topk_index"), earlier["steps"]
        kept = np.flatnonzero(steps < step)
        size = sum(value[0].nbytes for value in choices.values() if len(value))
        limit = max(3, min(MOST_PROBINGS, MOST_BYTES // max(size, 1)))
        while len(kept) + 1 > limit:
            gap = steps[kept][2:] - steps[kept][:-2]  # that the removal of one would leave; the two ends stay
            kept = np.delete(kept, 1 + int(np.argmin(gap)))
        self._earlier = {"steps": steps[kept], "token_ids": earlier["token_ids"]}
        if "step_names" in earlier:
            self._earlier["step_names"] = earlier["step_names"][kept]
        self._past = {layer: value[kept] for layer, value in choices.items() if len(value)}

    def update(self, view: LayerView) -> None:
        """Compare a layer's choices with those of the probings before."""
        if view.routing is None or view.text is None:
            return
        if "token_ids" not in self.arrays:
            ids = view.text.token_ids.cpu().numpy()
            if self._earlier and not np.array_equal(self._earlier["token_ids"], ids):
                self._earlier = {}
            before = self._earlier.get("steps", np.zeros(0, np.int64))
            self.arrays |= {"token_ids": ids, "steps": np.append(before, self._step).astype(np.int64)}
            if self._name:
                names = [*self._earlier.get("step_names", ()), self._name]
                self.arrays["step_names"] = np.array(names, dtype=np.str_)
        now = np.sort(assignments(view), axis=1).astype(np.int16)  # (T, K)
        if view.routing.ragged:  # the busiest token has more experts at one probing than at another
            now = np.pad(now, ((0, 0), (view.num_experts - now.shape[1], 0)), constant_values=NONE)
        past = self._past.get(view.index) if self._earlier else None
        if past is None or past.shape[1:] != now.shape:
            past = np.full((len(self.arrays["steps"]) - 1, *now.shape), UNKNOWN, np.int16)
        every = np.concatenate([past, now[None]])  # (C, T, K)
        self.put("topk_index", view.index, every)
        self.put("saturation", view.index, overlap(every, now))
        self.put("saturation_previous", view.index, np.append(np.nan, overlap(every[:-1], every[1:])))
        self.put("saturation_random", view.index, (now != NONE).mean(axis=0).sum() / view.num_experts)
        if len(every) > 1:
            units = units_of(view.text, len(now))
            same, had = common(every[-2], now).astype(np.float64), (now != NONE).sum(axis=1).astype(np.float64)
            rest = units.means_without(same) / np.maximum(units.means_without(had), 1e-12)
            rest = np.where((every[-2] == UNKNOWN).any(), np.nan, rest)
            self.arrays |= units.arrays()
            self.put(f"previous{WITHOUT}", view.index, rest)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """The step from which most choices are as they are now."""
        saturation = by_layer(arrays, "saturation")
        if not saturation:
            return ProbeResult(arrays, notes=["no layer has experts and text: there are no choices to follow"])
        steps = arrays["steps"]
        if len(steps) < 2:
            return ProbeResult(arrays, notes=["probed once: choices can be compared from the second probing on"])
        called = [f"step {step}" for step in steps]
        if "step_names" in arrays:
            called = [f"checkpoint {name}" for name in arrays["step_names"]]
        blind = float(np.mean(list(numbers(arrays, "saturation_random").values())))
        first = finite({layer: float(v[0]) for layer, v in saturation.items()})
        previous = finite({layer: float(v[-1]) for layer, v in by_layer(arrays, "saturation_previous").items()})
        scalars = per_layer("first_to_now", first) | per_layer("previous_to_now", previous)
        headlines = {}
        known = np.stack(list(saturation.values()))  # (layers, C): no width of a layer is in it
        known = known[np.isfinite(known).all(axis=1)]
        if len(known) and steps[-1] > 0:
            settled = known.mean(axis=0) >= SETTLED
            start = len(settled) - int(np.argmin(settled[::-1])) if not settled.all() else 0
            value = float(steps[start] / steps[-1])
            until = f"of {len(steps)} given" if "step_names" in arrays else f"of {steps[-1]}"
            when = f"{called[start]} {until} on"
            when += "" if "step_names" in arrays else f", {value:.0%} of the training so far"
            found = f"{SETTLED:.0%} of the experts that tokens go to now were chosen from {when}"
            if start == len(steps) - 1:
                found = f"At no probing before were {SETTLED:.0%} of the experts chosen that tokens go to now"
            headlines["settled_at"] = Headline(
                value,
                f"{found}; choices at random agree in {blind:.0%}.",
                no_interval="no interval, as it is one of few steps",
            )
        if previous:
            value = scalars["previous_to_now"]
            headlines["previous_to_now"] = Headline(
                value,
                f"{value:.0%} of the choices are as at {called[-2]}, the probing before; {blind:.0%} by chance.",
                interval_of(arrays, "previous", value, previous, SHARE),
            )
        return ProbeResult(
            arrays, scalars, headlines, {"over_steps": partial(_draw, arrays)}, unit_notes(arrays, headlines)
        )


def joined(probings: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """What probings of single checkpoints stored, in order, as :meth:`Saturation.begin` takes it.

    Of a layer whose choices have another shape in one of them than in the last, that one's are unknown.
    """
    if not probings:
        return {}
    every = [by_layer(arrays, "topk_index") for arrays in probings]
    found = {"steps": np.arange(len(every)), "token_ids": probings[0]["token_ids"]}
    found["step_names"] = np.array([str(arrays["step_names"][-1]) for arrays in probings], dtype=np.str_)
    for layer, last in every[-1].items():
        unknown = np.full_like(last[-1], UNKNOWN)
        alike = [known[layer][-1] if layer in known else unknown for known in every]
        stacked = [one if one.shape == unknown.shape else unknown for one in alike]
        found[f"topk_index/{layer}"] = np.stack(stacked)
    return found


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """∣one ∩ other∣ over ∣other∣, summed over tokens, for choices (..., T, K): (...); NaN where they are unknown."""
    shared = common(one, other).sum(axis=-1, dtype=np.int64)
    unknown = (one[..., :1, 0] == UNKNOWN).any(axis=-1) | (other[..., :1, 0] == UNKNOWN).any(axis=-1)
    return np.where(unknown, np.nan, shared / np.maximum((other != NONE).sum(axis=(-2, -1)), 1))


def common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """∣one ∩ other∣ of each token, for choices (..., T, K): (..., T)."""
    shape = np.broadcast_shapes(one.shape, other.shape)
    found = np.zeros(shape[:-1], np.uint16)
    for a in range(shape[-1]):  # a choice at a time, so that what is compared runs over tokens
        for b in range(shape[-1]):
            found += (one[..., a] == other[..., b]) & (other[..., b] != NONE)
    return found


def _draw(arrays: Arrays) -> Figure:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    from probes.figures import drawing

    steps, random = arrays["steps"], by_layer(arrays, "saturation_random")
    fig = drawing.new_figure(11.0, 3.9, "How many of a token's experts are the same at two probings? A line a layer")
    axes = fig.subplots(1, 2, sharey=True)
    labels = {"saturation": "as at the last probing", "saturation_previous": "as at the probing before"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        series = by_layer(arrays, key)
        norm, colours = Normalize(min(series), max(max(series), min(series) + 1)), colormaps["viridis"]
        few = len(series) <= 5
        for number, (layer, values) in enumerate(series.items()):
            colour = drawing.SERIES[number] if few else colours(0.95 * float(norm(layer)))
            ax.plot(steps, values, color=colour, marker="o", ms=3, lw=1.3, label=f"layer {layer}" if few else None)
        for value in sorted({round(float(value), 6) for value in random.values()}):
            ax.axhline(value, color=drawing.MUTED, ls="--", lw=1, label="chance, K/E")
        drawing.style_axes(ax)
        ax.set_xlim(axes[0].get_xlim())  # the first probing has none before it
        ax.set_xlabel("checkpoint" if "step_names" in arrays else "optimizer step", fontsize=9)
        if "step_names" in arrays:
            ax.set_xticks(steps, arrays["step_names"], fontsize=8, rotation=20, ha="right")
        ax.set_ylim(0, 1.04)
        ax.set_title(label, fontsize=10)
    axes[0].set_ylabel("share of a token's experts", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    if not few:
        from matplotlib.cm import ScalarMappable

        drawing.colour_bar(fig, ScalarMappable(norm, colours.resampled(256)), list(axes), "layer")
    return fig
