"""What is laid side by side when experts are compared: routed experts, then the shared one, then a dense FFN.

E routed experts, E' all that are compared, F expert intermediate, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float32 import exact_products
from moebed.machine.float64 import double
from moebed.model.native import coordinates
from moebed.views.layer import ExpertKind, LayerView
from probes.contract import Arrays, Probe, by_layer, by_part
from probes.measures.bands import all_half, one_core_each, sum_over_bands
from probes.measures.principal import NOISE, standardised_products
from probes.measures.similarity import off_diagonal, scalar_products

_BAND_ELEMENTS = 1 << 24  # of all experts, that are in memory at a time where a layer's are not
_SUMMED_ELEMENTS = 1 << 19  # two megabytes in float32, which stay in a core's cache
_MANY = 32  # experts from which on a product of their coordinates gains by bf16


def neurons(name: str, matrix: Tensor) -> Tensor:
    """A matrix with its neurons as rows, (F, H): rows of up and gate, columns of down (2406.18219, section 4.2)."""
    return matrix.T if name == "down" else matrix


def others(view: LayerView, name: str) -> dict[str, Tensor]:
    """Matrices to compare the routed experts with, by label, whatever their width: ``SE``, ``F``, those there are."""
    found = {ExpertKind.SHARED: view.shared_matrix(name), ExpertKind.REFERENCE: view.reference_matrix(name)}
    return {kind.value: matrix for kind, matrix in found.items() if matrix is not None}


def fitting(view: LayerView, name: str) -> dict[str, Tensor]:
    """Of ``others``, those of a routed expert's shape."""
    shape = view.expert_shape(name)
    return {label: matrix for label, matrix in others(view, name).items() if tuple(matrix.shape) == shape}


def compared(view: LayerView, name: str, labels: Mapping[str, Tensor]) -> Callable[[int], Tensor]:
    """Gives the neurons of row 0 to E' − 1: routed experts, then these others."""
    rest = list(labels.values())

    def fetch(index: int) -> Tensor:
        routed = index < view.num_experts
        return neurons(name, view.expert_matrix(name, index) if routed else rest[index - view.num_experts])

    return fetch


def row_bands(view: LayerView, name: str, labels: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Rows (r, C) of routed experts, then these others, as stored: E' blocks at a time, a band of rows each."""
    rows, columns = view.expert_shape(name)
    step = max(1, _BAND_ELEMENTS // (columns * (view.num_experts + len(labels))))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        routed = [view.expert_matrix(name, index, part) for index in range(view.num_experts)]
        yield routed + [matrix[part] for matrix in labels.values()]


def expert_gram(view: LayerView, name: str) -> tuple[Tensor, list[str]]:
    """Scalar products (E', E') float64 of the experts' flattened matrices, and the labels of the rows after the routed.

    The others are those that fit. In memory is a band of rows at a time.
    """
    rest = fitting(view, name)
    both = _native_products(view, name, rest)
    if both is not None:
        return both[0], list(rest)
    bands = row_bands(view, name, rest)
    first = next(bands)
    is_bf16 = len(first) >= _MANY and all(block.dtype == torch.bfloat16 for block in first)
    with exact_products(is_bf16):
        return sum_over_bands(chain([first], bands), scalar_products), list(rest)


def standardised_gram(view: LayerView, name: str) -> tuple[Tensor, float]:
    """Scalar products (E', E) float64 with the routed experts' matrices, and the share of them that is rounding.

    Each coordinate is standardised over the routed experts (``probes.measures.principal.standardised_products``).
    """
    rest = fitting(view, name)
    both = _native_products(view, name, rest)
    if both is not None:
        return both[1], NOISE[True]
    return standardised_products(row_bands(view, name, rest), view.num_experts)


def _native_products(view: LayerView, name: str, rest: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Both of these in one pass over the weights, for whichever probe asks; None where the library does not serve."""
    if ("products", name) not in view.kept:
        view.kept["products", name] = None
        bands = row_bands(view, name, rest)
        first = next(bands)
        if coordinates.fits(first, math.prod(view.expert_shape(name)) * len(first)):
            plain = torch.zeros(len(first), len(first), dtype=torch.float64)
            standardised = plain[:, : view.num_experts].clone()
            for blocks in chain([first], bands):
                coordinates.add_products(blocks, view.num_experts, plain, standardised)
            view.kept["products", name] = plain, standardised
    return view.kept["products", name]


def mean_neurons(view: LayerView, name: str) -> tuple[Tensor, list[str]]:
    """The average neuron of each expert (E', H) in float64, and the labels of those after the routed ones."""
    if ("mean_neurons", name) not in view.kept:
        rest = others(view, name)
        fetch = compared(view, name, rest)
        matrices = (fetch(index) for index in range(view.num_experts + len(rest)))
        with one_core_each("means") as each:
            means = torch.stack(list(each(_mean_of_rows, matrices)))
        view.kept["mean_neurons", name] = means, list(rest)
    return view.kept["mean_neurons", name]


def _mean_of_rows(matrix: Tensor) -> Tensor:
    """(N, H) to (H,) float64: bands are summed in float32 where the numbers are shorter, and their sums in float64."""
    wide: Callable[[Tensor], Tensor] = torch.Tensor.float if all_half([matrix]) else double
    step = max(1, _SUMMED_ELEMENTS // matrix.shape[1 if matrix.stride(1) == 1 else 0])
    if matrix.stride(1) != 1:  # a column's numbers follow one another: PyTorch's sum of them is one of sums
        return torch.cat([wide(band).sum(dim=0).cpu().double() for band in matrix.split(step, dim=1)]) / len(matrix)
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for band in matrix.split(step):
        total += wide(band).sum(dim=0).cpu()
    return total / len(matrix)


def keep_rows(probe: Probe, view: LayerView, labels: Iterable[str], name: str = "") -> None:
    """Store what the rows of an array (E', ...) are: ``num_experts/<layer>`` and ``others/<layer>[/<matrix>]``."""
    probe.put("num_experts", view.index, view.num_experts)
    probe.put("others", view.index, np.array(list(labels), dtype="<U2"), name)


def num_experts(arrays: Arrays) -> dict[int, int]:
    """Routed experts by layer, as stored under ``num_experts/<layer>``."""
    return {layer: int(value) for layer, value in by_layer(arrays, "num_experts").items()}


def pair_means(arrays: Arrays, key: str) -> dict[str, dict[int, float]]:
    """Mean over pairs of routed experts of ``<key>/<layer>/<matrix> (E', E')``; layers with one expert are left out."""
    experts = num_experts(arrays)
    return {
        name: {
            layer: float(off_diagonal(values[: experts[layer], : experts[layer]]).mean(dtype=np.float64))
            for layer, values in layers.items()
            if experts[layer] > 1
        }
        for name, layers in by_part(arrays, key).items()
    }


def labels_of(arrays: Arrays) -> dict[int, list[str]]:
    """What each row is, by layer: expert numbers, then what ``others/<layer>[/<matrix>]`` names."""
    rest = {layer: found for layers in by_part(arrays, "others").values() for layer, found in layers.items()}
    return {
        layer: [*map(str, range(count)), *(str(label) for label in rest.get(layer, ()))]
        for layer, count in num_experts(arrays).items()
    }
