"""Expert lens: which words does an expert write, does it raise the token that follows, and is the first one enough?

What experts write goes into the residual stream, which the head reads in the end; so what they write can be read by the
head by itself, as words (a logit lens), and as what it adds to the logit of the token that follows (direct logit
attribution). With experts of rank 1 that is one vector an expert (2604.14434); an expert of width F writes in as many
directions, of which the mean is read here, so that the two are not comparable.

T tokens, B texts, E experts, K experts per token, H hidden, g an expert's weight as applied, γ the last norm's scale,
W_U the head's matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.machine.float64 import double
from moebed.model.config import ModelConfig
from moebed.views.intervention_words import ZERO
from moebed.views.interventions import Intervention, alone, assigned_weights, drop_top
from moebed.views.layer import ExpertKind, ExpertView, HeadView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.figures import lens as pictures
from probes.measures.choices import first_middle_last
from probes.measures.expert_matrices import num_experts
from probes.measures.expert_scores import calibration_texts
from probes.measures.ranks import EQUAL, correlation, rankable, ranks
from probes.measures.resampling import (
    SEED,
    Units,
    as_interval,
    interval_of,
    jackknife,
    keep,
    sequence_units,
    unit_notes,
    units_of,
    without,
)
from probes.measures.words import keep_words

TOP = 10  # words
ALL, HALVES = 0, (1, 2)  # of an expert's tokens: all, those of every other text, those of the rest
LISTS = "no interval, as lists of ten words change by steps"


class ExpertLens(Probe):
    """What each expert writes, as words and as what it adds to logits; its first choice beside all.

    Stored for each layer: ``lens_ids (E, 10)``, ``lens_gain (E, 10)``, the ids whose logits the mean of g·E(x) over an
    expert's tokens raises most over the mean of the layer's experts, and by how much, -1 and 0 for experts without
    tokens; ``lens_in_text (E,)``, how many of them occur in the text; ``lens_overlap (E,)``, how many are the same on
    either half of the texts, and ``lens_overlap_other (E,)``, of an expert's words on one half and the others' of its
    layer on the other half; NaN where one has no tokens. Sums over the texts' predicted tokens ``dla_target (B, E)``,
    what g·E(x) adds to the logit of the token that follows, g (E(x) ⊙ γ)·W_U[y] / rms of the stream at its end;
    ``dla_shuffled (B, E)``, the same to one that follows elsewhere in the text, which takes away what raises all;
    ``lens_tokens (B, E)``. ``top1_cos_output``, mean over tokens of the cosine of the first choice's part with the sum
    of all; ``top1_cos_sizes``, what that would be were the parts at right angles; ``top1_cos_residual``, of the
    residual stream after the layer with the first choice alone and with all, which is near 1 in any model, as most of
    it is neither's. Of the first, the middle and the last layer ``cause_rho``, Spearman's rho over tokens of what the
    first choice adds to the logit of the token that follows and of the rise of its loss without that expert (its output
    0, at that token alone), and ``cause_rho_shuffled``, with what it adds to one that follows elsewhere. Stored once:
    ``lens_domain (B,)``; ``lens_predicted (B,)``, tokens that another one follows; ``text_ids``, ``text_of_ids``, what
    these words' ids say, where a tokenizer tells.
    """

    name = "expert_lens"
    question = "What do experts write into the residual stream?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS, Need.PREDICTIONS, Need.ATTRIBUTION})

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """What each expert of a token adds to two logits, while the pass goes on."""
        return 0 if layer is None else 10 * config.layer(layer).num_experts_per_tok

    def interventions(self, config: ModelConfig) -> Sequence[Intervention]:
        """The first choice's output 0, in three layers."""
        several = [layer for layer in config.moe_layers if config.layer(layer).num_experts_per_tok > 1]
        return [_without_first(layer) for layer in first_middle_last(several)]

    def begin_layer(self, view: LayerView) -> None:
        """Sums of this layer."""
        self._sums: _Written | None = None
        if view.routing is not None and view.text is not None and view.attribution is not None and view.num_experts:
            self._sums = _Written(view)

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """See what one expert made of every token."""
        if self._sums is not None and expert.kind is ExpertKind.ROUTED:
            self._sums.add(expert)

    def update(self, view: LayerView) -> None:
        """Keep one layer's."""
        if self._sums is None or view.text is None or view.moe_output is None:
            return
        sums, self._sums = self._sums, None
        for key, value in sums.found(view).items():
            self.put(key, view.index, value)
        units = units_of(view.text, len(sums.weight))
        for key, of_token in sums.cosines(view).items():
            keep(self, key, view.index, of_token.mean(), units.means_without(of_token))
        self.arrays |= units.arrays()
        self.put("num_experts", view.index, view.num_experts)

    def update_head(self, head: HeadView) -> None:
        """Read what was written, and what the loss becomes without the first choice."""
        layers = by_layer(self.arrays, "written_dla")
        if not layers or head.rms is None or head.words is None:
            return
        text, rms = head.text, head.rms.cpu().numpy()
        sequence, known = text.sequence.cpu().numpy(), text.targets.cpu().numpy() >= 0
        self.arrays["lens_domain"] = text.domain.cpu().numpy()
        self.arrays["lens_predicted"] = np.bincount(sequence[known], minlength=len(text.domain))
        choices = by_layer(self.arrays, "written_choice")
        dla = {n: of / rms[None, :, None] for n, of in layers.items()}  # (2, T, K)
        for n, added in dla.items():
            experts, chosen = num_experts(self.arrays)[n], (choices[n] >= 0) & known[:, None]
            cell = (sequence[:, None] * experts + choices[n])[chosen]
            for key, values in zip(("dla_target", "dla_shuffled", "lens_tokens"), (*added, chosen), strict=True):
                sums = np.bincount(cell, values[chosen], len(text.domain) * experts)
                self.put(key, n, sums.reshape(len(text.domain), experts))
        self._read_words(head)
        self._compare(head, dla, known)

    def _read_words(self, head: HeadView) -> None:
        """All layers' rows through the head at a time."""
        assert head.words is not None
        wrote = {n: _with_all(of) for n, of in by_layer(self.arrays, "written_sum").items()}  # (3, E, H) by layer
        counts = {n: _with_all(of) for n, of in by_layer(self.arrays, "written_count").items()}  # (3, E)
        rows, groups = [], []
        for at, (n, sums) in enumerate(wrote.items()):
            part, expert = np.nonzero(counts[n])  # those of any token
            rows.append(sums[part, expert] / counts[n][part, expert, None])
            groups.append(3 * at + part)
        # Of a layer and part of the text without any token nothing is a group.
        group = np.unique(np.concatenate(groups), return_inverse=True)[1]
        said = head.words(torch.from_numpy(np.concatenate(rows).astype(np.float32)), torch.from_numpy(group), TOP)
        start, in_text = 0, head.text.token_ids.cpu().numpy()
        for n in wrote:
            used = counts[n] > 0
            ids, gain = np.full((*used.shape, said.ids.shape[1]), -1), np.zeros((*used.shape, said.ids.shape[1]))
            stop = start + int(used.sum())
            ids[used], gain[used] = said.ids[start:stop].numpy(), said.gain[start:stop].numpy()
            start = stop
            self.put("lens_ids", n, ids[ALL])
            self.put("lens_gain", n, gain[ALL])
            self.put("lens_in_text", n, np.where(used[ALL], np.isin(ids[ALL], in_text).sum(axis=1), np.nan))
            same, other = _overlaps(*(ids[half] for half in HALVES), *(used[half] for half in HALVES))
            self.put("lens_overlap", n, same)
            self.put("lens_overlap_other", n, other)
        named = np.concatenate([of.ravel() for of in by_layer(self.arrays, "lens_ids").values()])
        keep_words(self.arrays, head.text, named[named >= 0].tolist())

    def _compare(self, head: HeadView, dla: dict[int, np.ndarray], known: np.ndarray) -> None:
        """Does what the first choice adds tell what its loss costs?"""
        asked = {n: _without_first(n) for n in first_middle_last([n for n, of in dla.items() if of.shape[2] > 1])}
        if not asked or head.under is None:
            return
        rises = head.under(list(asked.values()))
        units = units_of(head.text, len(known))
        for n, one in asked.items():
            rise = double(rises[one.name]).cpu().numpy()
            taken = known & np.isfinite(rise)
            for key, added in zip(("cause_rho", "cause_rho_shuffled"), dla[n][:, :, 0], strict=True):
                rho = [_rho(added[some], rise[some]) for some in (taken, *_leaving_out(units, taken))]
                keep(self, key, n, rho[0], np.array(rho[1:]))

    def compute(self) -> ProbeResult:
        """The result; what was kept for the head goes."""
        for key in ("written_dla", "written_choice", "written_sum", "written_count"):
            self.drop(key)
        return self.describe(self.arrays)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Words, attributions beside shuffled ones, and cosines over depth."""
        cosines = {key: numbers(arrays, key) for key in ("top1_cos_output", "top1_cos_sizes", "top1_cos_residual")}
        if not cosines["top1_cos_output"]:
            return ProbeResult(arrays, notes=["no layer with routed experts has seen text"])
        scalars: dict[str, float] = {}
        for key, values in cosines.items():
            scalars |= per_layer(key, values)
        value, sizes = scalars["top1_cos_output"], scalars["top1_cos_sizes"]
        headlines = {
            "top1_cos_output": Headline(
                value,
                f"What a token's first expert writes has cosine {value:.2f} with the sum of all its experts; "
                f"{sizes:.2f} if they wrote at right angles, with the sizes that they have.",
                interval_of(arrays, "top1_cos_output", value, within=(-1.0, 1.0)),
            ),
            "top1_cos_residual": Headline(
                scalars["top1_cos_residual"],
                f"The residual stream after a layer has cosine {scalars['top1_cos_residual']:.3f} with what it is by "
                "the first expert alone, which is near 1 in any model.",
                interval_of(arrays, "top1_cos_residual", scalars["top1_cos_residual"], within=(-1.0, 1.0)),
            ),
        }
        figures = {"over_depth": partial(pictures.draw_over_depth, arrays, cosines)}
        if by_layer(arrays, "lens_ids"):
            added = _added(arrays)
            scalars |= {f"dla_{kind}": float(of[0]) for kind, of in added.items()}
            headlines |= {
                "dla_specific": _attributed(arrays, added),
                **_words(arrays, scalars),
                **_caused(arrays, scalars),
            }
            figures["words"] = partial(pictures.draw_words, arrays)
        notes = unit_notes(arrays, headlines)
        notes.append(
            "what the loss becomes by the first expert alone: --intervene 'keep_top 1'. Published of DeepSeekMoE, with "
            "1 expert for 6: cosines of up to .95 over 27 layers, perplexity 5 % higher (2603.05806; second hand, and "
            "of which states the cosines are is not known)"
        )
        return ProbeResult(arrays, scalars, headlines, figures, notes)


class _Written:
    """What the experts of one layer write, as one after another is seen."""

    def __init__(self, view: LayerView) -> None:
        assert view.routing is not None
        assert view.text is not None
        assert view.attribution is not None
        assert view.moe_input is not None
        device = view.moe_input.device
        self._attribution = view.attribution
        self.weight = assigned_weights(view.routing)  # (T, E)
        self._first = self.weight.argmax(dim=1)
        first_half = torch.from_numpy(~calibration_texts(view.text.domain.cpu().numpy()))
        self._half = first_half[view.text.sequence.cpu()].to(device)  # (T,)
        rows = view.attribution.following.of_token.to(device)
        self._rows = torch.stack([rows, _elsewhere(rows)])  # (2, T)
        tokens, experts = self.weight.shape
        self._sum = torch.zeros(2, experts, view.moe_input.shape[1], dtype=torch.float64)  # of each half
        self._count = np.zeros((2, experts), np.int64)
        self._dla = self.weight.new_zeros(2, tokens, experts)
        self._total, self._by_first = torch.zeros_like(view.moe_input), torch.zeros_like(view.moe_input)
        self._energy = self.weight.new_zeros(tokens)  # of the parts, each by itself

    def add(self, expert: ExpertView) -> None:
        """See what one expert made of every token."""
        tokens = torch.where(self.weight[:, expert.index] != 0)[0]
        written = expert.output[tokens] * self.weight[tokens, expert.index, None]
        half = self._half[tokens]
        for part, some in enumerate((half, ~half)):
            self._sum[part, expert.index] = double(written[some]).sum(dim=0).cpu()
            self._count[part, expert.index] = len(written[some])
        self._total[tokens] += written
        self._energy[tokens] += written.square().sum(dim=1)
        mine = self._first[tokens] == expert.index
        self._by_first[tokens[mine]] = written[mine]
        for kind, rows in enumerate(self._rows):
            known = rows[tokens] >= 0
            self._dla[kind, tokens[known], expert.index] = self._attribution.toward(written[known], rows[tokens[known]])

    def found(self, view: LayerView) -> dict[str, np.ndarray]:
        """What is kept until the head is there: sums, and (2, T, K) of each token's experts in order of weight."""
        assert view.moe_output is not None
        most = max(1, int((self.weight != 0).sum(dim=1).max()))
        weight, choice = self.weight.sort(dim=1, descending=True, stable=True)
        choice = choice[:, :most]
        held = self._attribution.held(view.moe_output)  # (T,)
        dla = self._dla.gather(2, choice.expand(2, -1, -1)) / held[:, None]
        index = choice.masked_fill(weight[:, :most] == 0, -1)
        return {
            "written_dla": dla.float().cpu().numpy(),
            "written_choice": index.cpu().numpy().astype(np.int16),
            "written_sum": self._sum.float().numpy(),
            "written_count": self._count,
        }

    def cosines(self, view: LayerView) -> dict[str, np.ndarray]:
        """Of the first choice with all, by token (T,)."""
        assert view.moe_output is not None
        assert view.leave is not None
        beside = view.moe_output - self._total  # the shared expert's, and adapters'
        sizes = torch.linalg.vector_norm(self._by_first, dim=1) / self._energy.sqrt().clamp_min(1e-30)
        found = {
            "top1_cos_output": F.cosine_similarity(self._by_first, self._total, dim=1),
            "top1_cos_sizes": sizes,
            "top1_cos_residual": F.cosine_similarity(
                view.leave(self._by_first + beside), view.leave(view.moe_output), dim=1
            ),
        }
        return {key: value.cpu().numpy().astype(np.float64) for key, value in found.items()}


def _with_all(halves: np.ndarray) -> np.ndarray:
    """Sums of all tokens (3, ...) before those of either half (2, ...)."""
    return np.concatenate([halves.sum(axis=0, keepdims=True), halves])


def _without_first(layer: int) -> Intervention:
    return alone(drop_top(1, ZERO, [layer]))


def _elsewhere(rows: Tensor) -> Tensor:
    """Rows (T,) of the head of tokens that follow, each at another token that one follows."""
    known = torch.where(rows >= 0)[0]
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(known))).to(rows.device)
    return rows.scatter(0, known, rows[known[order]])


def _overlaps(
    one: np.ndarray, other: np.ndarray, used_one: np.ndarray, used_other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Words that lists (E, n) share, each expert's with its own (E,) and, on average, with the others' (E,)."""
    shared = np.array([[len(np.intersect1d(a, b)) for b in other] for a in one], dtype=np.float64)  # (E, E)
    shared[~used_one] = np.nan
    shared[:, ~used_other] = np.nan
    same = np.diag(shared).copy()
    np.fill_diagonal(shared, np.nan)
    there = np.isfinite(shared)
    rest = np.where(there, shared, 0.0).sum(axis=1)
    return same, np.divide(rest, there.sum(axis=1), out=np.full(len(rest), np.nan), where=there.any(axis=1))


def _leaving_out(units: Units, taken: np.ndarray) -> list[np.ndarray]:
    """Tokens (T,) bool without each unit in turn; of none that is alone in its domain."""
    alone_in = np.bincount(units.stratum)[units.stratum] == 1
    return [taken & ((units.of_token != unit) | alone_in[unit]) for unit in range(len(units.stratum))]


def _rho(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho; NaN where one is all tied."""
    a, b = one[None].astype(np.float64), other[None].astype(np.float64)
    if a.shape[1] < 3 or not (rankable(a) & rankable(b))[0]:
        return float("nan")
    return float(correlation(ranks(a, within=EQUAL), ranks(b, within=EQUAL))[0])


def _added(arrays: Arrays) -> dict[str, np.ndarray]:
    """What a layer's experts add to a logit together, mean over tokens and layers: (1 + U,), first of all texts."""
    units = sequence_units(arrays["lens_domain"])
    found: dict[str, np.ndarray] = {}
    tokens = arrays["lens_predicted"].astype(np.float64)  # (B,)
    for kind in ("target", "shuffled"):
        total = np.mean([of.sum(axis=1, dtype=np.float64) for of in by_layer(arrays, f"dla_{kind}").values()], axis=0)
        both = units.sums(np.stack([total, tokens], axis=1))
        every = np.concatenate([both.sum(axis=0, keepdims=True), without(both, units.stratum)])
        found[kind] = every[:, 0] / np.maximum(every[:, 1], 1e-9)
    return found


def _attributed(arrays: Arrays, added: dict[str, np.ndarray]) -> Headline:
    specific = added["target"] - added["shuffled"]
    within = as_interval(jackknife(specific[0], specific[1:], sequence_units(arrays["lens_domain"]).stratum))
    chance = within is not None and within[0] <= 0 <= within[1]
    return Headline(
        float(specific[0]),
        f"A layer's experts add {added['target'][0]:+.3g} to the logit of the token that follows, and "
        f"{added['shuffled'][0]:+.3g} to one that follows elsewhere: {specific[0]:+.3g} for the token itself"
        + (", no more than texts differ by chance." if chance else "."),
        within,
    )


def _words(arrays: Arrays, scalars: dict[str, float]) -> dict[str, Headline]:
    """How far the words are the expert's own."""
    for key in ("lens_overlap", "lens_overlap_other", "lens_in_text"):
        values = np.concatenate(list(by_layer(arrays, key).values()))
        if np.isfinite(values).any():
            scalars[key] = float(np.nanmean(values))
    if "lens_overlap" not in scalars:
        return {}
    same, other = scalars["lens_overlap"], scalars.get("lens_overlap_other", np.nan)
    said = f"Of the {TOP} words that an expert raises most {same:.1f} are the same on other texts"
    said += f", {other:.1f} are another expert's" if np.isfinite(other) else ""
    said += f", and {scalars['lens_in_text']:.1f} occur in the text"
    said += ": they say nothing of the expert." if same <= other else "."
    return {"lens_overlap": Headline(same, said, no_interval=LISTS)}


def _caused(arrays: Arrays, scalars: dict[str, float]) -> dict[str, Headline]:
    """Does attribution tell what removal does?"""
    found = {n: value for n, value in numbers(arrays, "cause_rho").items() if np.isfinite(value)}
    if not found:
        return {}
    scalars |= per_layer("cause_rho", found)
    shuffled = [value for n, value in numbers(arrays, "cause_rho_shuffled").items() if n in found]
    scalars["cause_rho_shuffled"] = float(np.mean(shuffled))
    value = scalars["cause_rho"]
    said = (
        f"What a token's first expert adds to the logit of the token that follows and what the loss rises by without "
        f"that expert, there alone, have rank correlation {value:+.2f} in layers {', '.join(map(str, found))}; "
        f"{scalars['cause_rho_shuffled']:+.2f} with what it adds to one that follows elsewhere. Random weights show it "
        "too: it says how far the sum can be believed, not what was learned."
    )
    return {"cause_rho": Headline(value, said, interval_of(arrays, "cause_rho", value, found, (-1.0, 1.0)))}
