"""Weighted combine of a token's rows, and its unweighted twin for dX."""

from __future__ import annotations

from torch import Tensor

from triton_kernels.combine.kernels import combine_kernel
from triton_kernels.configs import Config, cdiv, power_of_two
from triton_kernels.launching import launch


def combine(rows: Tensor, slot: Tensor, weight: Tensor | None, top_k: int, config: Config) -> Tensor:
    """Sum each token's rows.

    Args:
        rows: (R, H) contiguous, in the sorted order.
        slot: (R,) int32, row of each assignment.
        weight: (T, K) float32, or None for a plain sum.
        top_k: K.
        config: tile sizes.

    Returns:
        (T, H), of the dtype of rows; summed in float32.
    """
    width, num_tokens = rows.shape[1], slot.shape[0] // top_k
    out = rows.new_empty(num_tokens, width)
    columns = min(config.combine_columns, power_of_two(width))
    grid = (cdiv(num_tokens, config.combine_tokens), cdiv(width, columns))
    launch(
        combine_kernel, grid, rows, slot, slot if weight is None else weight, out, num_tokens, top_k,
        H=width, WEIGHTED=weight is not None, BLOCK_T=config.combine_tokens, BLOCK_H=columns,
    )  # fmt: skip
    return out
