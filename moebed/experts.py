"""Routed experts, and the one seam where the backend of their products is chosen.

T tokens, E experts, K experts per token, H hidden, F expert intermediate, R slots of the sorted order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.config import LayerConfig, ModelConfig
from moebed.errors import ConfigError
from moebed.grouped import CPU_ALIGN, from_slots, grouped_mm, sort_by_expert, to_slots
from moebed.routers import Routing

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Experts(nn.Module):
    """E gated FFNs side by side: E_e(x) = (act(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ.

    The matrices are stored fused as in Hugging Face's recent MoE classes: ``gate_up_proj (E, 2F, H)``, gate first,
    and ``down_proj (E, H, F)``.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_experts, width = layer.num_experts, layer.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.hidden_act: str = config.hidden_act
        self.activation = ACTIVATIONS[config.hidden_act]
        self.backend = BACKENDS[resolve_backend(config.experts_backend)]

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the chosen experts' outputs for tokens x (T, H): (T, H)."""
        if routing.outputs is not None:
            return torch.einsum("tk,tkh->th", routing.topk_weight.to(routing.outputs.dtype), routing.outputs)
        return self.backend(self, x, routing)

    def each(self, x: Tensor, topk_index: Tensor) -> Tensor:
        """Outputs (T, K, H) of the experts topk_index (T, K) for tokens x (T, H), not weighted; differentiable."""
        num_tokens, top_k = topk_index.shape
        rows = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)  # (T·K, H) each choice a token of its own
        index = topk_index.flatten().unsqueeze(1)
        ones = torch.ones(index.shape, dtype=torch.float32, device=x.device)
        return self(rows, Routing(ones, ones, index, ones)).unflatten(0, (num_tokens, top_k))

    def matrix(self, name: str) -> Tensor:
        """One matrix of all experts: ``gate`` and ``up`` are (E, F, H), ``down`` is (E, H, F); a view, not a copy."""
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": self.down_proj}[name]

    def activate(self, expert: int, x: Tensor) -> Tensor:
        """act(x W_gateᵀ) of one expert on tokens x (T, H): (T, F)."""
        return self.activation(F.linear(x, self.matrix("gate")[expert]))

    def finish(self, expert: int, x: Tensor, activated: Tensor) -> Tensor:
        """Output of one expert from its activations (T, F): (T, H), not weighted."""
        return F.linear(activated * F.linear(x, self.matrix("up")[expert]), self.down_proj[expert])


def _loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """One expert after another on its own tokens: the plain reference that the other backends are held to."""
    out = torch.zeros_like(x)
    for expert in range(experts.num_experts):
        token, choice = torch.where(routing.topk_index == expert)
        rows = x[token]
        result = experts.finish(expert, rows, experts.activate(expert, rows))
        weighted = result * routing.topk_weight[token, choice, None].to(result.dtype)
        out = out.index_add(0, token, weighted.to(out.dtype))
    return out


def _grouped_mm(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """All experts in two grouped products over tokens sorted by expert (see moebed.grouped)."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    align = CPU_ALIGN if device == "cpu" else 1
    dispatch = sort_by_expert(routing.topk_index, routing.topk_weight, experts.num_experts, align)
    rows = to_slots(x.to(dtype), dispatch)  # (R, H)
    gate, up = grouped_mm(rows, experts.gate_up_proj.to(dtype), dispatch.offsets).chunk(2, dim=-1)  # (R, F)
    hidden = experts.activation(gate) * up * dispatch.slot_weight.to(dtype).unsqueeze(-1)  # (R, F)
    result = grouped_mm(hidden, experts.down_proj.to(dtype), dispatch.offsets)  # (R, H)
    return from_slots(result, dispatch)


def _triton(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The fused kernels of ``triton_kernels``, on a GPU or in Triton's interpreter."""
    from triton_kernels.mlp import expert_mlp
    from triton_kernels.mlp.checks import runs_on_cpu

    if x.device.type == "cpu" and not runs_on_cpu():
        raise ConfigError(
            "experts_backend triton runs on a GPU; on a CPU set TRITON_INTERPRET=1 (slow, for tests), or choose auto"
        )
    matrices = experts.gate_up_proj, experts.down_proj
    return expert_mlp(x, *matrices, routing.topk_index, routing.topk_weight, experts.hidden_act)


BACKENDS: dict[str, Callable[[Experts, Tensor, Routing], Tensor]] = {
    "grouped_mm": _grouped_mm,
    "loop": _loop,
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
    return name


def _check_kernels_are_ours() -> None:
    """Refuse another distribution's ``triton_kernels``: Triton's own repository ships one under that name."""
    import triton_kernels

    if "expert_mlp" not in getattr(triton_kernels, "__all__", ()):
        where = getattr(triton_kernels, "__file__", None) or next(iter(triton_kernels.__path__))
        raise ConfigError(
            f"experts_backend triton: {where} is another distribution called triton_kernels; uninstall it, or put"
            " moebed's own folder before it on the path"
        )
