"""Routing ladder: what can a token's experts be predicted from, on texts that the predictor has not learned from?

From the token's position, its domain, its id, the one before, the one that follows, the experts of the layer before,
and hidden states of earlier layers. The layer's own input decides by definition, so that what a read-out makes of it is
a ceiling and no finding (2604.09780).

T tokens, B texts, E experts, K experts per token, R numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from moebed.model.config import ModelConfig
from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, per_layer
from probes.figures.ladder import draw_ladder
from probes.measures.choices import assignments, domain_arrays
from probes.measures.expert_matrices import num_experts
from probes.measures.held_out import (
    LEAST_TEXTS,
    Choices,
    Column,
    Features,
    Keys,
    Split,
    half_of,
    in_sample,
    pairs,
    split_of,
)
from probes.measures.resampling import SEED, Units, as_interval, jackknife, sequence_units, unit_notes, without
from probes.measures.sketch import compact, sketched

FEATURES = 128  # numbers of a hidden state that are kept of each token
MARGINAL, FLOOR, CEILING = "marginal", "floor", "input"
# Rungs, and what each predicts from; those of a row of NESTED know all that the ones before them know.
RUNGS = {
    "position": "its place in the text",
    "domain": "its domain",
    "token": "its id",
    "previous": "the id before it",
    "bigram": "its id and the one before",
    "target": "the id that follows",
    "bigram_domain": "ids and domain",
    "bigram_domain_position": "ids, domain and place",
    "layer_before": "its experts in the layer before",
    "input_first": "its input of the first layer with experts",
    "input_before": "its input of the layer before",
    CEILING: "its input of this layer, which decides: a ceiling",
}
NESTED = ("token", "bigram", "bigram_domain", "bigram_domain_position")
HEADLINES = ("position", "domain", "token", "bigram", "bigram_domain_position", "layer_before", "input_before")
FEW = f"experts are predicted in texts that were not learned from: that takes {LEAST_TEXTS} texts or more"
LEARNED = "no interval, as what is learned varies with the texts it is learned from, and others were not learned from"
ALL, HALF, SHUFFLED = "", "_half", "_shuffled"  # of all text; learned from half of it; choices shuffled over tokens
Losses = dict[str, np.ndarray]


class RoutingLadder(Probe):
    """Held-out losses of predictors of a token's experts, from what is known of it.

    A predictor gives each expert a probability; its loss at a token is the mean of −ln of those of the token's experts.
    It is learned on other texts (five folds), and smoothed by what is best on those. With ``marginal`` the experts'
    overall shares and ``floor``, ln K, what a predictor of the set has at least, the share explained is (marginal −
    loss) / (marginal − floor): 1 if it names the experts, below 0 if it misleads. Stored for each layer and rung:
    ``share ()``; ``recall ()``, share of a token's experts among the K most probable; ``loss_by_text (B,)``,
    ``recall_by_text (B,)``, sums over tokens, of ``marginal`` and ``floor`` as well; the same losses learned from the
    first half of each text, ``loss_half_by_text``, and of choices shuffled over all tokens, ``loss_shuffled_by_text``;
    ``in_sample/<layer>/bigram``, the share that counts of the very same text would claim. Stored once: ``seen_<rung>``,
    share of tokens whose key was in another fold; ``tokens (B,)``; ``domain (B,)``, ``domain_names``.

    Of hidden states at most 128 principal coordinates are kept, of which the ceiling says what they tell.
    """

    name = "routing_ladder"
    question = "What can routing be predicted from?"
    needs = frozenset({Need.ROUTING})

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """Coordinates of a hidden state, and logits."""
        return 0 if layer is None else 2 * (min(FEATURES, config.hidden_size) + config.layer(layer).num_experts)

    def update(self, view: LayerView) -> None:
        """Keep choices and input in short: what they are predicted from is known when the last layer has passed."""
        if view.routing is None or view.text is None or view.moe_input is None or view.num_experts < 2:
            return
        text = view.text
        if "token_ids" not in self.arrays:
            for key, value in (("token_ids", text.token_ids), ("targets", text.targets), ("position", text.position)):
                self.arrays[key] = value.cpu().numpy()
            self.arrays |= domain_arrays(text) | {"sequence": text.sequence.cpu().numpy()}
        self.put("choice", view.index, assignments(view).astype(np.int16))
        self.put("input", view.index, sketched(view.moe_input, FEATURES))
        logits = view.routing.router_logits.float()
        self.put("logits", view.index, compact(logits - logits.mean(dim=1, keepdim=True)))
        self.put("num_experts", view.index, view.num_experts)

    def compute(self) -> ProbeResult:
        """The result: every predictor in every layer."""
        choices, experts = by_layer(self.arrays, "choice"), num_experts(self.arrays)
        known = {key: self.arrays.pop(key) for key in ("token_ids", "targets", "position", "sequence") if choices}
        if choices:
            self._measure(
                {n: Choices(index.astype(np.int64), experts[n]) for n, index in choices.items()},
                by_layer(self.arrays, "input"),
                known,
            )
        for key in ("choice", "input", "logits"):
            self.drop(key)
        return self.describe(self.arrays)

    def _measure(self, choices: dict[int, Choices], inputs: dict[int, np.ndarray], text: Arrays) -> None:
        domain, sequence = self.arrays["domain"], text["sequence"]
        split = split_of(domain, sequence)
        self.arrays["tokens"] = np.bincount(sequence, minlength=len(domain))
        if split is None:
            return
        keys = _keys(text, domain)
        order = np.random.default_rng(SEED).permutation(len(sequence))
        half = half_of(split, text["position"], sequence)
        layers, logits = list(choices), by_layer(self.arrays, "logits")
        for at, layer in enumerate(layers):
            mine, features = choices[layer], {CEILING: inputs[layer]}
            if at:
                features |= {"input_first": inputs[layers[0]], "input_before": inputs[layers[at - 1]]}
            known = _Known(keys, choices[layers[at - 1]] if at else None, features, logits[layer])
            for variant, parts, shuffled in ((ALL, split, None), (HALF, half, None), (SHUFFLED, split, order)):
                for rung, losses, recalled in _predicted(known, parts, mine, shuffled):
                    self.put(f"loss{variant}_by_text", layer, np.bincount(sequence, losses, len(domain)), rung)
                    if variant == ALL:
                        self.put("recall_by_text", layer, np.bincount(sequence, recalled, len(domain)), rung)
            floor = np.log(np.maximum(mine.number, 1))
            self.put("loss_by_text", layer, np.bincount(sequence, floor, len(domain)), FLOOR)
            self._sum_up(layer, in_sample(keys["bigram"], mine).sum())
        for rung in keys:
            seen = Keys(keys[rung], split, choices[layers[0]]).seen.mean()
            self.arrays[f"seen_{rung}"] = np.asarray(seen, np.float32)

    def _sum_up(self, layer: int, memorised: float) -> None:
        losses = _losses(self.arrays, layer, ALL)
        for rung in losses.keys() - {MARGINAL, FLOOR}:
            self.put("share", layer, _share(losses, rung, self.arrays["tokens"][None] > 0)[0], rung)
        recalled, tokens = by_part(self.arrays, "recall_by_text"), self.arrays["tokens"].sum()
        for rung, layers in recalled.items():
            self.put("recall", layer, layers[layer].sum(dtype=np.float64) / tokens, rung)
        least, most = losses[FLOOR].sum(dtype=np.float64), losses[MARGINAL].sum(dtype=np.float64)
        self.put("in_sample", layer, (most - memorised) / (most - least) if most > least else np.nan, "bigram")

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Each rung over depth and on average, beside half the text, shuffled choices and the ceiling."""
        if not num_experts(arrays):
            return ProbeResult(arrays, notes=["no layer has two experts and text: there are no choices to predict"])
        if "share" not in {name.partition("/")[0] for name in arrays}:
            return ProbeResult(arrays, notes=[FEW])
        found = {rung: _summary(arrays, rung) for rung in RUNGS if by_layer(arrays, "share", rung)}
        found = {rung: row for rung, row in found.items() if row.layers}
        if not found:
            return ProbeResult(arrays, notes=["experts are shared evenly by all tokens: nothing is to be predicted"])
        scalars: dict[str, float] = {}
        for rung, row in found.items():
            scalars |= per_layer(f"share_{rung}", row.layers)
            scalars |= {f"share_{rung}_half": row.half, f"share_{rung}_shuffled": row.shuffled}
            scalars[f"recall_{rung}"] = _mean(by_layer(arrays, "recall", rung))
        scalars["share_bigram_in_sample"] = _mean(by_layer(arrays, "in_sample", "bigram"))
        scalars["recall_marginal"] = _mean(by_layer(arrays, "recall", MARGINAL))
        for lower, upper in zip(("", *NESTED), NESTED, strict=False):
            if upper in found:
                scalars[f"added_by_{upper}"] = found[upper].value - (found[lower].value if lower in found else 0.0)
        memorised = scalars["share_bigram_in_sample"]
        headlines = {f"share_{rung}": _headline(rung, found, memorised) for rung in HEADLINES if rung in found}
        headlines["recall_bigram"] = _recall(arrays, scalars)
        notes = unit_notes(arrays, headlines)
        notes.append(
            "beside: gpt-oss-20b's experts were recalled to 55 % from bigrams, to 81 % from features of a sparse "
            "autoencoder (RouterInterp; second hand)"
        )
        figures = {"ladder": partial(draw_ladder, found, RUNGS, CEILING)}
        return ProbeResult(arrays, scalars, headlines, figures, notes)


class Row(NamedTuple):
    """What a rung explains.

    Args:
        layers: Share explained by layer.
        value: Its mean.
        interval: 95 % of that, of what is learned from these very texts: too narrow for what others would teach.
        half: Mean where half the text was learned from.
        shuffled: Mean where choices are shuffled.
    """

    layers: dict[int, float]
    value: float
    interval: tuple[float, float] | None
    half: float
    shuffled: float

    @property
    def by_chance(self) -> bool:
        """Whether shuffled choices show as much, or no other text need show anything."""
        return self.value <= max(self.shuffled, 0.0) or (self.interval is not None and self.interval[0] <= 0)


class _Known(NamedTuple):
    """What is known of tokens.

    Args:
        keys: (T,) by name.
        before: Experts of the layer before, if there is one.
        features: Hidden states (T, R) by rung.
        logits: (T, E) of the router, which are no predictor, but what hidden states are to predict as well.
    """

    keys: dict[str, np.ndarray]
    before: Choices | None
    features: dict[str, np.ndarray]
    logits: np.ndarray


def _keys(text: Arrays, domain: np.ndarray) -> dict[str, np.ndarray]:
    """What tokens (T,) are sorted by."""
    ids, position, sequence = text["token_ids"], text["position"], text["sequence"]
    previous = np.where(position > 0, np.roll(ids, 1), -1)
    found = {
        "octave": np.frexp(position + 1)[1].astype(np.int64),
        "position": position,
        "token": ids,
        "previous": previous,
        "bigram": pairs(previous, ids),
        "target": text["targets"],
    }
    return found | ({"domain": domain[sequence]} if len(np.unique(domain[sequence])) > 1 else {})


def _predicted(
    known: _Known, split: Split, choices: Choices, order: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Losses and recall (T,) of every rung, each token's learned from other texts; of those in an order, if given."""
    logits = known.logits if order is None else known.logits[order]
    choices = choices if order is None else choices.taken(order)
    keys = {name: Keys(key, split, choices) for name, key in known.keys.items()}
    targets = ((choices.share > 0), logits)
    features = {name: Features(of, split, *targets) for name, of in known.features.items()}
    found: dict[str, np.ndarray] = {}
    for fold in range(split.folds):
        mine = np.flatnonzero(split.fold == fold)
        some = choices.taken(mine)
        for rung, logs in _column(Column(fold, split, choices), keys, features, known.before, split, choices):
            both = found.setdefault(rung, np.zeros((2, len(split.fold))))
            both[:, mine] = some.loss(logs[mine]), some.recall(logs[mine])
    yield from ((rung, *both) for rung, both in found.items())


def _column(
    column: Column,
    keys: dict[str, Keys],
    features: dict[str, Features],
    before: Choices | None,
    split: Split,
    choices: Choices,
) -> Iterator[tuple[str, np.ndarray]]:
    """The same of one fold."""
    base = column.marginal
    yield MARGINAL, base
    place = column.by_key(keys["position"], column.by_key(keys["octave"], base))
    yield "position", place
    token = column.by_key(keys["token"], base)
    yield "token", token
    for rung in ("previous", "target"):
        yield rung, column.by_key(keys[rung], base)
    known = column.by_key(keys["bigram"], token)
    yield "bigram", known
    if "domain" in keys:
        domain = column.by_key(keys["domain"], base)
        yield "domain", domain
        known = column.times(known, domain - base)
        yield "bigram_domain", known
    yield "bigram_domain_position", column.times(known, place - base)
    if before is not None:
        yield "layer_before", column.by_set(before, split, choices)
    for rung, of in features.items():
        yield rung, column.by_features(of)


def _losses(arrays: Arrays, layer: int, variant: str) -> Losses:
    """Sums by text (B,) of every rung."""
    found = {rung: of[layer] for rung, of in by_part(arrays, f"loss{variant}_by_text").items() if layer in of}
    return found | {FLOOR: by_layer(arrays, "loss_by_text", FLOOR)[layer]}


def _share(losses: Losses, rung: str, weight: np.ndarray) -> np.ndarray:
    """(U,) share explained, of sums by text each weighted (U, B); NaN where experts need no predicting."""
    most, loss, least = (weight @ losses[name].astype(np.float64) for name in (MARGINAL, rung, FLOOR))
    room = most - least
    return np.divide(most - loss, room, out=np.full(len(weight), np.nan), where=room > 1e-9 * np.abs(most))


def _units(arrays: Arrays) -> Units:
    there = arrays["tokens"] > 0
    return sequence_units(arrays["domain"][there])


def _weights(arrays: Arrays) -> np.ndarray:
    """(U + 1, B) of all texts, and without each unit in turn."""
    there, units = np.flatnonzero(arrays["tokens"] > 0), _units(arrays)
    of_unit = np.zeros((len(units.stratum), len(arrays["tokens"])))
    of_unit[units.of_token, there] = 1.0
    return np.concatenate([of_unit.sum(axis=0, keepdims=True), without(of_unit, units.stratum)])


def _summary(arrays: Arrays, rung: str) -> Row:
    weights, stratum = _weights(arrays), _units(arrays).stratum

    def shares(variant: str) -> dict[int, np.ndarray]:
        found = {n: _share(_losses(arrays, n, variant), rung, weights) for n in by_layer(arrays, "share", rung)}
        return {n: value for n, value in found.items() if np.isfinite(value[0])}

    layers = shares(ALL)
    if not layers:
        return Row({}, np.nan, None, np.nan, np.nan)
    mean = np.mean(list(layers.values()), axis=0)
    half, shuffled = (float(np.mean([of[0] for of in shares(one).values()])) for one in (HALF, SHUFFLED))
    interval = as_interval(jackknife(mean[0], mean[1:], stratum))
    return Row({n: float(of[0]) for n, of in layers.items()}, float(mean[0]), interval, half, shuffled)


def _headline(rung: str, found: dict[str, Row], memorised: float) -> Headline:
    row = found[rung]
    said = (
        f"On texts not learned from, {row.value:.1%} of what a token's experts are beyond those that are used most "
        f"follows from {RUNGS[rung]} ({row.half:.1%} from half the text, {row.shuffled:+.1%} of shuffled choices)"
    )
    if rung == "bigram":
        said += f"; counts of the very same text would claim {memorised:.1%}"
    if rung == "input_before" and CEILING in found:
        said += f"; the same read-out of the layer's own input, which decides, comes to {found[CEILING].value:.1%}"
    return Headline(row.value, said + (": no more than chance." if row.by_chance else "."), no_interval=LEARNED)


def _recall(arrays: Arrays, scalars: dict[str, float]) -> Headline:
    tokens = float(arrays["tokens"].sum())
    recalled = np.mean([of for of in by_layer(arrays, "recall_by_text", "bigram").values()], axis=0, dtype=np.float64)
    rate = float(recalled.sum()) / tokens
    return Headline(
        rate,
        f"Of a token's experts {rate:.1%} are among as many that its id and the one before make most probable, on "
        f"texts not learned from; {scalars['recall_marginal']:.1%} are among those used most.",
        no_interval=LEARNED,
    )


def _mean(layers: dict[int, np.ndarray]) -> float:
    return float(np.nanmean([float(value) for value in layers.values()]))
