"""Layer views: what a probe sees of one layer, and the walk that offers them in order.

The walk over a live model below *is* a forward pass: each layer's input is what the real top-K model made of the text.
A streamed checkpoint offers the same walk, so a probe never knows where a model came from.

B sequences, S positions, T valid tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from moebed.decoder import Block, Decoder, FeedForward, MoE
from moebed.routers import Routing, SoftmaxTopK

MATRICES = ("up", "gate", "down")


class Need(Enum):
    """What a probe asks of a layer view; nothing is computed that no probe asked for."""

    WEIGHTS = "weights"
    ROUTING = "routing"
    OUTPUTS = "outputs"
    ACTIVATIONS = "activations"


@dataclass(frozen=True)
class ProbeText:
    """Token sequences to probe on.

    Args:
        input_ids: (B, S) int64, padded on the right.
        token_mask: (B, S) bool, False where a position is padding.
        domain: (B,) int64, index into domains.
        domains: Names of the domains.
    """

    input_ids: Tensor
    token_mask: Tensor
    domain: Tensor
    domains: tuple[str, ...] = ("text",)

    @property
    def token_ids(self) -> Tensor:
        """(T,) ids of the valid tokens, sequence after sequence."""
        return self.input_ids[self.token_mask]

    @property
    def sequence_start(self) -> Tensor:
        """(B,) index among the T valid tokens at which each sequence begins."""
        lengths = self.token_mask.sum(dim=1)
        return lengths.cumsum(0) - lengths


@dataclass
class ExpertView:
    """What one expert made of every token, whether it was chosen or not."""

    index: int  # 0 to E - 1, routed; E for the shared expert where there is one
    output: Tensor | None = None  # (T, H) float32, not weighted
    activation: Tensor | None = None  # (T, F) float32, act(x W_gateᵀ)


@dataclass
class LayerView:
    """One MoE layer, or the dense FFN of a layer without experts (num_experts 0).

    Tensors are float32 and read-only by agreement: they may share memory with the model.
    """

    index: int
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    gate: Tensor | None  # (E, H) router's gate embeddings W_g, where it has them
    routing: Routing | None = None  # of the T valid tokens
    moe_input: Tensor | None = None  # (T, H) normalised input of router and experts
    text: ProbeText | None = None
    _mlp: MoE | FeedForward | None = field(default=None, repr=False)

    def matrix(self, name: str) -> Tensor:
        """All routed experts' ``up`` or ``gate`` (E, F, H), or ``down`` (E, H, F)."""
        assert isinstance(self._mlp, MoE)
        return self._mlp.experts.matrix(name).detach().float()

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix, ``up`` and ``gate`` (F_shared, H), ``down`` (H, F_shared); None without one."""
        if not isinstance(self._mlp, MoE) or self._mlp.shared_expert is None:
            return None
        return getattr(self._mlp.shared_expert, f"{name}_proj").weight.detach().float()

    def experts(self, needs: frozenset[Need]) -> Iterator[ExpertView]:
        """Run every expert on every token, one at a time; the shared expert comes last."""
        assert isinstance(self._mlp, MoE)
        assert self.moe_input is not None
        routed, shared = self._mlp.experts, self._mlp.shared_expert
        for index in range(self.num_experts):
            activated = routed.activate(index, self.moe_input)
            output = routed.finish(index, self.moe_input, activated) if Need.OUTPUTS in needs else None
            yield ExpertView(index, output, activated if Need.ACTIVATIONS in needs else None)
        if shared is not None:
            yield ExpertView(
                self.num_experts,
                self._mlp.shared_output(self.moe_input) if Need.OUTPUTS in needs else None,
                shared.activation(shared.gate_proj(self.moe_input)) if Need.ACTIVATIONS in needs else None,
            )


@torch.no_grad()
def walk(decoder: Decoder, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView]:
    """Views of a live decoder's layers, from the first to the last, in float32 and in evaluation mode.

    The model's parameters, its training flag and every random state are as before when the walk ends.

    Args:
        decoder: The model.
        text: Sequences to run; None for weights alone.
        needs: What the probes ask for; without routing, outputs or activations no text is run.

    Yields:
        A view a layer, layers without experts included.
    """
    runs_text = text is not None and bool(needs - {Need.WEIGHTS})
    with evaluating(decoder):
        if not runs_text:
            for index, block in enumerate(decoder.blocks):
                yield _view(decoder, index, block, text)
            return
        assert text is not None
        device = decoder.embed_tokens.weight.device
        mask = text.token_mask.to(device)
        hidden, rope = decoder.embed(text.input_ids.to(device))
        for index, block in enumerate(decoder.blocks):
            hidden = block.attend(hidden, rope)
            ffn_input = block.pre_ffn_norm(hidden)
            out, routing = block.feed_forward(ffn_input)
            view = _view(decoder, index, block, text)
            view.moe_input = ffn_input[mask]
            if routing is not None:
                view.routing = Routing(*(value[mask.flatten()] for value in routing))
            yield view
            hidden = hidden + block.post_ffn_norm(out)


@contextmanager
def evaluating(decoder: Decoder) -> Iterator[None]:
    """Evaluation mode without autocast, undone at the end."""
    modes = [(module, module.training) for module in decoder.modules()]  # a part may be frozen in evaluation mode
    device = decoder.embed_tokens.weight.device.type
    decoder.eval()
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _view(decoder: Decoder, index: int, block: Block, text: ProbeText | None) -> LayerView:
    layer = decoder.config.layer(index)
    router = block.mlp.router if isinstance(block.mlp, MoE) else None
    return LayerView(
        index=index,
        num_hidden_layers=decoder.config.num_hidden_layers,
        num_experts=layer.num_experts,
        num_experts_per_tok=layer.num_experts_per_tok if layer.num_experts else 0,
        gate=router.weight.detach().float() if isinstance(router, SoftmaxTopK) else None,
        text=text,
        _mlp=block.mlp,
    )
