"""Vocabulary specialisation: does an expert own token ids? (OLMoE, arXiv 2409.02060, section 5)

T tokens, E experts, K experts per token, V ids that are seen often enough.
"""

from __future__ import annotations

from functools import partial
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.measures.choices import NONE, assignments, by_part, first_middle_last
from probes.measures.resampling import LARGEST, unit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEN_AT_LEAST = 10
TOP_IDS = 10
DRAWN_EXPERTS, DRAWN_IDS, DRAWN_LETTERS = 16, 5, 8  # in the image, which is smaller than the page
SHOWN_EXPERTS = 64
SEED = 20240903
_PAGE_STYLE = """.own { display: inline-block; margin: 1px 12px 1px 0; color: #6b7785; }
.own code { background: #f5f7fa; color: #1f2933; padding: 0 3px; white-space: pre; }"""
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
    known.
    """

    name = "vocabulary"
    question = "Do experts own token ids?"
    needs = frozenset({Need.ROUTING, Need.PREDICTIONS})

    def update(self, view: LayerView) -> None:
        """Keep a layer's choices: what the tokens are sorted by is known when the last layer has passed."""
        if view.routing is None or view.text is None:
            return
        self._keep_text(view.text)
        self.arrays[f"choice/{view.index}"] = assignments(view).astype(np.int16)
        self.arrays[f"num_experts_per_tok/{view.index}"] = np.asarray(view.num_experts_per_tok, np.int64)
        self.arrays[f"num_experts/{view.index}"] = np.asarray(view.num_experts, np.int64)

    def update_head(self, head: HeadView) -> None:
        """Keep what was predicted."""
        self.arrays["predicted"] = head.predicted.cpu().numpy()

    def compute(self) -> ProbeResult:
        """The result: routings counted by id, in every layer."""
        choices, experts = by_layer(self.arrays, "choice"), by_layer(self.arrays, "num_experts")
        of_kind = {kind: self.arrays.pop(kind) for kind in KINDS if kind in self.arrays}
        for kind, ids in of_kind.items() if choices else ():
            self._measure(kind, ids, choices, {layer: int(count) for layer, count in experts.items()})
        for layer in choices:
            del self.arrays[f"choice/{layer}"]
        return self.describe(self.arrays)

    def _keep_text(self, text: ProbeText) -> None:
        """Keep the token itself and the one that follows; ``compute`` sorts the tokens by them."""
        if "input" in self.arrays:
            return
        self.arrays |= {"input": text.token_ids.cpu().numpy(), "target": text.targets.cpu().numpy()}
        if len(text.token_text):
            ids, first = np.unique(self.arrays["input"], return_index=True)
            self.arrays["text_ids"] = ids
            self.arrays["text_of_ids"] = np.array([text.token_text[position] for position in first], dtype=np.str_)

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
            part = f"{layer}/{kind}"
            self.arrays |= {
                f"vocab_specialisation/{part}": np.asarray(share.max(axis=1).mean(), np.float32),
                f"vocab_shuffled/{part}": np.asarray(shuffled.max(axis=1).mean(), np.float32),
                f"top_ids/{part}": np.pad(named, ((0, 0), (0, missing)), constant_values=-1),
                f"top_shares/{part}": np.pad(top_share, ((0, 0), (0, missing))).astype(np.float32),
            }

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Specialisation beside that of shuffled ids, and each expert's own tokens."""
        measured, shuffled = by_part(arrays, "vocab_specialisation"), by_part(arrays, "vocab_shuffled")
        if not measured:
            why = f"no layer has experts and a text in which an id is seen {SEEN_AT_LEAST} times"
            return ProbeResult(arrays, notes=[why])
        chosen = by_layer(arrays, "num_experts_per_tok")
        most = float(np.mean([1 / int(count) for count in chosen.values()]))
        scalars: dict[str, float] = {}
        headlines = {}
        for kind, label in KINDS.items():
            if kind not in measured:
                continue
            quantity = f"specialisation_{kind}"
            scalars |= per_layer(quantity, {layer: float(value) for layer, value in measured[kind].items()})
            blind = per_layer(
                f"specialisation_{kind}_shuffled", {n: float(value) for n, value in shuffled[kind].items()}
            )
            scalars |= blind
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
                "specialised_tokens": partial(_draw_tokens, arrays, next(iter(measured))),
            },
            unit_notes(arrays, headlines)
            + ([] if "predicted" in measured else ["what the model predicted is not known: input and target only"]),
            {"specialised_tokens": partial(_write_tokens, arrays)},
        )


def _counts(number: np.ndarray, choice: np.ndarray, ids: int, experts: int) -> np.ndarray:
    """How often each expert takes an id: (V, E), from tokens' id (T,), -1 for none, and choices (T, K), likewise."""
    known = (number[:, None] >= 0) & (choice != NONE)
    cell = (number[:, None] * experts + choice)[known]
    return np.bincount(cell, minlength=ids * experts).reshape(ids, experts)


def _shares(count: np.ndarray) -> np.ndarray:
    """Share of each id's routings that each expert takes, from counts (V, E)."""
    return count / count.sum(axis=1, keepdims=True).clip(min=1)


def _draw_over_depth(measured: dict[str, Layers], shuffled: dict[str, Layers]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(7.5, 3.8, "Largest share of a token id's routings that one expert takes, mean over ids")
    ax = fig.subplots()
    for (kind, layers), colour in zip(measured.items(), drawing.SERIES, strict=False):
        drawing.depth_line(ax, {layer: float(value) for layer, value in layers.items()}, colour, f"by {KINDS[kind]}")
        blind = {layer: float(value) for layer, value in shuffled[kind].items()}
        drawing.depth_line(ax, blind, colour, "the same, ids shuffled", dashed=True)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("share", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def _draw_tokens(arrays: Arrays, kind: str) -> Figure:
    """The page's first table of each layer as an image: a line an expert, a column a layer."""
    from probes.figures import drawing

    words = _words_of(arrays)
    ids, shares = by_part(arrays, "top_ids")[kind], by_part(arrays, "top_shares")[kind]
    layers = first_middle_last(list(ids))
    rows = min(DRAWN_EXPERTS, max(len(ids[layer]) for layer in layers))
    title = f"Ids of whose routings an expert takes most, sorted by {KINDS[kind]}, with the share it takes"
    fig = drawing.new_figure(max(7.5, 5.2 * len(layers)), 0.9 + 0.24 * rows, title)
    for ax, layer in zip(fig.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for row, expert in enumerate(drawing.pick(range(len(ids[layer])), DRAWN_EXPERTS)):
            own = zip(ids[layer][expert], shares[layer][expert], strict=True)
            said = [f"{_word(words, int(one))[:DRAWN_LETTERS]} {value:.0%}" for one, value in own if one >= 0]
            line = "   ".join(said[:DRAWN_IDS]) or "–"
            for place, text in ((0.0, str(expert)), (0.06, line)):
                ax.text(place, row, text, fontsize=7.5, family="monospace", va="center", color=drawing.INK,
                        parse_math=False, in_layout=False)  # fmt: skip
        ax.set_title(f"layer {layer}: expert, ids", fontsize=9, loc="left")
        ax.set_xlim(0, 1)
        ax.set_ylim(rows - 0.5, -0.5)
        ax.axis("off")
    return fig


def _words_of(arrays: Arrays) -> dict[int, str]:
    """What is known of the text of ids."""
    return dict(zip(arrays.get("text_ids", np.zeros(0)).tolist(), arrays.get("text_of_ids", ()), strict=True))


def _write_tokens(arrays: Arrays) -> str:
    """Tables: a row an expert, the tokens of which it takes most."""
    words = _words_of(arrays)
    ids, shares = by_part(arrays, "top_ids"), by_part(arrays, "top_shares")
    parts = [f"<style>{_PAGE_STYLE}</style>"]
    for kind in ids:
        for layer in first_middle_last(list(ids[kind])):
            rows = []
            for expert, (own, share) in enumerate(zip(ids[kind][layer], shares[kind][layer], strict=True)):
                if expert == SHOWN_EXPERTS:
                    rows.append(f'<tr><td colspan="2">… {len(ids[kind][layer]) - expert} more experts</td></tr>')
                    break
                cells = [
                    f'<span class="own" title="id {int(one)}"><code>{escape(_word(words, int(one)))}</code> '
                    f"{value:.0%}</span>"
                    for one, value in zip(own, share, strict=True)
                    if one >= 0
                ]
                rows.append(f"<tr><td>{expert}</td><td>{''.join(cells) or '–'}</td></tr>")
            head = "<tr><th>expert</th><th>ids of whose routings it takes most, with the share</th></tr>"
            opened = "" if len(parts) > 1 else " open"
            parts.append(
                f"<details{opened}><summary>layer {layer} <span>by {KINDS[kind]}</span></summary>"
                f"<table>{head}{''.join(rows)}</table></details>"
            )
    return "".join(parts)


def _word(words: dict[int, str], one: int) -> str:
    text = str(words.get(one, ""))
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") if text else f"#{one}"
