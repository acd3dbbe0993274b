"""The kernels in Triton's interpreter, and the float64 reference that they are held to.

Whether Triton interprets is settled when it is imported and when a kernel is decorated, and another test of the same
worker may have imported it to compile. So this module imports a second copy of Triton and of ``triton_kernels`` under
TRITON_INTERPRET=1 and then puts ``sys.modules`` back; the fixture ``interpreter`` swaps the copy in for one test.

T tokens, K experts per token, E experts, H hidden, F expert intermediate.
"""

import contextlib
import importlib
import importlib.util
import itertools
import os
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

COPIED = ("triton", "triton_kernels")
SHARED = "triton._C"  # the compiled library loads once, and does not know whether it is interpreted
FENCE = 1024
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _take_out() -> dict[str, ModuleType]:
    names = [n for n in sys.modules if n.split(".")[0] in COPIED and not n.startswith(SHARED)]
    return {name: sys.modules.pop(name) for name in names}


_copy: dict[str, ModuleType] = {}


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Within, ``triton`` and ``triton_kernels`` are the interpreted copies, and TRITON_INTERPRET is set."""
    others, before = _take_out(), os.environ.get("TRITON_INTERPRET")
    sys.modules.update(_copy)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        _copy.update(_take_out())
        sys.modules.update(others)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


with interpreting():
    kernels = importlib.import_module("triton_kernels.mlp")
    checks = importlib.import_module("triton_kernels.mlp.checks")
    op = importlib.import_module("triton_kernels.mlp.op")
    precision = importlib.import_module("triton_kernels.precision")
    routing = importlib.import_module("triton_kernels.routing")
    routing_reference = importlib.import_module("triton_kernels.routing.reference")
    combining = importlib.import_module("triton_kernels.combine")
    combine_reference = importlib.import_module("triton_kernels.combine.reference")
    configs = importlib.import_module("triton_kernels.configs")
    up = importlib.import_module("triton_kernels.grouped.up")
    gather = importlib.import_module("triton_kernels.grouped.gather")
    grad_activation = importlib.import_module("triton_kernels.grouped.grad_activation")
    grad_hidden = importlib.import_module("triton_kernels.grouped.grad_hidden")
    parts = importlib.import_module("triton_kernels.grouped.parts")
    grad_weight = importlib.import_module("triton_kernels.grouped.grad_weight")
    pieces = importlib.import_module("triton_kernels.grouped.pieces")
    launching = importlib.import_module("triton_kernels.launching")
    fallback = importlib.import_module("triton_kernels.mlp.fallback")
    triton_interpreter = importlib.import_module("triton.runtime.interpreter")


if (fault := precision.interpreter_fault()) is not None:
    pytest.skip(fault, allow_module_level=True)


def _watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels load and store nowhere but in the tensors that they were given; anything else is an IndexError."""
    builder, executor = triton_interpreter.InterpreterBuilder, triton_interpreter.GridExecutor
    load, store, take = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    patch, patched = triton_interpreter._patch_lang, set()
    allowed: list[np.ndarray] = []

    def patch_once(function):
        """Once a launch: the interpreter does it again at each call of a function, which takes half of its time."""
        home = id(function.__globals__)
        if home not in patched:
            patched.add(home)
            return patch(function)
        return None

    def take_and_remember(self, arguments, named):
        patched.clear()
        taken = take(self, arguments, named)
        tensors = [t for t in (*taken[0], *taken[1].values()) if torch.is_tensor(t) and t.numel()]
        bounds = {(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors}
        allowed[:] = np.array(sorted(bounds), dtype=np.uint64).T
        return taken

    def check(pointers, mask):
        chosen = mask if isinstance(mask, np.ndarray) else mask.data  # older interpreters give descriptors' as they are
        wanted = np.broadcast_to(pointers.data, chosen.shape)[chosen.astype(bool)]
        if not wanted.size:
            return
        width = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        # One instruction serves one tensor.
        low, high = wanted.min(), wanted.max() + width
        if not ((allowed[0] <= low) & (high <= allowed[1])).any():
            raise IndexError("a kernel reached out of the tensors that it was given")

    def watched_load(self, pointers, mask, *rest, **options):
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def watched_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "_init_args_hst", take_and_remember)
    monkeypatch.setattr(triton_interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels are interpreted and watched, and what is allocated without a value holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    _watch(monkeypatch)
    with interpreting():
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def shuffled(interpreter, monkeypatch):
    """Programs run in a random order instead of one after another."""
    builder, dice = triton_interpreter.InterpreterBuilder, random.Random(0)
    orders: dict[tuple[int, ...], dict] = {}

    def set_grid_idx(self, *place):
        if self.grid_dim not in orders:
            places = list(itertools.product(*map(range, self.grid_dim)))
            orders[self.grid_dim] = dict(zip(places, dice.sample(places, len(places)), strict=True))
        self.grid_idx = orders[self.grid_dim][place]

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    return orders


class Case(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    topk_index: Tensor
    topk_weight: Tensor
    activation: str

    @property
    def floating(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.gate_up, self.down, self.topk_weight


def _fenced(tensor: Tensor) -> Tensor:
    """The same values between two stretches of NaN: a read past either end shows."""
    buffer = torch.full((tensor.numel() + 2 * FENCE,), float("nan"), dtype=tensor.dtype)
    inner = buffer[FENCE:-FENCE].view(tensor.shape)
    inner.copy_(tensor)
    return inner.requires_grad_()


def make_case(
    tokens: int,
    num_experts: int,
    top_k: int,
    width: int = 32,
    inter: int = 24,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
    index: Tensor | None = None,
) -> Case:
    """Random arguments; index (T, K) replaces the routing, which is otherwise K distinct experts per token."""
    if index is None:
        index = torch.rand(tokens, num_experts).topk(top_k).indices
    return Case(
        _fenced(torch.randn(tokens, width, dtype=dtype)),
        _fenced(torch.randn(num_experts, 2 * inter, width, dtype=dtype) * width**-0.5),
        _fenced(torch.randn(num_experts, width, inter, dtype=dtype) * inter**-0.5),
        index,
        _fenced(torch.rand(index.shape)),
        activation,
    )


def per_token(case: Case) -> Tensor:
    """Each token by itself, with its own copies of its experts' matrices."""
    gate, up = torch.einsum("tkgh,th->tkg", case.gate_up[case.topk_index], case.x).chunk(2, dim=-1)
    hidden = ACTIVATIONS[case.activation](gate) * up
    return torch.einsum("tkhf,tkf,tk->th", case.down[case.topk_index], hidden, case.topk_weight)


def run(case: Case, function=None) -> list[Tensor]:
    """The output and the gradients of x, gate_up, down and topk_weight."""
    out = (function or kernels.expert_mlp)(*case)
    target = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * target.to(out.dtype)).sum(), case.floating)]


def reference(case: Case) -> list[Tensor]:
    """What ``run`` should return, in float64."""
    wide = [t.detach().double().requires_grad_() for t in case.floating]
    return run(Case(*wide[:3], case.topk_index, wide[3], case.activation), lambda *args: per_token(Case(*args)))


def errors(case: Case, function=None) -> list[float]:
    """Relative error of each of ``run``'s tensors, in the Frobenius norm; NaN counts as infinite."""
    pairs = zip(run(case, function), reference(case), strict=True)
    return [float(torch.nan_to_num((a - b).norm() / b.norm().clamp_min(1e-12), nan=torch.inf)) for a, b in pairs]
