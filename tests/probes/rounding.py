"""Another device's rounding, on a CPU: results of floating point that come out a little different, each on its own.

A GPU sums in another order, and not in the same one for every row of a matrix: what is equal on a CPU, such as two
tokens that have seen the same ids, is equal there but for rounding. So a number that hangs on which of them is the
larger is no number of the model's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations by name. Of a sum, what is off is a share of the largest of its row; else a share of the number itself.
SUMS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "_grouped_mm", "index_add_", "cumsum"}
SUMS_BEGIN = ("_scaled_dot_product", "_linalg", "linalg_qr", "linalg_svd")
FUNCTIONS = {
    *("sum", "mean", "var", "std", "linalg_vector_norm", "native_layer_norm", "_softmax", "_log_softmax", "logsumexp"),
    *("exp", "log", "pow", "sqrt", "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "sigmoid", "silu", "gelu", "tanh", "erf"),
    *("softplus", "sin", "cos", "acos", "acos_", "xlogy", "logaddexp", "addcmul_"),
}


class Rounding(TorchDispatchMode):
    """Within it, results of sums, products and functions differ in their last place, by the seed.

    What is a whole number stays: sums of counts are exact on any device.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.reached: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        space, name = func.namespace, func.overloadpacket.__name__
        summed = name in SUMS or name.startswith(SUMS_BEGIN) or space != "aten"
        if summed or name in FUNCTIONS:
            for one in found if isinstance(found, tuple | list) else (found,):
                if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
                    self._round(one, summed)
            self.reached.add(f"{space}::{name}")
        return found

    def _round(self, values: Tensor, summed: bool) -> None:
        size = values.abs()
        if summed and values.ndim:
            size = size.amax(dim=-1, keepdim=True)
        step = torch.finfo(values.dtype).eps
        noise = torch.rand(values.shape, generator=self.generator, dtype=torch.float32).to(values.dtype) * 2 - 1
        values.copy_(torch.where(values == values.round(), values, values + step * size * noise))
