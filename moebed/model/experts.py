"""Routed experts, and the one seam where the backend of their products is chosen.

T tokens, E experts, K experts per token, H hidden, F expert intermediate, R slots of the sorted order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.errors import ConfigError
from moebed.machine.settled import settled
from moebed.model import measured, native
from moebed.model.config import LayerConfig, ModelConfig
from moebed.model.fused import GATINGS, gated
from moebed.model.grouped import (
    alignment,
    compute_dtype,
    from_slots,
    grouped_mm,
    sort_by_expert,
    to_slots,
)
from moebed.model.orthogonality import responses
from moebed.model.routing import Routing

# Rows in segments, and matrices (E, B, A) of all experts -> each row's product with its own expert's.
Product = Callable[[Tensor, Tensor], Tensor]
MATRICES = ("up", "gate", "down")  # of an expert


class Exchange(Protocol):
    """What experts that are spread over X ranks need of them: this rank owns E/X of the E.

    Attributes:
        size: X.
    """

    size: int

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's part (E/X, ...) of a parameter (E, ...); differentiable."""

    def of_all(self, rows: Tensor) -> Tensor:
        """Rows (E/X, ·) of this rank's experts with those of all others in their order, (E, ·); differentiable."""

    def begin(self, experts: Experts, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start sending the tokens x (T, H); what it returns waits for them and gives the layer's outputs (T, H)."""


class Experts(nn.Module):
    """E gated FFNs side by side: E_e(x) = (act(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ.

    The matrices are stored fused as in Hugging Face's recent MoE classes: ``gate_up_proj (E, 2F, H)``, gate first,
    and ``down_proj (E, H, F)``; biases, where there are any, as ``gate_proj_bias`` and ``up_proj_bias (E, F)`` and
    ``down_proj_bias (E, H)``, which a router's weight scales with the rest of an output. Where they are spread over
    ranks (see moebed.parallel) all are DTensors, split on their first axis, and ``exchange`` takes tokens to their
    experts and back.

    A router may have experts of its own (``Router.experts_class``), which go on from what it computed:
    ``Routing.precomputed`` is (T, K, ·) of what they say; of these, their outputs, not weighted.
    """

    # Matrices that are no part of one parameter: the layer's parameters (E, ·, ·) whose product each is, of one expert.
    factors: Mapping[str, tuple[str, ...]] = {}
    kernels_alone = ("triton",)  # backends that have nothing else for experts without a kernel
    gate_up_proj: Tensor
    down_proj: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_experts = layer.num_experts
        for name, shape in self.shapes(config, layer).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.hidden_act: str = config.hidden_act
        self.gating = GATINGS[config.hidden_act]
        self.no_kernel = self.without_kernel(config)
        self.backend = resolve_backend(config.experts_backend, self.no_kernel)
        self.exchange: Exchange | None = None

    @classmethod
    def without_kernel(cls, config: ModelConfig) -> str | None:
        """Why compiled kernels do not compute these experts, as they know the plain ones alone; None if they do."""
        if cls.gate_and_up is not Experts.gate_and_up:
            return f"those of router {config.router} have a gate of their own"
        if config.experts_bias:
            return "experts_bias gives them biases"
        return None if config.hidden_act in native.ACTIVATIONS else f"hidden_act is {config.hidden_act}"

    @classmethod
    def shapes(cls, config: ModelConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Of the parameters, by name; the first axis is the experts'."""
        experts, width, hidden = layer.num_experts, layer.moe_intermediate_size, config.hidden_size
        matrices: dict[str, tuple[int, ...]] = {
            "gate_up_proj": (experts, 2 * width, hidden),
            "down_proj": (experts, hidden, width),
        }
        if not config.experts_bias:
            return matrices
        return {**matrices, **{bias_name(name): (experts, hidden if name == "down" else width) for name in MATRICES}}

    def forward(self, x: Tensor, routing: Routing, beside: Callable[[], Tensor] | None = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs for tokens x (T, H): (T, H).

        Args:
            x: (T, H).
            routing: The router's decisions on them.
            beside: Something to compute while tokens travel, where experts are on other ranks; it is added, (T, H).
        """
        finish = self.begin(x, routing)
        if beside is None:
            return finish()
        other = beside()
        return finish() + other

    def begin(self, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start computing the layer's outputs (T, H) for tokens x (T, H); what it returns gives them."""
        if self.exchange is not None:
            return self.exchange.begin(self, x, routing)
        return partial(self.backend, self, x, routing)

    def known_outputs(self, routing: Routing) -> Tensor | None:
        """Outputs (T, K, H) of the chosen experts, not weighted, where the router ran them."""
        return routing.precomputed

    def local(self, parameter: Tensor) -> Tensor:
        """A parameter's part of the experts that this process has: of all E, unless they are spread over ranks."""
        return parameter if self.exchange is None else self.exchange.local(parameter)

    @property
    def num_local_experts(self) -> int:
        """How many experts this process has."""
        return self.num_experts if self.exchange is None else self.num_experts // self.exchange.size

    def each(self, x: Tensor, topk_index: Tensor, precomputed: Tensor | None = None) -> Tensor:
        """Outputs (T, K, H) of the experts topk_index (T, K) for tokens x (T, H), not weighted; differentiable.

        Args:
            x: (T, H).
            topk_index: (T, K).
            precomputed: (T, K, ·) of them, where they go on from what their router computed.
        """
        num_tokens, top_k = topk_index.shape
        rows = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)  # (T·K, H) each choice a token of its own
        index = topk_index.flatten().unsqueeze(1)
        ones = torch.ones(index.shape, dtype=torch.float32, device=x.device)
        if precomputed is not None:
            precomputed = precomputed.flatten(0, 1).unsqueeze(1)  # (T·K, 1, ·)
        return self(rows, Routing(ones, ones, index, ones, precomputed)).unflatten(0, (num_tokens, top_k))

    def mean_neurons(self) -> dict[str, Tensor]:
        """Means (E, ·) of each expert's rows of ``gate`` and of ``up``, and of its columns of ``down``; float32."""
        axes = {"gate": 1, "up": 1, "down": 2}
        means = {name: self.matrix(name).mean(dim=axis, dtype=torch.float32) for name, axis in axes.items()}
        if self.exchange is None:
            return means
        return {name: self.exchange.of_all(mean) for name, mean in means.items()}

    def responses(self, vectors: Tensor) -> Tensor:
        """How strongly each expert's ``gate`` answers to each of some vectors (N, H): lengths (E, N) float32."""
        found = responses(vectors, self.matrix("gate"))
        return found if self.exchange is None else self.exchange.of_all(found)

    def matrix(self, name: str) -> Tensor:
        """One matrix of all experts here: ``gate`` and ``up`` (E, F, H), ``down`` (E, H, F); a view, not a copy."""
        if name == "down":
            return self.local(self.down_proj)
        gate, up = self.local(self.gate_up_proj).chunk(2, dim=1)
        return gate if name == "gate" else up

    def expert_matrix(self, name: str, expert: int) -> Tensor:
        """One expert's ``gate`` or ``up`` (F, H), or ``down`` (H, F)."""
        return self.matrix(name)[expert]

    def bias_of(self, name: str) -> Tensor | None:
        """What is added to products with a matrix of all experts here: (E, F), of ``down`` (E, H); None if nothing."""
        stored = self._parameters.get(bias_name(name))
        return None if stored is None else self.local(stored)

    def gate_and_up(self, rows: Tensor, product: Product) -> Tensor:
        """Both projections (R, 2F) of rows (R, H), gate first, by a product of rows and matrices."""
        found, gate, up = product(rows, self.local(self.gate_up_proj)), self.bias_of("gate"), self.bias_of("up")
        if gate is None or up is None:
            return found
        # As matrices of one column, whose gradients are summed in the same order each time.
        return found + product(rows.new_ones(len(rows), 1), torch.cat([gate, up], dim=1).unsqueeze(-1))

    def down(self, inner: Tensor, weight: Tensor, product: Product) -> Tensor:
        """Outputs (R, H) of rows (R, F) that are times a weight (R,) already; a bias is multiplied here."""
        found, bias = product(inner, self.local(self.down_proj)), self.bias_of("down")
        return found if bias is None else found + product(weight.unsqueeze(1), bias.unsqueeze(-1))

    def activate(self, expert: int, x: Tensor) -> Tensor:
        """act(x W_gateᵀ) of one expert on tokens x (T, H): (T, F)."""
        return self.gating.of_gate(self._project("gate", expert, x))

    def finish(self, expert: int, x: Tensor, activated: Tensor) -> Tensor:
        """Output of one expert from its activations (T, F): (T, H), not weighted."""
        return self._project("down", expert, activated * self.gating.entered(self._project("up", expert, x)))

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        bias = self.bias_of(name)
        return F.linear(x, self.matrix(name)[expert], None if bias is None else bias[expert])


def bias_name(matrix: str) -> str:
    """What the parameter is called that is added to the products with a matrix."""
    return f"{matrix}_proj_bias"


def weighted_sum(weight: Tensor, outputs: Tensor) -> Tensor:
    """Of outputs (T, K, H) by weights (T, K): (T, H)."""
    return torch.einsum("tk,tkh->th", weight.to(outputs.dtype), outputs)


def _loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """One expert after another on its own tokens: the plain reference that the other backends are held to."""
    out = x.new_zeros(len(x), experts.down_proj.shape[1])
    for expert in range(experts.num_local_experts):
        token, choice = torch.where((routing.topk_index == expert) & routing.assigned)
        product = partial(_linear, expert)
        inner = experts.gating(*experts.gate_and_up(x[token], product).chunk(2, dim=-1))
        result = experts.down(inner, inner.new_ones(len(inner)), product)
        weighted = result * routing.topk_weight[token, choice, None].to(result.dtype)
        out = out.index_add(0, token, weighted.to(out.dtype))
    return out


def _linear(expert: int, rows: Tensor, matrices: Tensor) -> Tensor:
    return F.linear(rows, matrices[expert])


def _grouped_mm(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """All experts in two grouped products over tokens sorted by expert (see moebed.model.grouped)."""
    dtype = compute_dtype(x)
    align = alignment(x.device.type, dtype.itemsize)
    dispatch = sort_by_expert(routing.topk_index, routing.topk_weight, experts.num_local_experts, align, routing.ragged)

    def product(rows: Tensor, matrices: Tensor) -> Tensor:
        return grouped_mm(rows, matrices.to(dtype), dispatch.offsets, routing.ragged)

    rows = to_slots(x.to(dtype), dispatch)  # (R, H)
    gate_up = experts.gate_and_up(rows, product)  # (R, 2F)
    weight = dispatch.slot_weight.to(dtype)  # (R,)
    hidden = gated(gate_up, weight, experts.hidden_act)  # (R, F)
    return from_slots(experts.down(hidden, weight, product), dispatch)


def _native(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The compiled MLP of ``moebed.model.native``; what it is not made for takes ``grouped_mm``."""
    reason = _native_unfit(experts, x)
    if reason is not None:
        say_once(f"experts_backend native does not fit ({reason}); grouped_mm serves instead")
        return _grouped_mm(experts, x, routing)
    matrices = experts.local(experts.gate_up_proj), experts.local(experts.down_proj)
    weight = routing.topk_weight.float()
    rows = x.to(compute_dtype(x))
    return native.expert_mlp(rows, *matrices, routing.topk_index, weight, experts.hidden_act, routing.ragged)


def _native_unfit(experts: Experts, x: Tensor) -> str | None:
    """Why the compiled MLP is not made for these experts and tokens; None if it is."""
    if experts.no_kernel is not None:
        return experts.no_kernel
    matrices = experts.local(experts.gate_up_proj), experts.local(experts.down_proj)
    return native.unfit(x, compute_dtype(x), *matrices)


def _auto(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The fastest one that was measured for machine, type and size, and fits the call.

    On a CPU ``native``, else ``grouped_mm``; on a GPU ``triton``, where ``moebed check`` has found it right and faster
    on this kind of device, else ``grouped_mm``.
    """
    if x.device.type == "cuda" and _takes_triton(experts, x, routing):
        return _triton(experts, x, routing)
    enough = routing.topk_index.numel() >= native.LEAST_ROWS * experts.num_local_experts
    if x.device.type != "cpu" or not enough or _native_unfit(experts, x) is not None:
        return _grouped_mm(experts, x, routing)
    elements = experts.down_proj.shape[1:].numel()
    return (_native if native.is_fastest(compute_dtype(x), elements) else _grouped_mm)(experts, x, routing)


def _takes_triton(experts: Experts, x: Tensor, routing: Routing) -> bool:
    matrices = experts.local(experts.gate_up_proj), experts.local(experts.down_proj)
    top_k, work = routing.topk_index.shape[1], routing.topk_index.numel() * matrices[1][0].numel()
    if experts.no_kernel is not None or work < measured.least_work(x.device, compute_dtype(x)):
        return False
    from triton_kernels.mlp.checks import why_not

    return why_not(x, matrices[0], top_k) is None


def _triton(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The fused kernels of ``triton_kernels``, on a GPU or in Triton's interpreter."""
    from triton_kernels.mlp import expert_mlp
    from triton_kernels.mlp.checks import runs_on_cpu

    if x.device.type == "cpu" and not runs_on_cpu():
        raise ConfigError(
            "experts_backend triton runs on a GPU; on a CPU set TRITON_INTERPRET=1 (slow, for tests), or choose auto"
        )
    matrices = experts.local(experts.gate_up_proj), experts.local(experts.down_proj)
    return expert_mlp(x, *matrices, routing.topk_index, routing.topk_weight, experts.hidden_act, ragged=routing.ragged)


Backend = Callable[[Experts, Tensor, Routing], Tensor]

BACKENDS: dict[str, Backend] = {
    "grouped_mm": _grouped_mm,
    "loop": _loop,
    "native": _native,
    "triton": _triton,
}


def resolve_backend(name: str, no_kernel: str | None = None) -> Backend:
    """The backend that a config's name stands for; auto decides at each call, by its type and device.

    Args:
        name: Of the backend.
        no_kernel: Why compiled kernels do not compute the experts, if they do not.
    """
    if name == "auto":
        return _auto
    if name not in BACKENDS:
        raise ConfigError(
            f"model config: unknown experts_backend {name!r}; choose auto or one of {', '.join(BACKENDS)}"
        )
    if name == "triton":
        _check_kernels_are_ours()
    if name == "native" and (reason := no_kernel or native.load()) is not None:
        say_once(f"experts_backend native is not to be had ({reason}); grouped_mm serves instead")
        return _grouped_mm
    return BACKENDS[name]


_said: set[str] = set()


@settled  # said when a graph is traced
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
