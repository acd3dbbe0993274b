"""The expert MLPs that ``moebed bench experts`` measures: ours by backend, the peers that import, a dense FFN.

All take tokens and a routing that was decided before, and hold the same weights, so that outputs and gradients can be
held against each other. A router is no part of any of them.

T tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebed.bench.train import dense_of_equal_flops
from moebed.model import native
from moebed.model.config import ModelConfig
from moebed.model.decoder import FeedForward
from moebed.model.experts import BACKENDS, Experts, compute_dtype
from moebed.model.routers import Routing

OWN, DENSE, REFERENCE = "moebed ", "dense FFN of equal FLOPs", "loop"
LARGEST_COPY = 2**28  # bytes; more copied weights than this take minutes on a CPU and drown all else


@dataclass(frozen=True)
class Peer:
    """One contestant.

    Attributes:
        module: holds the weights.
        run: (x (T, H), routing) -> (T, H).
        gradients: gradients of ``gate_up`` (E, 2F, H), gate first, and ``down`` (E, H, F) after a backward pass.
        comparable: it computes the experts' function; a dense FFN does not.
    """

    module: nn.Module
    run: Callable[[Tensor, Routing], Tensor]
    gradients: Callable[[], dict[str, Tensor | None]]
    comparable: bool = True


class LeftOut(Exception):
    """This contestant cannot run here; the message says why."""


def own(config: ModelConfig, backend: str, gate_up: Tensor, down: Tensor) -> Peer:
    """Our experts with one backend."""
    if backend == "triton" and gate_up.device.type == "cpu":
        raise LeftOut("its kernels need a GPU")
    if backend == "native" and gate_up.device.type != "cpu":
        raise LeftOut("it computes on a CPU")
    if backend == "native" and (reason := native.load()) is not None:
        raise LeftOut(reason)
    with torch.device("meta"):
        experts = Experts(config, config.layer(0))
    experts.backend = BACKENDS[backend]
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)

    def run(x: Tensor, routing: Routing) -> Tensor:
        if backend == "native" and (reason := native.unfit(x, compute_dtype(x), gate_up, down)) is not None:
            raise LeftOut(reason)
        return experts(x, routing)

    return Peer(experts, run, lambda: {"gate_up": experts.gate_up_proj.grad, "down": experts.down_proj.grad})


def transformers_names() -> list[str]:
    """Names of what transformers' experts classes can be set to."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def from_transformers(config: ModelConfig, implementation: str, tokens: int, gate_up: Tensor, down: Tensor) -> Peer:
    """The experts of transformers' Mixtral block with one ``experts_implementation``."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = config.layer(0)
    copied = tokens * layer.num_experts_per_tok * gate_up[0].numel() * gate_up.element_size()
    if implementation == "batched_mm" and copied > LARGEST_COPY:
        raise LeftOut(f"it copies weights for every row, {copied / 1e9:.0f} GB here")
    theirs = MixtralConfig(
        hidden_size=config.hidden_size,
        intermediate_size=layer.moe_intermediate_size,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.num_experts_per_tok,
    )
    theirs._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(theirs)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)

    def run(x: Tensor, routing: Routing) -> Tensor:
        return experts(x, routing.topk_index, routing.topk_weight.to(x.dtype))

    return Peer(experts, run, lambda: {"gate_up": experts.gate_up_proj.grad, "down": experts.down_proj.grad})


def scattermoe(config: ModelConfig, gate_up: Tensor, down: Tensor) -> Peer:
    """ScatterMoE's GLUMLP, whose fused matrix has up first."""
    from scattermoe.mlp import GLUMLP

    layer = config.layer(0)
    mlp: Any = GLUMLP(config.hidden_size, layer.moe_intermediate_size, layer.num_experts, layer.num_experts_per_tok)
    mlp.experts.weight = nn.Parameter(gate_up.roll(layer.moe_intermediate_size, dims=1))
    mlp.output_experts.weight = nn.Parameter(down)

    def gradients() -> dict[str, Tensor | None]:
        first = mlp.experts.weight.grad.roll(layer.moe_intermediate_size, dims=1)
        return {"gate_up": first, "down": mlp.output_experts.weight.grad}

    return Peer(mlp, lambda x, routing: mlp(x, routing.topk_weight.to(x.dtype), routing.topk_index), gradients)


def liger(config: ModelConfig, gate_up: Tensor, down: Tensor) -> Peer:
    """Liger's fused MoE, whose matrices lie as ours do."""
    from liger_kernel.ops import LigerFusedMoEFunction

    holder: Any = nn.Module()
    holder.gate_up, holder.down = nn.Parameter(gate_up), nn.Parameter(down)

    def run(x: Tensor, routing: Routing) -> Tensor:
        weights, index = routing.topk_weight.to(x.dtype), routing.topk_index.int()
        return LigerFusedMoEFunction.apply(x, holder.gate_up, holder.down, index, weights)

    return Peer(holder, run, lambda: {"gate_up": holder.gate_up.grad, "down": holder.down.grad})


def megablocks(config: ModelConfig, gate_up: Tensor, down: Tensor) -> Peer:
    """MegaBlocks' dropless GLU, whose three matrices are (E·F, H)."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    layer = config.layer(0)
    arguments = Arguments(
        hidden_size=config.hidden_size,
        ffn_hidden_size=layer.moe_intermediate_size,
        moe_num_experts=layer.num_experts,
        moe_top_k=layer.num_experts_per_tok,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=nn.functional.silu,
        bias=False,
        return_bias=False,
        device=gate_up.device,
        fp16=False,
        bf16=gate_up.dtype == torch.bfloat16,
    )
    mlp: Any = ParallelDroplessMLP(arguments)
    gate, up = gate_up.chunk(2, dim=1)
    for name, matrix in (("w1", gate), ("v1", up), ("w2", down.transpose(1, 2))):
        setattr(mlp.mlp, name, nn.Parameter(matrix.reshape(-1, config.hidden_size).contiguous()))

    def run(x: Tensor, routing: Routing) -> Tensor:
        weights, index = routing.topk_weight.to(x.dtype), routing.topk_index
        return mlp(x.unsqueeze(1), routing.router_probs, weights, index).squeeze(1)

    def gradients() -> dict[str, Tensor | None]:
        w1, v1, w2 = (
            matrix.grad.view(layer.num_experts, -1, config.hidden_size)
            for matrix in (mlp.mlp.w1, mlp.mlp.v1, mlp.mlp.w2)
        )
        return {"gate_up": torch.cat([w1, v1], dim=1), "down": w2.transpose(1, 2)}

    return Peer(mlp, run, gradients)


def dense(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Peer:
    """A dense FFN as wide as the experts that one token passes."""
    wide = dense_of_equal_flops(config)
    assert wide.intermediate_size is not None
    ffn = FeedForward(wide, wide.intermediate_size).to(device, dtype)
    return Peer(ffn, lambda x, routing: ffn(x), lambda: {}, comparable=False)


def makers(
    config: ModelConfig, tokens: int, gate_up: Tensor, down: Tensor, gpu_only: bool = False
) -> dict[str, Callable[[], Peer]]:
    """Every contestant by its name; making one raises LeftOut, or ImportError, where it cannot run.

    Args:
        config: a Mixtral of one layer.
        tokens: T.
        gate_up: (E, 2F, H); shared by all, since nobody updates it.
        down: (E, H, F).
        gpu_only: leave out what is no grouped kernel (loops over experts, copies of weights).
    """
    made: dict[str, Callable[[], Peer]] = {}
    for backend in BACKENDS:
        made[OWN + backend] = lambda b=backend: own(config, b, gate_up, down)  # type: ignore[misc]
    for name in transformers_names():
        made[f"transformers {name}"] = lambda n=name: from_transformers(  # type: ignore[misc]
            config, n, tokens, gate_up, down
        )
    made["ScatterMoE"] = lambda: scattermoe(config, gate_up, down)
    made["Liger"] = lambda: liger(config, gate_up, down)
    made["MegaBlocks"] = lambda: megablocks(config, gate_up, down)
    made[DENSE] = lambda: dense(config, gate_up.device, gate_up.dtype)
    if gpu_only:
        for name in (OWN + REFERENCE, "transformers eager", "transformers batched_mm"):
            made.pop(name, None)
    return made
