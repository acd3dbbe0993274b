"""Routed experts, and the one seam where the backend of their products is chosen.

T tokens, E experts, K experts per token, H hidden, F expert intermediate, R slots of the sorted order.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed import native
from moebed.config import LayerConfig, ModelConfig
from moebed.errors import ConfigError
from moebed.grouped import CPU_ALIGN, compute_dtype, from_slots, grouped_mm, sort_by_expert, to_slots
from moebed.routers import Routing

if TYPE_CHECKING:
    from moebed.parallel.exchange import TokenExchange

log = logging.getLogger(__name__)

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Experts(nn.Module):
    """E gated FFNs side by side: E_e(x) = (act(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ.

    The matrices are stored fused as in Hugging Face's recent MoE classes: ``gate_up_proj (E, 2F, H)``, gate first,
    and ``down_proj (E, H, F)``. Where they are spread over ranks (see moebed.parallel) both are DTensors, split on
    their first axis, and ``exchange`` takes tokens to their experts and back.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_experts, width = layer.num_experts, layer.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.hidden_act: str = config.hidden_act
        self.activation = ACTIVATIONS[config.hidden_act]
        self.backend = BACKENDS[resolve_backend(config.experts_backend)]
        self.exchange: TokenExchange | None = None

    def forward(self, x: Tensor, routing: Routing, beside: Callable[[], Tensor] | None = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs for tokens x (T, H): (T, H).

        Args:
            x: (T, H).
            routing: The router's decisions on them.
            beside: Something to compute while tokens travel, where experts are on other ranks; it is added, (T, H).
        """
        finish: Callable[[], Tensor] = partial(self.backend, self, x, routing)
        if self.exchange is not None:
            finish = self.exchange.begin(self, x, routing)
        if beside is None:
            return finish()
        other = beside()
        return finish() + other

    @property
    def local(self) -> tuple[Tensor, Tensor]:
        """gate_up_proj and down_proj of this process's own experts: of all E, unless they are spread over ranks."""
        if self.exchange is None:
            return self.gate_up_proj, self.down_proj
        return self.exchange.owned(self.gate_up_proj), self.exchange.owned(self.down_proj)

    def matrix(self, name: str) -> Tensor:
        """One matrix of all own experts: ``gate`` and ``up`` (E, F, H), ``down`` (E, H, F); a view, not a copy."""
        gate_up, down = self.local
        gate, up = gate_up.chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": down}[name]

    def activate(self, expert: int, x: Tensor) -> Tensor:
        """act(x W_gateᵀ) of one expert on tokens x (T, H): (T, F)."""
        return self.activation(F.linear(x, self.matrix("gate")[expert]))

    def finish(self, expert: int, x: Tensor, activated: Tensor) -> Tensor:
        """Output of one expert from its activations (T, F): (T, H), not weighted."""
        return F.linear(activated * F.linear(x, self.matrix("up")[expert]), self.matrix("down")[expert])


def _loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """One expert after another on its own tokens: the plain reference that the other backends are held to."""
    out = torch.zeros_like(x)
    for expert in range(len(experts.matrix("down"))):
        token, choice = torch.where(routing.topk_index == expert)
        rows = x[token]
        result = experts.finish(expert, rows, experts.activate(expert, rows))
        weighted = result * routing.topk_weight[token, choice, None].to(result.dtype)
        out = out.index_add(0, token, weighted.to(out.dtype))
    return out


def _grouped_mm(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """All experts in two grouped products over tokens sorted by expert (see moebed.grouped)."""
    dtype = compute_dtype(x)
    align = CPU_ALIGN if x.device.type == "cpu" else 1
    gate_up, down = experts.local
    dispatch = sort_by_expert(routing.topk_index, routing.topk_weight, len(down), align)
    rows = to_slots(x.to(dtype), dispatch)  # (R, H)
    gate, up = grouped_mm(rows, gate_up.to(dtype), dispatch.offsets).chunk(2, dim=-1)  # (R, F)
    hidden = experts.activation(gate) * up * dispatch.slot_weight.to(dtype).unsqueeze(-1)  # (R, F)
    result = grouped_mm(hidden, down.to(dtype), dispatch.offsets)  # (R, H)
    return from_slots(result, dispatch)


def _native(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The compiled extension for CPUs with AVX512-BF16; what it is not made for takes ``grouped_mm``."""
    dtype = compute_dtype(x)
    matrices = experts.local
    if not native.fits(x, dtype, *matrices):
        return _grouped_mm(experts, x, routing)
    weight = routing.topk_weight.float()
    return native.expert_mlp(x.to(dtype), *matrices, routing.topk_index, weight, experts.hidden_act)


def _triton(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The fused kernels of ``triton_kernels``, on a GPU or in Triton's interpreter."""
    from triton_kernels.mlp import expert_mlp
    from triton_kernels.mlp.checks import runs_on_cpu

    if x.device.type == "cpu" and not runs_on_cpu():
        raise ConfigError(
            "experts_backend triton runs on a GPU; on a CPU set TRITON_INTERPRET=1 (slow, for tests), or choose auto"
        )
    return expert_mlp(x, *experts.local, routing.topk_index, routing.topk_weight, experts.hidden_act)


BACKENDS: dict[str, Callable[[Experts, Tensor, Routing], Tensor]] = {
    "grouped_mm": _grouped_mm,
    "loop": _loop,
    "native": _native,
    "triton": _triton,
}


def resolve_backend(name: str) -> str:
    """The backend that a config's name stands for."""
    if name == "auto":
        return "grouped_mm"
    if name not in BACKENDS:
        raise ConfigError(
            f"model config: unknown experts_backend {name!r}; choose auto or one of {', '.join(BACKENDS)}"
        )
    if name == "triton":
        _check_kernels_are_ours()
    if name == "native" and (reason := native.load()) is not None:
        _say_once(f"experts_backend native is not to be had ({reason}); grouped_mm serves instead")
        return "grouped_mm"
    return name


@functools.cache
def _say_once(sentence: str) -> None:
    log.debug(sentence)


def _check_kernels_are_ours() -> None:
    """Refuse another distribution's ``triton_kernels``: Triton's own repository ships one under that name."""
    import triton_kernels

    if "expert_mlp" not in getattr(triton_kernels, "__all__", ()):
        where = getattr(triton_kernels, "__file__", None) or next(iter(triton_kernels.__path__))
        raise ConfigError(
            f"experts_backend triton: {where} is another distribution called triton_kernels; uninstall it, or put"
            " moebed's own folder before it on the path"
        )
