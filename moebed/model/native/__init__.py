"""The experts backend ``native``: the whole expert MLP on a CPU, compiled on first use, forward and backward.

One source, compiled for the instruction set that the processor has: AVX2, AVX-512, AVX512-BF16 or AMX. It computes in
float32 and in bf16 and takes float32 or bf16 weights as they are; where there are no bf16 products, bf16 values are
multiplied as float32. It is an option that needs g++ and nothing else (``moebed.model.native.compiled``): where it
cannot be had, ``load`` says why and the ``grouped_mm`` backend serves instead.

What limits PyTorch's own instruction sets limits these: ``ATEN_CPU_CAPABILITY`` (``avx2``) and ``ONEDNN_MAX_CPU_ISA``
(``AVX2``, ``AVX512_CORE``, ``AVX512_CORE_BF16``), so that a machine can behave as a smaller one.

T tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebed.machine.settled import settled
from moebed.model.native import compiled

MULTIPLE = {torch.float32: 16, torch.bfloat16: 32}  # of hidden size and width, by the type computed in
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # in the order of experts.cpp
# The highest of ours that a value of ONEDNN_MAX_CPU_ISA allows, by how the value begins; the first that fits counts.
_ONEDNN = (
    ("AVX512_CORE_AMX", "amx"),
    ("AVX10_1_512_AMX", "amx"),
    ("AVX512_CORE_BF16", "avx512_bf16"),
    ("AVX512_CORE_FP16", "avx512_bf16"),
    ("AVX10_1_512", "avx512_bf16"),
    ("AVX512", "avx512"),
    ("AVX2", "avx2"),
    ("AVX", None),
    ("SSE", None),
)

# Where `auto` takes the backend: it was faster than grouped_mm, forward and backward, at most of the sizes A, F, B, and
# nowhere slower beyond the noise. grouped_mm's time over native's, two cores with AMX, under the limits named above.
# float32 by `moebed bench experts --rounds 3 --steps 1`: AVX2 1.13, 1.30, .98; AVX-512 1.23, 1.33, 1.18, whose products
# the two larger sets share. bf16 by 5 rounds of that command's own steps (autocast), native and grouped_mm alone:
# AVX512-BF16 1.27, 1.53, 1.20; AMX 1.68, 1.99, 1.36. Not measured: bf16 with AVX2 and AVX-512.
FASTEST = frozenset(
    {
        ("avx2", torch.float32),
        ("avx512", torch.float32),
        ("avx512_bf16", torch.float32),
        ("avx512_bf16", torch.bfloat16),
        ("amx", torch.float32),
        ("amx", torch.bfloat16),
    }
)
# For auto: rows of an expert on average, and elements of a matrix, since each call packs the weights anew.
LEAST_ROWS = 16
LARGEST = {("avx2", torch.float32): 2**20}


def processor() -> str | None:
    """The best instruction set that processor and environment allow, a name of ``compiled.FLAGS``; None below AVX2."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    highest = next((name for start, name in _ONEDNN if limit.startswith(start)), "amx")
    capability = torch.backends.cpu.get_cpu_capability()  # limited by ATEN_CPU_CAPABILITY
    has = {
        "avx2": capability in ("AVX2", "AVX512"),
        "avx512": capability == "AVX512",
        "avx512_bf16": capability == "AVX512" and torch.cpu._is_avx512_bf16_supported(),
        "amx": capability == "AVX512" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx(),
    }
    names = list(compiled.FLAGS)
    allowed = names[: names.index(highest) + 1] if highest else []
    return next((name for name in reversed(allowed) if has[name]), None)


@functools.cache
def instruction_set() -> str | None:
    """What the backend is compiled for in this process: ``processor()``'s, or the next below that the compiler has."""
    best = processor()
    names = list(compiled.FLAGS)
    below = reversed(names[: names.index(best) + 1]) if best else []
    return next((name for name in below if compiled.is_there(name) or compiled.compiler_takes(name)), best)


@functools.cache
def load() -> str | None:
    """Compile the backend, or take it from the cache; None, or in a line why it cannot be had."""
    name = instruction_set()
    if name is None:
        return "the processor has no AVX2 and FMA, or the environment forbids them"
    try:
        compiled.library(name)
    except compiled.Unavailable as error:
        return str(error)
    return None


@settled
def is_fastest(dtype: torch.dtype, elements: int = 0) -> bool:
    """Whether the backend is the fastest measured one for a type on this machine, and is there; compiles it if need be.

    Where it cannot be had, the answer is no and nothing is said: nobody asked for it.

    Args:
        dtype: What is computed in.
        elements: Of an expert's down projection, H·F.
    """
    asked = instruction_set(), dtype
    return asked in FASTEST and elements <= LARGEST.get(asked, elements) and load() is None


def unfit(x: Tensor, dtype: torch.dtype, gate_up: Tensor, down: Tensor) -> str | None:
    """None if the backend is made for tokens x (T, H) and these matrices, computed in dtype; else why not."""
    if x.device.type != "cpu":
        return f"it computes on a CPU, the tokens are on {x.device.type}"
    if dtype not in MULTIPLE:
        return f"it computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    weights = (torch.float32,) if dtype == torch.float32 else (torch.float32, torch.bfloat16)
    if gate_up.dtype != down.dtype or gate_up.dtype not in weights:
        return f"its weights cannot be {gate_up.dtype} and {down.dtype} where it computes in {dtype}"
    hidden, width = down.shape[1:]
    if hidden % MULTIPLE[dtype] or width % MULTIPLE[dtype]:
        return f"hidden size {hidden} and width {width} must be multiples of {MULTIPLE[dtype]}"
    return None


def _call(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, activation: str, ragged: bool
) -> compiled.Call:
    name = instruction_set()
    assert name is not None
    sizes = {
        "tokens": x.shape[0],
        "hidden": x.shape[1],
        "width": down.shape[2],
        "experts": down.shape[0],
        "top_k": index.shape[1],
    }
    types = {"bf16_rows": x.dtype == torch.bfloat16, "bf16_weights": down.dtype == torch.bfloat16}
    choices = {"ragged": ragged, "activation": ACTIVATIONS.index(activation), "threads": torch.get_num_threads()}
    inputs = {"x": x, "gate_up": gate_up, "down": down, "index": index, "weight": weight}
    return compiled.Call(name, {**sizes, **types, **choices}, {k: v.contiguous() for k, v in inputs.items()})


@torch.library.custom_op("moebed::expert_mlp", mutates_args=())
def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, activation: str, ragged: bool
) -> tuple[Tensor, Tensor]:
    call = _call(x, gate_up, down, index, weight, activation, ragged)
    out, before = _forward_shapes(x, gate_up, down, index, weight, activation, ragged)
    call.run(backward=False, out=out, before=before)
    return out, before


@_forward.register_fake
def _forward_shapes(x, gate_up, down, index, weight, activation, ragged):
    return x.new_empty(x.shape), x.new_empty(index.numel(), gate_up.shape[1])


@torch.library.custom_op("moebed::expert_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    before: Tensor,
    activation: str,
    ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call(x, gate_up, down, index, weight, activation, ragged)
    grads = _backward_shapes(grad, x, gate_up, down, index, weight, before, activation, ragged)
    outputs = dict(zip(("grad_x", "grad_gate_up", "grad_down", "grad_weight"), grads, strict=True))
    call.run(backward=True, grad=grad.contiguous(), before=before, **outputs)
    return grads


@_backward.register_fake
def _backward_shapes(grad, x, gate_up, down, index, weight, before, activation, ragged):
    return tuple(each.new_empty(each.shape) for each in (x, gate_up, down, weight))


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, index, weight, activation, ragged):
        out, before = torch.ops.moebed.expert_mlp(x, gate_up, down, index, weight, activation, ragged)
        ctx.save_for_backward(x, gate_up, down, index, weight, before)
        ctx.choices = activation, ragged
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.moebed.expert_mlp_backward(grad, *ctx.saved_tensors, *ctx.choices)
        return grads[0], grads[1], grads[2], None, grads[3], None, None


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    activation: str,
    ragged: bool = False,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs; differentiable once, in all but index.

    Args:
        x: (T, H), float32 or bf16, the type computed in.
        gate_up: (E, 2F, H), gate first; bf16 or float32, and so is its gradient.
        down: (E, H, F), likewise.
        index: (T, K), experts of each token.
        weight: (T, K), float32.
        activation: one of ACTIVATIONS.
        ragged: An assignment of weight 0 is none: nothing is computed for it, and its weight gets no gradient.

    Returns:
        (T, H), of x's type.

    Raises:
        RuntimeError: index names an expert that is not there.
    """
    return _ExpertMLP.apply(x, gate_up, down, index, weight, activation, ragged)
