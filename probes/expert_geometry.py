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
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moebed.float64 import double
from moebed.views import LayerView, Need
from probes.base import Arrays, Headline, Probe, ProbeResult, per_layer
from probes.expert_matrices import by_matrix, compared, fitting, labels_of, num_experts, pair_means
from probes.matching import exact_products, holds_bf16
from probes.pictures import draw_depth, draw_heat_maps
from probes.principal import top_eigenvectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RANK = 16
_DOUBLE_BELOW = 1024  # rows or columns; float64 throughout
_SECONDS_BETWEEN_LINES = 10.0


class Shape(NamedTuple):
    """What is kept of one matrix.

    Args:
        stable_rank: ‖W‖_F² / ‖W‖₂².
        effective_rank: exp of the entropy of the singular values taken as shares of their sum.
        norm: ‖W‖_F.
        basis: (H, R) the first right singular vectors.
    """

    stable_rank: float
    effective_rank: float
    norm: float
    basis: np.ndarray


def shape_of(matrix: Tensor, rank: int) -> Shape:
    """Ranks, norm and first directions of a matrix (F, H), by way of the Gram matrix of its shorter side.

    Up to 1024 on that side all is float64; above, products are float32 and eigenvalues below a millionth of the largest
    are lost, which singular values below a thousandth of the largest are: too small to count in either rank.
    """
    short = matrix.T if matrix.shape[0] >= matrix.shape[1] else matrix  # (S, long side)
    short = double(short) if len(short) < _DOUBLE_BELOW else short.float()
    with exact_products(holds_bf16(matrix)):
        products = torch.mm(short, short.T)
    squares = torch.linalg.eigvalsh(products).clamp(min=0).cpu().double().numpy()
    gram = products.cpu().numpy()
    if squares[-1] <= 0:
        return Shape(0.0, 0.0, 0.0, np.zeros((matrix.shape[1], rank)))
    sigma = np.sqrt(squares[squares > 1e-12 * squares[-1]])
    share = sigma / sigma.sum()
    vectors = top_eigenvectors(gram, rank)[1]
    if short.shape[0] != matrix.shape[1]:  # left vectors: carry them over
        vectors = (short.T @ torch.from_numpy(np.ascontiguousarray(vectors)).to(short)).cpu().numpy()
    basis = np.linalg.qr(vectors.astype(np.float64))[0]
    total = squares.sum()
    return Shape(float(total / squares[-1]), float(np.exp(-share @ np.log(share))), float(np.sqrt(total)), basis)


class ExpertGeometry(Probe):
    """Ranks and norms of the experts' matrices, and distances between the subspaces they read from or write to.

    Stored for each layer and matrix: ``stable_rank``, ``effective_rank``, ``weight_norm``, all (E',);
    ``subspace_distance (E', E')``, Grassmann's chordal distance √Σ sin²θ of the subspaces of the first R right singular
    vectors, R = 16 or a quarter of the shorter side where that is less; ``subspace_rank ()``, R. With
    ``num_experts/<layer>`` and ``others/<layer>/<matrix>``, the labels of the rows after the routed experts'.
    Scalars are over routed experts; ``subspace_distance`` there is divided by √R: 0 the same subspace, 1 orthogonal
    ones, and random ones √(1 − R/H).

    A layer of a large model takes minutes; ``say`` is told how far it is, at most every ten seconds.
    """

    name = "expert_geometry"
    question = "How many directions does an expert use, and are they the same ones?"
    needs = frozenset({Need.WEIGHTS})
    say: Callable[[str], None] = staticmethod(lambda line: print(line, file=sys.stderr, flush=True))

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Measure one matrix of the experts of one layer."""
        rest, at = fitting(view, name), f"{view.index}/{name}"
        fetch = compared(view, name, rest)
        count, rank = view.num_experts + len(rest), max(1, min(_RANK, min(fetch(0).shape) // 4))
        said, shapes = time.perf_counter(), []
        for index in range(count):
            matrix = fetch(index)
            finite = bool(torch.isfinite(matrix).all())
            nothing = np.full((matrix.shape[1], rank), np.nan)
            shapes.append(shape_of(matrix, rank) if finite else Shape(math.nan, math.nan, math.nan, nothing))
            if time.perf_counter() - said > _SECONDS_BETWEEN_LINES:
                said = time.perf_counter()
                self.say(f"{self.name}: layer {view.index}, {name}: {index + 1} of {count} experts")
        for key, values in zip(
            ("stable_rank", "effective_rank", "weight_norm"), zip(*shapes, strict=True), strict=False
        ):
            self.arrays[f"{key}/{at}"] = np.array(values, np.float32)
        bases = np.stack([shape.basis for shape in shapes])
        overlap = np.square(np.einsum("ihr,jhs->ijrs", bases, bases, optimize=True)).sum(axis=(2, 3))
        distance = np.sqrt(np.maximum(rank - overlap, 0))
        np.fill_diagonal(distance, 0)
        self.arrays[f"subspace_distance/{at}"] = distance.astype(np.float32)
        self.arrays[f"subspace_rank/{at}"] = np.asarray(rank, np.int64)
        self.arrays[f"num_experts/{view.index}"] = np.asarray(view.num_experts, np.int64)
        self.arrays[f"others/{view.index}/{name}"] = np.array(list(rest), dtype="<U2")

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
                for name, layers in by_matrix(arrays, key).items()
            }
            for name, values in means.items():
                scalars |= per_layer(f"{key}_{name}", values)
            pictures[f"{key}_over_depth"] = partial(draw_depth, means, title, key.replace("_", " "))
        ranks = by_matrix(arrays, "subspace_rank")
        distance = {
            name: {layer: value / np.sqrt(float(ranks[name][layer])) for layer, value in layers.items()}
            for name, layers in pair_means(arrays, "subspace_distance").items()
        }
        if distance["up"]:
            for name, values in distance.items():
                scalars |= per_layer(f"subspace_distance_{name}", values)
            title = "Distance of the subspaces that two experts' matrices use most"
            pictures |= draw_heat_maps(by_matrix(arrays, "subspace_distance"), labels_of(arrays), title, "distance")
            pictures["distance_over_depth"] = partial(draw_depth, distance, f"{title}, over depth", "distance / √R")
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
