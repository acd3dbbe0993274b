"""Parameters of which each rank may hold a part: set from, and gathered to, the whole that they are parts of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, of which this rank may hold a part, to the full value that every rank has."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(value.to_local())
    else:
        parameter.copy_(value)


def whole(parameter: Tensor) -> Tensor:
    """A parameter in full, gathered from the ranks that hold parts of it; all of them call this together."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
