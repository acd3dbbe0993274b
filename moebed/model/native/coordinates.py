"""Scalar products of matrices in the compiled library: as they are, and standardised, in one pass over memory.

M matrices, the first E of which standardise a coordinate; n coordinates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from moebed.model import native
from moebed.model.native import compiled

_LEAST = 1 << 20  # numbers; with fewer, PyTorch takes milliseconds, and nothing is compiled for them
_FEWEST = 8  # blocks; operands are padded to 16, so that with fewer PyTorch is as fast
_CALL = compiled.structure(
    "CoordinatesCall",
    **dict.fromkeys(("rows", "fitted", "coordinates", "threads"), ctypes.c_int64),
    **dict.fromkeys(("values", "plain", "standardised"), ctypes.c_void_p),
)


def fits(blocks: Sequence[Tensor], numbers: int) -> bool:
    """Whether the library takes blocks like these, bf16 in main memory, and is worth it for so many numbers in all."""
    plain = all(block.dtype == torch.bfloat16 and block.device.type == "cpu" for block in blocks)
    return plain and len(blocks) >= _FEWEST and numbers >= _LEAST and native.load() is None


def add_products(blocks: Sequence[Tensor], fitted: int, plain: Tensor, standardised: Tensor) -> None:
    """Add what blocks of the same coordinates contribute to scalar products.

    Args:
        blocks: M of n bf16 numbers each.
        fitted: E. Each coordinate is taken less its mean over these and over their deviation (ddof 1); one in which
            they agree counts as 0.
        plain: (M, M) float64, contiguous: of the blocks as they are.
        standardised: (M, E) float64, contiguous; for E at least 2.
    """
    name = native.instruction_set()
    assert name is not None
    blocks = [block.contiguous() for block in blocks]
    assert {block.numel() for block in blocks} == {blocks[0].numel()}
    values = torch.tensor([block.data_ptr() for block in blocks], dtype=torch.int64)
    numbers = {
        "rows": len(blocks),
        "fitted": fitted,
        "coordinates": blocks[0].numel(),
        "threads": torch.get_num_threads(),
    }
    tensors = {"values": values, "plain": plain, "standardised": standardised}
    compiled.invoke(compiled.library(name).moebed_coordinates, _CALL, numbers, tensors, backward=False)
