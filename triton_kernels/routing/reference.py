"""Routing metadata by ``torch.sort``: what the kernels are held to."""

import torch
from torch import Tensor


def route(index: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, ...]:
    """The tensors of :class:`triton_kernels.routing.Metadata` for index (T, K), in the same order."""
    size, top_k = index.numel(), index.shape[1]
    expert, order = torch.sort(index.flatten(), stable=True)
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(size))
    offsets = torch.searchsorted(expert, torch.arange(num_experts + 1))
    tiles = [
        (e, start)
        for e in range(num_experts)
        for start in range(int(offsets[e]), int(offsets[e + 1]), block_rows)
    ]  # fmt: skip
    count = torch.tensor([len(tiles)], dtype=torch.int32)
    present = min(num_experts, size)
    tiles += [(-1, 0)] * ((size + present * (block_rows - 1)) // block_rows - len(tiles))
    table = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2)
    order, token, slot, offsets = (t.to(torch.int32) for t in (order, order // top_k, slot, offsets))
    return order, token, slot, offsets, table[:, 0].contiguous(), table[:, 1].contiguous(), count
