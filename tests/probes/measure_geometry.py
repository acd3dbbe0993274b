"""``python -m tests.probes.measure_geometry``: milliseconds of the steps of ``expert_geometry``, one matrix and thread.

Steps are taken in turn on six matrices of DeepSeekMoE-16B's size, which no core's cache holds; the least and the median
of what was found: other work on the machine only adds.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor

from moebed.machine.allocator import keep_freed_blocks
from moebed.model.native.carry import by_rows
from probes.expert_geometry import shape_of
from probes.measures.krylov import KrylovSpace, Symmetric
from probes.measures.spectrum import Gram, rounded_gram, start_of, times_wide

SHAPE, MATRICES, ROUNDS, BLOCKS, RANK = (1408, 2048), 6, 40, 7, 16


def _space(given: Gram, start: Tensor, compiled: bool) -> KrylovSpace:
    space = KrylovSpace(Symmetric(given.product, given.lost), start, BLOCKS)
    space._compiled = compiled and space._compiled
    space.grow(BLOCKS)
    return space


def _steps(matrices: Iterator[Tensor]) -> dict[str, Callable[[], object]]:
    matrix = next(matrices)
    given, (start, _) = rounded_gram(matrix), start_of(matrix, True)
    space = _space(given, start, compiled=True)
    small = space.projected().float()
    values, turn = torch.linalg.eigh(small)
    kept, before = 2 * space.block, len(small) - space.block
    leading = values[-kept:].double(), turn[:, -kept:]
    found = space.directions(*leading).vectors[:, :RANK]
    return {
        "all": lambda: shape_of(next(matrices), RANK),
        "all, stored by columns": lambda: shape_of(next(matrices).view(SHAPE[::-1]).T, RANK),
        "columns to rows": lambda: by_rows(next(matrices).view(SHAPE[::-1]).T),
        "columns to rows, PyTorch": lambda: next(matrices).view(SHAPE[::-1]).T.contiguous(),
        "Gram matrix": lambda: rounded_gram(next(matrices)),
        "Krylov space": lambda: _space(given, start, compiled=True),
        "Krylov space, plain": lambda: _space(given, start, compiled=False),
        "projection": space.projected,
        "eigendecompositions": lambda: (torch.linalg.eigh(small), torch.linalg.eigh(small[:before, :before])),
        "directions": lambda: space.directions(*leading),
        "carried": lambda: times_wide(next(matrices).T, found),
    }


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    keep_freed_blocks()
    torch.manual_seed(0)
    steps = _steps(cycle([(0.03 * torch.randn(SHAPE)).bfloat16() for _ in range(MATRICES)]))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    for name, found in seconds.items():
        print(f"{name:28s} least {1e3 * min(found):6.2f}, median {1e3 * statistics.median(found):6.2f}")


if __name__ == "__main__":
    main()
