"""Tokens' rows copied into the sorted order, for products that then read them as they read everything else.

Products gather rows at their loads, for nothing more than what the loads cost; where experts are wide, so that many
products read each row, a copy costs less than that (see ``configs.SORTED_FROM``).

T tokens, R = T·K rows, E experts, H hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configs import Config, cdiv
from triton_kernels.launching import launch
from triton_kernels.routing import Metadata


@triton.jit(do_not_specialize=["E"])
def gather_kernel(x, token, offsets, out, E, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """out (R, H) = x (T, H) by token; rows that are no expert's are not written."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tl.load(offsets + E)
    tokens = tl.load(token + rows, mask=inside, other=0).to(tl.int64)
    source = x + tokens[:, None] * H
    target = out + rows.to(tl.int64)[:, None] * H
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        mask = inside[:, None] & (columns < H)[None, :]
        tl.store(target + columns[None, :], tl.load(source + columns[None, :], mask=mask), mask=mask)


def gather(x: Tensor, meta: Metadata, config: Config) -> Tensor:
    """Rows of x (T, H) in the sorted order (R, H); what lies past the last expert's rows means nothing."""
    rows, width = meta.token.shape[0], x.shape[1]
    out = x.new_empty(rows, width)
    launch(
        gather_kernel, (cdiv(rows, config.gather_rows),), x, meta.token, meta.offsets, out,
        meta.offsets.shape[0] - 1, H=width, BLOCK_M=config.gather_rows, BLOCK_H=config.gather_columns,
    )  # fmt: skip
    return out
