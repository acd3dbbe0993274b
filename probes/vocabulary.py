"""Vocabulary specialisation: does an expert own token ids? (OLMoE, arXiv 2409.02060, section 5)

T tokens, E experts, K experts per token, V ids that are seen often enough.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.figures.specialised_tokens import draw_tokens, write_tokens
from probes.measures.choices import NONE, assignments
from probes.measures.expert_matrices import num_experts
from probes.measures.resampling import LARGEST, unit_notes
from probes.measures.words import keep_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEN_AT_LEAST = 10
TOP_IDS = 10
SEED = 20240903
KINDS = {"input": "the token itself", "target": "the token that follows", "predicted": "the token predicted"}
Layers = dict[int, np.ndarray]


class Vocabulary(Probe):
    """The largest share that one expert takes of an id's routings (tokens of the id times K), as OLMoE defines it.

    It lies between 1/E and 1/K: the id's tokens all go to the same K experts. Ids seen at least 10 times count, each
    once. Stored for each layer and for ``input``, ``target``, ``predicted`` (which needs the model's head):
    ``vocab_specialisation``, mean over ids; ``vocab_shuffled``, the same with the ids shuffled over the tokens, as the
    largest of finite counts is above 1/E without any meaning; ``top_ids``, ``top_shares (E, 10)``, the ids of which an
    expert takes most, -1 and 0 after the last. Stored for each layer: ``num_experts_per_tok``. Stored once for each
    kind: ``ids_<kind>``, ``seen_<kind> (V,)``; ``text_ids``, ``text_of_ids``, what the ids in the text say, where it is
    known, and ``text_ids_predicted``, ``text_of_ids_predicted``, what the predicted ones do.
    """

    name = "vocabulary"
    question = "Do experts own token ids?"
    needs = frozenset({Need.CHOICES})
    wants = frozenset({Need.PREDICTIONS})

    def update(self, view: LayerView) -> None:
        """Keep a layer's choices: what the tokens are sorted by is known when the last layer has passed."""
        if view.routing is None or view.text is None:
            return
        self._keep_text(view.text)
        self.put("choice", view.index, assignments(view).astype(np.int16))
        self.put("num_experts_per_tok", view.index, view.num_experts_per_tok)
        self.put("num_experts", view.index, view.num_experts)

    def update_head(self, head: HeadView) -> None:
        """Keep what was predicted."""
        self.arrays["predicted"] = head.predicted.cpu().numpy()
        keep_words(self.arrays, head.text, self.arrays["predicted"].tolist(), "text_ids_predicted")

    def compute(self) -> ProbeResult:
        """The result: routings counted by id, in every layer."""
        choices = by_layer(self.arrays, "choice")
        of_kind = {kind: self.arrays.pop(kind) for kind in KINDS if kind in self.arrays}
        for kind, ids in of_kind.items() if choices else ():
            self._measure(kind, ids, choices, num_experts(self.arrays))
        self.drop("choice")
        return self.describe(self.arrays)

    def _keep_text(self, text: ProbeText) -> None:
        """Keep the token itself and the one that follows; ``compute`` sorts the tokens by them."""
        if "input" in self.arrays:
            return
        self.arrays |= {"input": text.token_ids.cpu().numpy(), "target": text.targets.cpu().numpy()}
        keep_words(self.arrays, text, self.arrays["input"].tolist())

    def _measure(self, kind: str, of_token: np.ndarray, choices: Layers, experts: dict[int, int]) -> None:
        every, slot, seen = np.unique(of_token, return_inverse=True, return_counts=True)
        often = (seen >= SEEN_AT_LEAST) & (every >= 0)
        ids = every[often]
        self.arrays |= {f"ids_{kind}": ids, f"seen_{kind}": seen[often]}
        if not len(ids):
            return
        valid = np.flatnonzero(of_token >= 0)
        order = np.random.default_rng(SEED).permutation(valid)
        number = np.where(often, often.cumsum() - 1, -1)[slot]  # (T,) which of the V ids, or -1
        frequency = 1e-6 * (seen[often] / seen[often].max())[:, None]  # (V, 1)
        for layer, choice in choices.items():
            count, shuffled = (
                _counts(number[valid], choice[tokens], len(ids), experts[layer]) for tokens in (valid, order)
            )
            share, shuffled = _shares(count), _shares(shuffled)
            # Among equal shares, that of the more frequent id tells more.
            top = np.argsort(-(share + frequency), axis=0, kind="stable")[:TOP_IDS].T  # (E, 10)
            top_share = np.take_along_axis(share.T, top, axis=1)
            missing = max(TOP_IDS - top.shape[1], 0)
            named = np.where(top_share > 0, ids[top], -1)
            self.put("vocab_specialisation", layer, share.max(axis=1).mean(), kind)
            self.put("vocab_shuffled", layer, shuffled.max(axis=1).mean(), kind)
            self.put("top_ids", layer, np.pad(named, ((0, 0), (0, missing)), constant_values=-1), kind)
            self.put("top_shares", layer, np.pad(top_share, ((0, 0), (0, missing))), kind)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Specialisation beside that of shuffled ids, and each expert's own tokens."""
        measured, shuffled = (
            {kind: found for kind in KINDS if (found := numbers(arrays, key, kind))}
            for key in ("vocab_specialisation", "vocab_shuffled")
        )
        if not measured:
            why = f"no layer has experts and a text in which an id is seen {SEEN_AT_LEAST} times"
            return ProbeResult(arrays, notes=[why])
        most = float(np.mean([1 / count for count in numbers(arrays, "num_experts_per_tok").values()]))
        scalars: dict[str, float] = {}
        headlines = {}
        for kind, label in KINDS.items():
            if kind not in measured:
                continue
            quantity = f"specialisation_{kind}"
            blind = per_layer(f"{quantity}_shuffled", shuffled[kind])
            scalars |= per_layer(quantity, measured[kind]) | blind
            value = scalars[quantity]
            sentence = (
                f"Sorted by {label}, one expert takes {value:.1%} of an id's routings on average; "
                f"{blind[f'{quantity}_shuffled']:.1%} if ids meant nothing, {most:.0%} at most."
            )
            headlines[quantity] = Headline(value, sentence, no_interval=LARGEST)
        return ProbeResult(
            arrays,
            scalars,
            headlines,
            {
                "over_depth": partial(_draw_over_depth, measured, shuffled),
                "specialised_tokens": partial(draw_tokens, arrays, next(iter(measured)), KINDS),
            },
            unit_notes(arrays, headlines)
            + ([] if "predicted" in measured else ["what the model predicted is not known: input and target only"]),
            {"specialised_tokens": partial(write_tokens, arrays, KINDS)},
        )


def _counts(number: np.ndarray, choice: np.ndarray, ids: int, experts: int) -> np.ndarray:
    """How often each expert takes an id: (V, E), from tokens' id (T,), -1 for none, and choices (T, K), likewise."""
    known = (number[:, None] >= 0) & (choice != NONE)
    cell = (number[:, None] * experts + choice)[known]
    return np.bincount(cell, minlength=ids * experts).reshape(ids, experts)


def _shares(count: np.ndarray) -> np.ndarray:
    """Share of each id's routings that each expert takes, from counts (V, E)."""
    return count / count.sum(axis=1, keepdims=True).clip(min=1)


def _draw_over_depth(measured: dict[str, dict[int, float]], shuffled: dict[str, dict[int, float]]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(7.5, 3.8, "Largest share of a token id's routings that one expert takes, mean over ids")
    ax = fig.subplots()
    for (kind, layers), colour in zip(measured.items(), drawing.SERIES, strict=False):
        drawing.depth_line(ax, layers, colour, f"by {KINDS[kind]}")
        drawing.depth_line(ax, shuffled[kind], colour, "the same, ids shuffled", dashed=True)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("share", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
