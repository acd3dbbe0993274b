"""Expert geometry: how many directions does an expert use, and do experts use the same? Not in 2406.18219.

The paper compares directions and leaves sizes and angles out; these are the rest. Every matrix is taken with its
neurons as rows, (F, H), so that its right singular vectors lie in the space of hidden states, which all experts share.

E routed experts, E' with the shared expert and the dense FFN where they fit, F expert intermediate, H hidden, R rank of
the subspaces, S singular values.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float32 import exact_products
from moebed.machine.precision import multiplies_bf16_faster
from moebed.model.native.carry import by_rows
from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_part, per_layer
from probes.figures.pictures import draw_depth, draw_heat_maps
from probes.measures.bands import one_core_each
from probes.measures.expert_matrices import compared, fitting, keep_rows, labels_of, num_experts, pair_means
from probes.measures.spectrum import (
    EXACT_BELOW,
    TRUSTED,
    Gram,
    full_gram,
    rounded_gram,
    spectrum,
    start_of,
    times_wide,
    whole_rank,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RANK = 16
_STORED = ("stable_rank", "effective_rank", "weight_norm", "effective_rank_error", "subspace_error")
_SECONDS_BETWEEN_LINES = 10.0


class Shape(NamedTuple):
    """What is kept of one matrix.

    Args:
        stable_rank: ‖W‖_F² / ‖W‖₂².
        effective_rank: exp of the entropy of the singular values taken as shares of their sum.
        norm: ‖W‖_F.
        rank_error: Bound on the relative error of the effective rank, at four standard errors where it is sampled.
        angle_error: Bound on the sine of the largest angle between the basis' span and the exact subspace, at most 1.
        basis: (H, R) the first right singular vectors.
    """

    stable_rank: float
    effective_rank: float
    norm: float
    rank_error: float
    angle_error: float
    basis: np.ndarray


def shape_of(matrix: Tensor, rank: int) -> Shape:
    """Ranks, norm and first directions of one matrix (F, H); see ``shapes_of``."""
    return next(shapes_of(lambda index: matrix, 1, rank))


def shapes_of(fetch: Callable[[int], Tensor], count: int, rank: int) -> Iterator[Shape]:
    """Ranks, norms and first directions of matrices (F, H), by way of the Gram matrices of their shorter side.

    Below ``EXACT_BELOW`` on that side all is float64 and exact; above, see ``probes.measures.spectrum``. Singular
    values within the rounding of the Gram matrix count as 0: in float64 those below some hundred-millionth of the
    others. A core takes a matrix from its beginning to its end: most of it are steps too small for several.

    Args:
        fetch: Gives a matrix by its index; called from this thread.
        count: Number of matrices.
        rank: Directions of each.
    """
    with exact_products(is_bf16=False), one_core_each("spectrum") as each:  # the setting is the process's
        yield from each(partial(_shape, rank), map(fetch, range(count)))


def _shape(rank: int, matrix: Tensor) -> Shape:
    in_longer = matrix.shape[0] < matrix.shape[1]
    short = matrix if in_longer else matrix.T  # (N, K)
    rounds = _may_round(matrix)
    if rounds and in_longer:
        short = by_rows(short)  # as both the Gram matrix and the last product take it
    given: Gram | None = None
    for product in (rounded_gram, full_gram) if rounds else (full_gram,):
        given = None  # room for the next one
        given = product(short)
        if not 0 < given.trace < math.inf:
            value = 0.0 if bool((matrix == 0).all()) else math.nan
            return Shape(value, value, value, value, value, np.full((matrix.shape[1], rank), value))
        found = spectrum(given, *start_of(short, in_longer), rank)
        if found.rank_error <= TRUSTED:
            break
    else:
        if len(short) >= EXACT_BELOW:
            value, error = whole_rank(short)
            found = found._replace(effective_rank=value, rank_error=error)
    assert given is not None
    vectors = times_wide(short.T, found.vectors) if in_longer else found.vectors  # left ones are carried over
    basis = torch.linalg.qr(vectors.cpu().double())[0].numpy()
    ranks = given.trace / found.largest**2, found.effective_rank
    return Shape(*ranks, math.sqrt(given.trace), found.rank_error, found.angle, basis)


def _may_round(matrix: Tensor) -> bool:
    """Whether a Gram matrix rounded to bfloat16 is tried: it is faster here, and only the result is rounded."""
    large = min(matrix.shape) >= EXACT_BELOW
    return large and matrix.device.type == "cpu" and matrix.dtype == torch.bfloat16 and multiplies_bf16_faster()


class ExpertGeometry(Probe):
    """Ranks and norms of the experts' matrices, and distances between the subspaces they read from or write to.

    Stored for each layer and matrix: ``stable_rank``, ``effective_rank``, ``weight_norm``, all (E',);
    ``subspace_distance (E', E')``, Grassmann's chordal distance √Σ sin²θ of the subspaces of the first R right singular
    vectors, R = 16 or a quarter of the shorter side where that is less; ``subspace_rank ()``, R. With
    ``num_experts/<layer>`` and ``others/<layer>/<matrix>``, the labels of the rows after the routed experts'.
    ``effective_rank_error (E',)``, which its relative error does not exceed (four standard errors where it is sampled;
    above a hundredth it is computed whole instead), and ``subspace_error (E',)``, a bound on the sine of
    the largest angle to the exact subspace: 0 or next to it for sides below 512, estimated above. Where it is 1, as for
    random matrices, eigenvalues next to the R-th are too close to tell the subspace from its neighbours; the distance
    is then that of R leading directions found from a fixed start, the same at each call.
    Scalars are over routed experts; ``subspace_distance`` there is divided by √R: 0 the same subspace, 1 orthogonal
    ones, and random ones √(1 − R/H).

    A layer of a large model takes its time; ``say`` is told how far it is, at most every ten seconds.
    """

    name = "expert_geometry"
    question = "How many directions does an expert use, and are they the same ones?"
    needs = frozenset({Need.WEIGHTS})
    say: Callable[[str], None] = staticmethod(lambda line: print(line, file=sys.stderr, flush=True))

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Measure one matrix of the experts of one layer."""
        rest = fitting(view, name)
        fetch = compared(view, name, rest)
        count, rank = view.num_experts + len(rest), max(1, min(_RANK, min(fetch(0).shape) // 4))
        said, shapes = time.perf_counter(), []
        for index, shape in enumerate(shapes_of(fetch, count, rank)):
            shapes.append(shape)
            if time.perf_counter() - said > _SECONDS_BETWEEN_LINES:
                said = time.perf_counter()
                self.say(f"{self.name}: layer {view.index}, {name}: {index + 1} of {count} experts")
        for key, values in zip(_STORED, zip(*shapes, strict=True), strict=False):
            self.put(key, view.index, np.array(values, np.float32), name)
        bases = np.stack([shape.basis for shape in shapes])
        overlap = np.square(np.einsum("ihr,jhs->ijrs", bases, bases, optimize=True)).sum(axis=(2, 3))
        distance = np.sqrt(np.maximum(rank - overlap, 0))
        np.fill_diagonal(distance, 0)
        self.put("subspace_distance", view.index, distance, name)
        self.put("subspace_rank", view.index, rank, name)
        keep_rows(self, view, rest, name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Means over routed experts, by layer and overall; heat maps of the distances."""
        experts = num_experts(arrays)
        if not experts:
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        scalars: dict[str, float] = {}
        pictures: dict[str, Callable[[], Figure]] = {}
        for key, title in {
            "stable_rank": "Stable rank of the experts' matrices over depth (mean over experts)",
            "effective_rank": "Effective rank of the experts' matrices over depth (mean over experts)",
            "weight_norm": "Frobenius norm of the experts' matrices over depth (mean over experts)",
        }.items():
            means = {
                name: {layer: float(value[: experts[layer]].mean()) for layer, value in layers.items()}
                for name, layers in by_part(arrays, key).items()
            }
            for name, values in means.items():
                scalars |= per_layer(f"{key}_{name}", values)
            pictures[f"{key}_over_depth"] = partial(draw_depth, means, title, key.replace("_", " "), marks={})
        ranks = by_part(arrays, "subspace_rank")
        distance = {
            name: {layer: value / np.sqrt(float(ranks[name][layer])) for layer, value in layers.items()}
            for name, layers in pair_means(arrays, "subspace_distance").items()
        }
        if distance["up"]:
            for name, values in distance.items():
                scalars |= per_layer(f"subspace_distance_{name}", values)
            title = "Distance of the subspaces that two experts' matrices use most"
            pictures |= draw_heat_maps(by_part(arrays, "subspace_distance"), labels_of(arrays), title, "distance")
            ends = {0.0: "0, the same", 1.0: "1, orthogonal"}
            pictures["distance_over_depth"] = partial(
                draw_depth, distance, f"{title}, over depth", "distance / √R", ends
            )
        return ProbeResult(arrays, scalars, _headlines(scalars), pictures)


def _headlines(scalars: dict[str, float]) -> dict[str, Headline]:
    found = {}
    for name in ("up", "gate", "down"):
        value = scalars[f"effective_rank_{name}"]
        found[f"effective_rank_{name}"] = Headline(value, f"An expert's {name} matrix has effective rank {value:.4g}.")
        if f"subspace_distance_{name}" in scalars:
            value = scalars[f"subspace_distance_{name}"]
            sentence = f"The main directions of two {name} matrices are {value:.2g} apart (0 the same, 1 orthogonal)."
            found[f"subspace_distance_{name}"] = Headline(value, sentence)
    return found
