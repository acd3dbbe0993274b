"""Sums over a token's K rows, in their order and without atomics: two runs agree in every bit.

T tokens, K experts per token, R = T·K rows, H hidden.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "K"])
def combine_kernel(
    rows, slot, weight, out, num_tokens, K,
    H: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out (T, H) = Σ_k weight[t, k] · rows[slot[t, k]]; a slot of -1 adds nothing."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    inside = tokens < num_tokens
    for k in range(K):
        # T·K fits int32 (checked before the launch); T·K·H need not.
        row = tl.load(slot + tokens * K + k, mask=inside, other=-1)
        mask = (row >= 0)[:, None] & (columns < H)[None, :]
        value = tl.load(rows + row.to(tl.int64)[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + tokens * K + k, mask=inside, other=0.0)[:, None]
        total += value
    mask = inside[:, None] & (columns < H)[None, :]
    target = out + tokens.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
