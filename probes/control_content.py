"""Control and content: what of a hidden state does the router see, and which part tells where the token goes next?

The router's rows span a few directions of the hidden state. Its part in them, the control, decides in this layer by
construction; the rest, the content, is what the router is blind to. Published of six models and 2 M tokens: the control
names the experts of its own layer to 99 % and of the next to 35 %, the content of the next to 65 to 75 % (second hand).
But a layer of E experts has at most E numbers of control and H of content: so both are compared at equal width here,
and with as many directions drawn from the data.

T tokens, E experts, H hidden, r directions of control (E − 1 where the router does not see what all its rows share).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.machine.float64 import double
from moebed.model.config import ModelConfig
from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeOptions, ProbeResult, by_layer, numbers, per_layer
from probes.figures.control import draw_control
from probes.measures.choices import assignments
from probes.measures.expert_matrices import num_experts
from probes.measures.held_out import LEAST_TEXTS, Split, accuracy, most_common, split_of
from probes.measures.paths import ids_per_path, path_correlation
from probes.measures.resampling import SEED, SHARE, Units, interval_of, keep, unit_notes, units_of
from probes.measures.sketch import compact, normal, sketched

CONTENT = 128  # numbers of the content that are kept of each token
RANK = 1e-5  # of the largest singular value: below, a direction is rounding
DRAWS = 3  # of directions from the data
NEXT = ("control", "content_narrow", "random", "content", "most_common")
LEARNED_FROM = 12  # texts, from which on the intervals hold (tests/probes/simulate_asked_intervals.py)
FEW_LEARNED = f"no interval from fewer than {LEARNED_FROM} texts: what is learned from so few varies too"
COUNTED = "no interval, as entropies of counts depend on how many tokens are counted"
FEW = f"where tokens go next is read out in texts that were not learned from: that takes {LEAST_TEXTS} texts or more"


class ControlContent(Probe):
    """The hidden state's part in the span of the router's rows, and the rest.

    Rows are taken less their mean where the router's choices do not depend on it. Stored for each layer: ``rank ()``,
    r; ``control_share ()``, mean over tokens of the control's share of the squared norm of x, ``control_share_raw ()``
    of rows as they are; ``control_share_data ()``, of r directions drawn from the data, random sums of hidden states
    (mean of three draws); ``control_chance ()``, r/H. ``id_share_control``, ``id_share_content``, the share of each
    part's variance that lies between token ids rather than within them, corrected for how few tokens an id has, and
    ``id_share_control_shuffled``, ``id_share_content_shuffled`` with ids shuffled. Held-out shares of tokens whose
    first expert a ridge read-out names, in the next layer shown: ``next_by_control``; ``next_by_content``, from its 128
    leading principal coordinates; ``next_by_content_narrow``, from r of them; ``next_by_random``, from r directions
    drawn from the data; ``next_by_most_common``, the most used expert. Of the layer itself ``own_by_control`` and
    ``own_by_content``. ``control_cos_next ()``, mean cosine of a token's control here and in the next layer, and
    ``control_cos_next_shuffled`` with another token's. Of as many layers as are asked for from this one on, of first
    choices as a path: ``path_entropy`` and ``layer_entropies``, nats, of paths and summed over the layers;
    ``total_correlation``, the second less the first, ``total_correlation_same_id`` where each layer's choices are
    shuffled among tokens of one id, ``total_correlation_shuffled`` among all; ``ids_per_path``, different ids among ten
    tokens of a path, and ``ids_per_path_shuffled``. Stored once: ``unit_stratum``.
    """

    name = "control_content"
    question = "Which part of a hidden state does the router see, and which tells where the token goes next?"
    needs = frozenset({Need.ROUTING})

    @dataclass(frozen=True)
    class Options(ProbeOptions):
        """Over how many layers a path goes."""

        path_layers: int = 3

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.path_layers < 2:
                raise ConfigError(f"probes: control_content's path_layers is {self.path_layers}; give 2 or more")

    options: Options

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """Coordinates of control, content and directions drawn, while the pass goes on."""
        return 0 if layer is None else 2 * (2 * config.layer(layer).num_experts + min(CONTENT, config.hidden_size) + 1)

    def update(self, view: LayerView) -> None:
        """Take a layer's hidden states apart."""
        x, gate = view.moe_input, view.gate
        if view.routing is None or view.text is None or x is None or gate is None or gate.shape[1] != x.shape[1]:
            return
        basis = control_basis(gate, view.shift_invariant)
        if not basis.shape[1]:
            return
        units = units_of(view.text, len(x))
        if "unit" not in self.arrays:
            self.arrays |= {"unit": units.of_token, "sequence": view.text.sequence.cpu().numpy()}
            self.arrays |= {"ids": view.text.token_ids.cpu().numpy(), "text_domain": view.text.domain.cpu().numpy()}
            self.arrays |= units.arrays()
        basis = basis.to(x.device)
        control = x @ basis  # (T, r)
        drawn = [_from_data(x, basis.shape[1], draw) for draw in range(DRAWS)]
        shares = {
            "control_share": _share(x, control),
            "control_share_raw": _share(x, x @ control_basis(gate, False).to(x.device)),
            "control_share_data": np.mean([_share(x, x @ one) for one in drawn], axis=0),
        }
        for key, of_token in shares.items():
            keep(self, key, view.index, of_token.mean(), units.means_without(of_token))
        self.put("rank", view.index, basis.shape[1])
        self.put("control_chance", view.index, basis.shape[1] / x.shape[1])
        self.put("num_experts", view.index, view.num_experts)
        for key, value in _by_id(x, control, view.text.token_ids.to(x.device)).items():
            self.put(key, view.index, value)
        self.put("part_control", view.index, compact(control))
        self.put("part_content", view.index, sketched(x - control @ basis.T, CONTENT))
        self.put("part_random", view.index, compact(x @ drawn[0]))
        self.put("part_basis", view.index, basis)
        self.put("part_first", view.index, assignments(view)[:, 0].astype(np.int16))

    def compute(self) -> ProbeResult:
        """The result: what each part tells of the next layer, and the paths."""
        layers = by_layer(self.arrays, "part_first")
        if layers:
            units = Units(self.arrays.pop("unit"), self.arrays["unit_stratum"])
            ids, sequence = self.arrays.pop("ids"), self.arrays.pop("sequence")
            split = split_of(self.arrays.pop("text_domain"), sequence)
            if split is not None:
                self._read_out(layers, units, split)
            for at in range(len(layers) - self.options.path_layers + 1):
                some = list(layers)[at : at + self.options.path_layers]
                path = np.stack([layers[n].astype(np.int64) for n in some], axis=1)
                for key, value in (path_correlation(path, ids) | ids_per_path(path, ids)).items():
                    self.put(key, some[0], value)
        for key in ("control", "content", "random", "basis", "first"):
            self.drop(f"part_{key}")
        return self.describe(self.arrays)

    def _read_out(self, first: Mapping[int, np.ndarray], units: Units, split: Split) -> None:
        """Held-out accuracies in this layer and in the next."""
        parts = {key: by_layer(self.arrays, f"part_{key}") for key in ("control", "content", "random", "basis")}
        # A token without an expert, as some routers leave them, is a class of its own.
        experts = {n: count + int((first[n] < 0).any()) for n, count in num_experts(self.arrays).items() if n in first}
        label = {n: np.where(of < 0, experts[n] - 1, of).astype(np.int64) for n, of in first.items()}

        def put(key: str, layer: int, features: np.ndarray, of: int) -> None:
            right = accuracy(features, label[of], split, experts[of]).astype(np.float64)
            keep(self, key, layer, right.mean(), units.means_without(right))

        for n in first:
            for key in ("control", "content"):
                put(f"own_by_{key}", n, parts[key][n], n)
        for n, following in pairwise(first):
            narrow = parts["content"][n][:, : parts["control"][n].shape[1]]
            of = {"control": parts["control"][n], "content": parts["content"][n], "content_narrow": narrow}
            for key, features in (of | {"random": parts["random"][n]}).items():
                put(f"next_by_{key}", n, features, following)
            right = most_common(label[following], split).astype(np.float64)
            keep(self, "next_by_most_common", n, right.mean(), units.means_without(right))
            both = [
                parts["control"][one].astype(np.float32) @ parts["basis"][one].T for one in (n, following)
            ]  # (T, H) each
            order = np.random.default_rng((SEED, n)).permutation(len(both[0]))
            self.put("control_cos_next", n, _cosine(both[0], both[1]))
            self.put("control_cos_next_shuffled", n, _cosine(both[0], both[1][order]))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Shares, read-outs and paths over depth, each beside chance."""
        if not numbers(arrays, "control_share"):
            return ProbeResult(arrays, notes=["no layer has a router with gate embeddings, and text"])
        scalars: dict[str, float] = {}
        kept = ["control_share", "control_share_raw", "control_share_data", "control_chance", "rank"]
        kept += [f"id_share_{part}{how}" for part in ("control", "content") for how in ("", "_shuffled")]
        kept += [f"next_by_{part}" for part in NEXT] + ["own_by_control", "own_by_content"]
        kept += ["control_cos_next", "control_cos_next_shuffled", "path_entropy", "layer_entropies"]
        kept += [f"total_correlation{how}" for how in ("", "_same_id", "_shuffled")]
        kept += ["ids_per_path", "ids_per_path_shuffled"]
        for key in kept:
            scalars |= per_layer(key, {n: value for n, value in numbers(arrays, key).items() if np.isfinite(value)})
        headlines = {"control_share": _shares(arrays, scalars)}
        if "next_by_control" in scalars:
            headlines |= _next(arrays, scalars)
        if "total_correlation" in scalars:
            headlines["path_correlation"] = _paths(scalars)
        notes = unit_notes(arrays, headlines) + ([] if "own_by_control" in scalars else [FEW])
        if {"id_share_control", "id_share_content"} <= scalars.keys():
            notes.append(
                f"of the variance of control {scalars['id_share_control']:.0%} lies between token ids, of content "
                f"{scalars['id_share_content']:.0%} ({scalars['id_share_control_shuffled']:.0%} and "
                f"{scalars['id_share_content_shuffled']:.0%} with ids shuffled)"
            )
        notes.append(
            "published: control names the next layer's experts to 35 %, content to 65 to 75 %; different ids among ten "
            "tokens: 4.3 of clusters by control, 1.1 by content, 1.4 by the whole state (second hand)"
        )
        figures = {"over_depth": partial(draw_control, {key: numbers(arrays, key) for key in kept})}
        return ProbeResult(arrays, scalars, headlines, figures, notes)


def control_basis(gate: Tensor, centred: bool) -> Tensor:
    """(H, r) orthonormal directions that rows (E, H) of a router span, less their mean if they are centred."""
    rows = double(gate)
    rows = rows - rows.mean(dim=0) if centred else rows
    _, size, directions = torch.linalg.svd(rows, full_matrices=False)
    kept = size > RANK * size[0].clamp_min(1e-300)
    return directions[kept].T.float().contiguous()


def _from_data(x: Tensor, count: int, draw: int) -> Tensor:
    """(H, r) orthonormal directions that random sums of hidden states x (T, H) span."""
    drawn = normal(len(x), min(count, *x.shape), draw + 1, x)
    return torch.linalg.qr(x.T @ drawn).Q


def _share(x: Tensor, part: Tensor) -> np.ndarray:
    """(T,) of each token's squared norm that its part in some directions (T, r) has."""
    size = double(x.square().sum(dim=1)).clamp_min(1e-300)
    return (double(part.square().sum(dim=1)) / size).cpu().numpy()


def _by_id(x: Tensor, control: Tensor, ids: Tensor) -> dict[str, float]:
    """Shares of variance between ids, of control and content, which are at right angles; ids shuffled beside."""
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(ids))).to(ids.device)
    found = {}
    for how, label in (("", ids), ("_shuffled", ids[order])):
        _, group, count = label.unique(return_inverse=True, return_counts=True)
        several = count[group] > 1
        group = group[several].unique(return_inverse=True)[1]
        whole, mine = (_between(part[several], group) for part in (x, control))
        for part, (between, total) in (("control", mine), ("content", whole - mine)):
            groups, tokens = len(group.unique()), len(group)
            within = (total - between) / max(1, tokens - groups)
            share = (between - (groups - 1) * within) / total if total > 0 else float("nan")
            found[f"id_share_{part}{how}"] = float(share) if tokens > groups > 1 else float("nan")
    return found


def _between(x: Tensor, group: Tensor) -> np.ndarray:
    """Sums of squares (2,) of x (n, ·): between groups, and in all."""
    if not len(x):
        return np.zeros(2)
    x = x - x.mean(dim=0)
    count = torch.bincount(group)
    means = x.new_zeros(len(count), x.shape[1]).index_add_(0, group, x) / count.unsqueeze(1)
    between = (double(means.square().sum(dim=1)) * double(count)).sum()
    return np.array([float(between), float(double(x.square().sum(dim=1)).sum())])


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Mean cosine of rows (T, H)."""
    size = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / np.maximum(size, 1e-30)).mean())


def _shares(arrays: Arrays, scalars: dict[str, float]) -> Headline:
    value = scalars["control_share"]
    return Headline(
        value,
        f"The router sees {scalars['rank']:.0f} directions, with {value:.1%} of the hidden state's square; as many "
        f"drawn from the data have {scalars['control_share_data']:.1%}, as many at random "
        f"{scalars['control_chance']:.1%}.",
        interval_of(arrays, "control_share", value, within=SHARE),
    )


def _next(arrays: Arrays, scalars: dict[str, float]) -> dict[str, Headline]:
    by = {part: scalars[f"next_by_{part}"] for part in NEXT}
    own = f"(its own layer's to {scalars['own_by_control']:.0%})"
    within = {part: interval_of(arrays, f"next_by_{part}", by[part], within=SHARE) for part in ("control", "content")}
    chance = {"control": max(by["random"], by["most_common"]), "content": by["most_common"]}

    def no_more(part: str, what: str) -> str:
        ends = within[part]
        return f": no more than {what}." if by[part] <= chance[part] or (ends and ends[0] <= chance[part]) else "."

    sentences = {
        "control": f"The control, {scalars['rank']:.0f} numbers, names the next layer's first expert to "
        f"{by['control']:.1%} {own}; as many numbers of the content to {by['content_narrow']:.1%}, in directions drawn "
        f"from the data to {by['random']:.1%}; the most used expert is right to {by['most_common']:.1%}"
        + no_more("control", "any directions tell"),
        "content": f"The content, which the router does not see, names the next layer's first expert to "
        f"{by['content']:.1%} from {CONTENT} numbers at most, and its own layer's to {scalars['own_by_content']:.1%}; "
        f"the most used expert is right to {by['most_common']:.1%}" + no_more("content", "that"),
    }
    if len(arrays["unit_stratum"]) < LEARNED_FROM:
        return {
            f"next_by_{part}": Headline(by[part], said, no_interval=FEW_LEARNED) for part, said in sentences.items()
        }
    return {f"next_by_{part}": Headline(by[part], said, within[part]) for part, said in sentences.items()}


def _paths(scalars: dict[str, float]) -> Headline:
    found, same, shuffled = (scalars[f"total_correlation{how}"] for how in ("", "_same_id", "_shuffled"))
    said = (
        f"First choices of neighbouring layers go together by {found:.2f} nats a path; {same:.2f} where they are "
        f"shuffled among tokens of one id, {shuffled:.2f} among all"
    )
    if "ids_per_path" in scalars:
        said += (
            f". Ten tokens of a path have {scalars['ids_per_path']:.1f} different ids, "
            f"{scalars['ids_per_path_shuffled']:.1f} by chance"
        )
    return Headline(found - shuffled, said + ".", no_interval=COUNTED)
