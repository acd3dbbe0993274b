"""float64 where the device has it, and in main memory where it does not: Apple's GPUs have none."""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT = ("mps",)


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can lie on a device."""
    return device.type not in _WITHOUT


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64, of any shape; in main memory if its device has no float64."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()
