"""float32 that stays float32: under autocast, where a process lets products be rounded, and where a module is cast.

``torch.set_float32_matmul_precision("high")``, which training asks for, rounds float32 products to TF32 on GPUs from
Ampere on, and ``"medium"`` to bfloat16 on CPUs that have units for it. What decides between experts, and what is
reported, is to be had without.

N rows, H columns, E rows of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moebed.machine.precision import multiplies_bf16_faster


@contextmanager
def exact_products(is_bf16: bool = False) -> Iterator[None]:
    """Products of float32 tensors that lose nothing, whatever the process has set.

    Args:
        is_bf16: All values are those of bfloat16: rounding the operands to it changes nothing then, products are exact
            in float32 and are summed there. A CPU that multiplies bfloat16 no faster than float32 is given float32.
    """
    wanted: tuple[tuple[Any, str], ...] = (
        (torch.backends.mkldnn.matmul, "bf16" if is_bf16 and multiplies_bf16_faster() else "ieee"),  # type: ignore[attr-defined]
        (torch.backends.cuda.matmul, "tf32" if is_bf16 else "ieee"),
    )
    before = [backend.fp32_precision for backend, _ in wanted]
    try:
        for backend, precision in wanted:
            backend.fp32_precision = precision
        yield
    finally:
        for (backend, _), precision in zip(wanted, before, strict=True):
            backend.fp32_precision = precision


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, H) times weight (E, H) transposed, in float32, and so are both gradients: (N, E)."""
    x, weight = x.float(), weight.float()
    # A graph cannot hold a change of the setting: there the product is one node, which costs more in eager mode.
    return _compiled_product(x, weight.t()) if torch.compiler.is_compiling() else _Product.apply(x, weight.t())


def _product(a: Tensor, b: Tensor) -> Tensor:
    kind = a.device.type
    cast = (
        torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    )  # meta has none
    with cast, exact_products():
        return a @ b


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    return (
        _product(grad, b.t()) if ctx.needs_input_grad[0] else None,
        _product(a.t(), grad) if ctx.needs_input_grad[1] else None,
    )


@torch.library.custom_op("moebed::float32_product", mutates_args=())
def _compiled_product(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b)


@_compiled_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _compiled_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    return (
        _compiled_product(grad, b.t()) if ctx.needs_input_grad[0] else None,
        _compiled_product(a.t(), grad) if ctx.needs_input_grad[1] else None,
    )


_compiled_product.register_autograd(
    _compiled_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Float32Buffers(nn.Module):
    """A module whose float32 buffers stay float32 where it is cast: by ``.to()``, and by ``trainer.precision``.

    A state that is added to in small steps stops where a step is less than the last digit: in bfloat16 a bias that
    grows by .001 stops at .5.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: state for name, state in self._buffers.items() if state is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before.dtype == torch.float32 and after is not None and after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        return self


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``move`` does to a tensor's place, without what it does to its dtype."""

    def moved(state: Tensor) -> Tensor:
        there = move(state)
        return there if there.dtype == state.dtype else state.to(there.device)

    return moved
