"""Routed experts, and the one seam where the backend of their products is chosen.

T tokens, E experts, K experts per token, H hidden, F expert intermediate, R slots of the sorted order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.errors import ConfigError
from moebed.model import native
from moebed.model.config import LayerConfig, ModelConfig
from moebed.model.fused import ACTIVATIONS, Activation, gated
from moebed.model.grouped import (
    alignment,
    carried_to_slots,
    compute_dtype,
    from_slots,
    grouped_mm,
    sort_by_expert,
    to_slots,
)
from moebed.model.routers import ROUTERS, Routing

# Rows in segments, and matrices (E, B, A) of all experts -> each row's product with its own expert's.
Product = Callable[[Tensor, Tensor], Tensor]


class Exchange(Protocol):
    """What experts that are spread over X ranks need of them: this rank owns E/X of the E.

    Attributes:
        size: X.
    """

    size: int

    def owned(self, matrix: Tensor) -> Tensor:
        """This rank's part (E/X, ...) of a matrix (E, ...); differentiable."""

    def of_all(self, rows: Tensor) -> Tensor:
        """Rows (E/X, ·) of this rank's experts with those of all others in their order, (E, ·); differentiable."""

    def begin(self, experts: Experts, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start sending the tokens x (T, H); what it returns waits for them and gives the layer's outputs (T, H)."""


class Experts(nn.Module):
    """E gated FFNs side by side: E_e(x) = (act(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ.

    The matrices are stored fused as in Hugging Face's recent MoE classes: ``gate_up_proj (E, 2F, H)``, gate first,
    and ``down_proj (E, H, F)``. Where they are spread over ranks (see moebed.parallel) both are DTensors, split on
    their first axis, and ``exchange`` takes tokens to their experts and back.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_experts, width = layer.num_experts, layer.moe_intermediate_size
        self.add_gate_and_up(config, width)
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.hidden_act: str = config.hidden_act
        self.activation: Activation = ACTIVATIONS[config.hidden_act]
        self.backend = resolve_backend(config.experts_backend)
        self.exchange: Exchange | None = None

    def add_gate_and_up(self, config: ModelConfig, width: int) -> None:
        """Add the parameters of the two projections into the experts' width F."""
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))

    def forward(self, x: Tensor, routing: Routing, beside: Callable[[], Tensor] | None = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs for tokens x (T, H): (T, H).

        Args:
            x: (T, H).
            routing: The router's decisions on them.
            beside: Something to compute while tokens travel, where experts are on other ranks; it is added, (T, H).
        """
        finish: Callable[[], Tensor] = partial(self.backend, self, x, routing)
        if routing.outputs is not None:  # the router ran them
            finish = partial(_weighted_sum, routing.topk_weight, routing.outputs)
        elif self.exchange is not None:
            finish = self.exchange.begin(self, x, routing)
        if beside is None:
            return finish()
        other = beside()
        return finish() + other

    def own(self, matrix: Tensor) -> Tensor:
        """A parameter's part of this process's own experts: of all E, unless they are spread over ranks."""
        return matrix if self.exchange is None else self.exchange.owned(matrix)

    @property
    def num_own(self) -> int:
        """How many experts this process has."""
        return self.num_experts if self.exchange is None else self.num_experts // self.exchange.size

    def each(self, x: Tensor, topk_index: Tensor, carried: Tensor | None = None) -> Tensor:
        """Outputs (T, K, H) of the experts topk_index (T, K) for tokens x (T, H), not weighted; differentiable.

        Args:
            x: (T, H).
            topk_index: (T, K).
            carried: (T, K, C) where the experts go on from what their router carries.
        """
        num_tokens, top_k = topk_index.shape
        rows = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)  # (T·K, H) each choice a token of its own
        index = topk_index.flatten().unsqueeze(1)
        ones = torch.ones(index.shape, dtype=torch.float32, device=x.device)
        if carried is not None:
            carried = carried.flatten(0, 1).unsqueeze(1)  # (T·K, 1, C)
        return self(rows, Routing(ones, ones, index, ones, carried)).unflatten(0, (num_tokens, top_k))

    def mean_neurons(self) -> dict[str, Tensor]:
        """Means (E, ·) of each expert's rows of ``gate`` and of ``up``, and of its columns of ``down``; float32."""
        axes = {"gate": 1, "up": 1, "down": 2}
        means = {name: self.matrix(name).mean(dim=axis, dtype=torch.float32) for name, axis in axes.items()}
        if self.exchange is None:
            return means
        return {name: self.exchange.of_all(mean) for name, mean in means.items()}

    def matrix(self, name: str) -> Tensor:
        """One matrix of all own experts: ``gate`` and ``up`` (E, F, H), ``down`` (E, H, F); a view, not a copy."""
        if name == "down":
            return self.own(self.down_proj)
        gate, up = self.own(self.gate_up_proj).chunk(2, dim=1)
        return gate if name == "gate" else up

    def gate_and_up(self, rows: Tensor, carried: Tensor | None, product: Product) -> Tensor:
        """Both projections (R, 2F) of rows (R, H), gate first, by a product of rows and matrices."""
        return product(rows, self.own(self.gate_up_proj))

    def activate(self, expert: int, x: Tensor) -> Tensor:
        """act(x W_gateᵀ) of one expert on what its gate takes, tokens x (T, H): (T, F)."""
        return self.activation(F.linear(x, self.matrix("gate")[expert]))

    def finish(self, expert: int, x: Tensor, activated: Tensor) -> Tensor:
        """Output of one expert from its activations (T, F): (T, H), not weighted."""
        return F.linear(activated * F.linear(x, self.matrix("up")[expert]), self.matrix("down")[expert])


class FactorisedExperts(Experts):
    """Experts whose gates see c (T, C) alone, what the router carries to them: act(c W_gateᵀ) ⊙ x W_upᵀ, then down.

    ``gate_proj (E, F, C)``, ``up_proj (E, F, H)`` and ``down_proj (E, H, F)``.
    """

    def add_gate_and_up(self, config: ModelConfig, width: int) -> None:
        """Add the parameters of the two projections into the experts' width F."""
        carried = ROUTERS[config.router].gate_width(config)
        self.gate_proj = nn.Parameter(torch.empty(self.num_experts, width, carried))
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, config.hidden_size))

    def matrix(self, name: str) -> Tensor:
        """One matrix of all experts: ``gate`` is (E, F, C), ``up`` (E, F, H), ``down`` (E, H, F)."""
        return self.own({"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}[name])

    def gate_and_up(self, rows: Tensor, carried: Tensor | None, product: Product) -> Tensor:
        """Both projections (R, 2F), the gate's of carried (R, C)."""
        assert carried is not None
        return torch.cat([product(carried, self.own(self.gate_proj)), product(rows, self.own(self.up_proj))], dim=-1)


def build_experts(config: ModelConfig, layer: LayerConfig) -> Experts:
    """The experts of a layer, in the form that its router goes with."""
    return FactorisedExperts(config, layer) if ROUTERS[config.router].carries else Experts(config, layer)


def _weighted_sum(weight: Tensor, outputs: Tensor) -> Tensor:
    """Of outputs (T, K, H) by weights (T, K): (T, H)."""
    return torch.einsum("tk,tkh->th", weight.to(outputs.dtype), outputs)


def _loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """One expert after another on its own tokens: the plain reference that the other backends are held to."""
    out = torch.zeros_like(x)
    for expert in range(experts.num_own):
        token, choice = torch.where((routing.topk_index == expert) & routing.assigned)
        rows = x[token]
        seen = rows if routing.carried is None else routing.carried[token, choice]
        result = experts.finish(expert, rows, experts.activate(expert, seen))
        weighted = result * routing.topk_weight[token, choice, None].to(result.dtype)
        out = out.index_add(0, token, weighted.to(out.dtype))
    return out


def _grouped_mm(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """All experts in two grouped products over tokens sorted by expert (see moebed.model.grouped)."""
    dtype = compute_dtype(x)
    align = alignment(x.device.type, dtype.itemsize)
    dispatch = sort_by_expert(routing.topk_index, routing.topk_weight, experts.num_own, align, routing.ragged)

    def product(rows: Tensor, matrices: Tensor) -> Tensor:
        return grouped_mm(rows, matrices.to(dtype), dispatch.offsets, routing.ragged)

    rows = to_slots(x.to(dtype), dispatch)  # (R, H)
    carried = None if routing.carried is None else carried_to_slots(routing.carried.to(dtype), dispatch)  # (R, C)
    gate_up = experts.gate_and_up(rows, carried, product)  # (R, 2F)
    hidden = gated(gate_up, dispatch.slot_weight.to(dtype), experts.hidden_act)  # (R, F)
    return from_slots(product(hidden, experts.own(experts.down_proj)), dispatch)


def _native(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The compiled MLP of ``moebed.model.native``; what it is not made for takes ``grouped_mm``."""
    reason = _native_unfit(experts, x, routing)
    if reason is not None:
        say_once(f"experts_backend native does not fit ({reason}); grouped_mm serves instead")
        return _grouped_mm(experts, x, routing)
    matrices = experts.own(experts.gate_up_proj), experts.own(experts.down_proj)
    weight = routing.topk_weight.float()
    rows = x.to(compute_dtype(x))
    return native.expert_mlp(rows, *matrices, routing.topk_index, weight, experts.hidden_act, routing.ragged)


def _native_unfit(experts: Experts, x: Tensor, routing: Routing) -> str | None:
    """Why the compiled MLP is not made for these experts and tokens; None if it is."""
    if routing.carried is not None:
        return "its gates see the tokens, these experts' gates what the router carries"
    matrices = experts.own(experts.gate_up_proj), experts.own(experts.down_proj)
    return native.unfit(x, compute_dtype(x), *matrices)


def _auto(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """``native`` where it is the fastest measured one for machine and type and fits the call, else ``grouped_mm``."""
    enough = routing.topk_index.numel() >= native.LEAST_ROWS * experts.num_own
    if x.device.type != "cpu" or not enough or _native_unfit(experts, x, routing) is not None:
        return _grouped_mm(experts, x, routing)
    return (_native if native.is_fastest(compute_dtype(x)) else _grouped_mm)(experts, x, routing)


def _triton(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The fused kernels of ``triton_kernels``, on a GPU or in Triton's interpreter."""
    from triton_kernels.mlp import expert_mlp
    from triton_kernels.mlp.checks import runs_on_cpu

    if x.device.type == "cpu" and not runs_on_cpu():
        raise ConfigError(
            "experts_backend triton runs on a GPU; on a CPU set TRITON_INTERPRET=1 (slow, for tests), or choose auto"
        )
    matrices = experts.own(experts.gate_up_proj), experts.own(experts.down_proj)
    return expert_mlp(x, *matrices, routing.topk_index, routing.topk_weight, experts.hidden_act, ragged=routing.ragged)


Backend = Callable[[Experts, Tensor, Routing], Tensor]

BACKENDS: dict[str, Backend] = {
    "grouped_mm": _grouped_mm,
    "loop": _loop,
    "native": _native,
    "triton": _triton,
}


def resolve_backend(name: str) -> Backend:
    """The backend that a config's name stands for; auto decides at each call, by its type and device."""
    if name == "auto":
        return _auto
    if name not in BACKENDS:
        raise ConfigError(
            f"model config: unknown experts_backend {name!r}; choose auto or one of {', '.join(BACKENDS)}"
        )
    if name == "triton":
        _check_kernels_are_ours()
    if name == "native" and (reason := native.load()) is not None:
        say_once(f"experts_backend native is not to be had ({reason}); grouped_mm serves instead")
        return _grouped_mm
    return BACKENDS[name]


_said: set[str] = set()


@torch.compiler.assume_constant_result  # said when a graph is traced
def say_once(sentence: str) -> None:
    """A line on stderr, the first time in this process."""
    if sentence not in _said:
        _said.add(sentence)
        print(sentence, file=sys.stderr, flush=True)


def _check_kernels_are_ours() -> None:
    """Refuse another distribution's ``triton_kernels``: Triton's own repository ships one under that name."""
    import triton_kernels

    if "expert_mlp" not in getattr(triton_kernels, "__all__", ()):
        where = getattr(triton_kernels, "__file__", None) or next(iter(triton_kernels.__path__))
        raise ConfigError(
            f"experts_backend triton: {where} is another distribution called triton_kernels; uninstall it, or put"
            " moebed's own folder before it on the path"
        )
