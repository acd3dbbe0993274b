"""What is refused before any launch, and what goes to the reference instead of the kernels.

T tokens, K experts per token, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from triton_kernels.mlp.fallback import SWITCH, switch
from triton_kernels.mlp.reference import ACTIVATIONS

ALIGNMENT = 8  # elements: 16 bytes of the 2-byte types
OLDEST = (8, 0)
MOST_ROWS = 2**31 - 2**16  # a last block that is not full still counts in 32 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor, activation: str
) -> None:  # fmt: skip
    """Raise ValueError, in one line, for arguments that no implementation could make sense of."""
    for name, tensor in (
        ("x", x),
        ("gate_up", gate_up),
        ("down", down),
        ("topk_index", topk_index),
        ("topk_weight", topk_weight),
    ):
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"expert_mlp: {name} is a DTensor: give whole tensors, as fully_shard does in a module's forward, or"
                " your own rank's share by to_local()"
            )
    for name, tensor, dims in (
        ("x", x, "(T, H)"),
        ("gate_up", gate_up, "(E, 2F, H)"),
        ("down", down, "(E, H, F)"),
        ("topk_index", topk_index, "(T, K)"),
        ("topk_weight", topk_weight, "(T, K)"),
    ):
        if tensor.ndim != dims.count(",") + 1:
            raise ValueError(f"expert_mlp: {name} must be {dims}, not {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"expert_mlp: {name} is on {tensor.device} but x is on {x.device}")
    num_experts, both, width = gate_up.shape
    if num_experts == 0:
        raise ValueError("expert_mlp: E = 0: gate_up has no expert to route to")
    if both % 2 or x.shape[1] != width or down.shape != (num_experts, width, both // 2):
        raise ValueError(
            f"expert_mlp: x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit"
            " (T, H), (E, 2F, H) and (E, H, F)"
        )
    if topk_index.shape != topk_weight.shape or len(topk_index) != len(x):
        raise ValueError(
            f"expert_mlp: topk_index {tuple(topk_index.shape)} and topk_weight {tuple(topk_weight.shape)} are not both"
            f" (T, K) with T = {len(x)}"
        )
    if topk_index.is_floating_point() or topk_index.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(f"expert_mlp: topk_index must hold integers, not {topk_index.dtype}")
    for name, tensor in (("x", x), ("gate_up", gate_up), ("down", down), ("topk_weight", topk_weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"expert_mlp: {name} must be floating point, not {tensor.dtype}")
    if not (x.dtype == gate_up.dtype == down.dtype):
        raise ValueError(
            f"expert_mlp: x is {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}: cast them to one, or use autocast"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_mlp: unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


# Settled once in a process; torch.compile takes the answers as constants rather than tracing into the questions.
@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return _find_triton()


@torch.compiler.assume_constant_result
def runs_on_cpu() -> bool:
    """Whether the kernels run in Triton's interpreter, the one way that they run on a CPU."""
    return has_triton() and _is_interpreted()


@torch.compiler.assume_constant_result
def has_autocast(device: str) -> bool:
    """Whether autocast knows this type of device; torch.compile of PyTorch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device)


@torch.compiler.assume_constant_result
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None on ROCm, whose numbers mean something else."""
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def why_not_interpreted() -> str | None:
    """What is wrong with the interpreter, where the kernels run in it."""
    from triton_kernels.precision import interpreter_fault

    return interpreter_fault()


@cache
def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


@cache
def _is_interpreted() -> bool:
    from triton_kernels.precision import interpreted

    return interpreted()


def why_not(x: Tensor, gate_up: Tensor, top_k: int) -> str | None:
    """Why these arguments go to the reference, or None where the kernels take them."""
    num_experts, both, width = gate_up.shape
    if switch() == "forbid":
        return f"{SWITCH}=forbid"
    if not has_triton():
        return "Triton is not installed"
    if x.dtype not in DTYPES:
        return f"the kernels multiply float32, float16 and bfloat16, not {x.dtype}"
    if width % ALIGNMENT or (both // 2) % ALIGNMENT or not width or not both:
        return f"H = {width} and F = {both // 2} must be positive multiples of {ALIGNMENT}"
    if not len(x) or not top_k:
        return "there is no token to route"
    if len(x) * top_k > MOST_ROWS or num_experts * width > MOST_ROWS:
        return f"T·K = {len(x) * top_k} and E·H = {num_experts * width} must not pass {MOST_ROWS}"
    if x.device.type == "cuda":
        capability = capability_of(x.device)
        if capability is not None and capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    elif x.device.type != "cpu" or not runs_on_cpu():
        return f"the kernels run on a GPU; on {x.device.type} they need TRITON_INTERPRET=1 before Triton is imported"
    else:
        return why_not_interpreted()
    return None


def check_index(index: Tensor, num_experts: int, ragged: bool = False) -> None:
    """Refuse an index outside [0, E), or where ragged outside [-1, E), before anything is computed.

    Raises:
        ValueError: on a CPU. On a GPU it is a device-side assertion, since waiting would stall every layer.
    """
    wide = index.long()
    inside = ((wide >= (-1 if ragged else 0)) & (wide < num_experts)).all()
    check_inside(inside, index, num_experts, ragged)


def check_inside(inside: Tensor, index: Tensor, num_experts: int, ragged: bool) -> None:
    """Refuse an index (T, K) of which the routing, or ``check_index``, found inside () or (1,) to be 0.

    Raises:
        ValueError: on a CPU. On a GPU it is a device-side assertion, queued before the products, since waiting for the
            answer would stall every layer; the kernels leave out such an assignment and read nothing out of bounds.
    """
    if index.device.type != "cpu":
        torch._assert_async(inside)
    elif not inside:
        low, high = index.long().aminmax()
        absent = " (-1 for no expert)" if ragged else ""
        raise ValueError(f"expert_mlp: topk_index spans {low} to {high}, outside the {num_experts} experts{absent}")
