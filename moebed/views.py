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
from typing import Protocol

import torch
from torch import Tensor

from moebed.decoder import Block, Decoder, FeedForward, MoE
from moebed.errors import UserError
from moebed.routers import Routing, SoftmaxTopK

MATRICES = ("up", "gate", "down")
EVERY_ROW = slice(None)


class Need(Enum):
    """What a probe asks of a layer view; nothing is computed that no probe asked for."""

    WEIGHTS = "weights"
    ROUTING = "routing"
    OUTPUTS = "outputs"
    ACTIVATIONS = "activations"
    PREDICTIONS = "predictions"


@dataclass(frozen=True)
class ProbeText:
    """Token sequences to probe on.

    Args:
        input_ids: (B, S) int64, padded on the right.
        token_mask: (B, S) bool, False where a position is padding.
        domain: (B,) int64, index into domains.
        domains: Names of the domains.
        token_text: What each of the T valid tokens says, for pictures; empty where no tokenizer tells.
    """

    input_ids: Tensor
    token_mask: Tensor
    domain: Tensor
    domains: tuple[str, ...] = ("text",)
    token_text: tuple[str, ...] = ()

    @property
    def token_ids(self) -> Tensor:
        """(T,) ids of the valid tokens, sequence after sequence."""
        return self.input_ids[self.token_mask]

    @property
    def sequence_start(self) -> Tensor:
        """(B,) index among the T valid tokens at which each sequence begins."""
        lengths = self.token_mask.sum(dim=1)
        return lengths.cumsum(0) - lengths

    @property
    def sequence(self) -> Tensor:
        """(T,) which sequence each valid token belongs to."""
        return self.token_mask.nonzero()[:, 0]

    @property
    def targets(self) -> Tensor:
        """(T,) the id that follows each valid token in its sequence; -1 after the last one."""
        ids, sequence = self.token_ids, self.sequence
        targets = torch.full_like(ids, -1)
        targets[:-1] = torch.where(sequence[1:] == sequence[:-1], ids[1:], -1)
        return targets


@dataclass
class ExpertView:
    """What one expert made of every token, whether it was chosen or not.

    The dense reference model's FFN comes as one more expert; it has seen that model's own hidden states.
    """

    index: int  # 0 to E - 1, routed; from E on the shared expert and the reference, where there are any
    output: Tensor | None = None  # (T, H) float32, not weighted
    activation: Tensor | None = None  # (T, F) float32, act(x W_gateᵀ)
    name: str = ""  # "SE" for the shared expert, "F" for the reference, empty for a routed one


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
    weights: LayerWeights | None = field(default=None, repr=False)
    error: UserError | None = None  # why this layer cannot be looked at, found before a probe asked for anything

    def matrix(self, name: str) -> Tensor:
        """All routed experts' ``up`` or ``gate`` (E, F, H), or ``down`` (E, H, F), float32; for small models."""
        return torch.stack([self.expert_matrix(name, index).float() for index in range(self.num_experts)])

    def expert_matrix(self, name: str, index: int, rows: slice = EVERY_ROW) -> Tensor:
        """One routed expert's ``up`` or ``gate`` (F, H), or ``down`` (H, F), in the dtype it is stored in.

        Args:
            name: ``up``, ``gate`` or ``down``.
            index: The expert.
            rows: Only these rows. Where the experts of a layer exceed the memory budget, asking for the same rows of
                one expert after another reads no more than those.
        """
        assert self.weights is not None
        return self.weights.expert_matrix(name, index, rows)

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix; nothing is read."""
        assert self.weights is not None
        return self.weights.expert_shape(name)

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix, ``up`` and ``gate`` (F_shared, H), ``down`` (H, F_shared); None without one."""
        return self.weights.shared_matrix(name) if self.weights is not None else None

    def reference_matrix(self, name: str) -> Tensor | None:
        """The same layer's FFN matrix in the dense reference model (the paper's "F"); None where none is given."""
        return self.weights.reference_matrix(name) if self.weights is not None else None

    def experts(self, needs: frozenset[Need]) -> Iterator[ExpertView]:
        """Run every expert on every token, one at a time; the shared expert comes last."""
        assert self.weights is not None
        assert self.moe_input is not None
        return self.weights.run_experts(self.moe_input, needs)


@dataclass(frozen=True)
class HeadView:
    """What the model made of the text in the end, after its last layer."""

    text: ProbeText
    predicted: Tensor  # (T,) int64, the most probable next token
    loss: Tensor  # (T,) float32, nats of the token that follows; NaN after the last of a sequence


class LayerWeights(Protocol):
    """Where a view has its weights from: a live module, or a checkpoint that is read a piece at a time.

    A tensor that is handed out is valid until one of another matrix is asked for.
    """

    def expert_matrix(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one routed expert's matrix, as stored."""
        ...

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix."""
        ...

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix."""
        ...

    def reference_matrix(self, name: str) -> Tensor | None:
        """The matrix of the dense reference model's FFN at this layer."""
        ...

    def run_experts(self, x: Tensor, needs: frozenset[Need]) -> Iterator[ExpertView]:
        """What every expert, the shared one last, makes of tokens x (T, H)."""
        ...


@dataclass(frozen=True)
class ModuleWeights:
    """The weights of a live layer."""

    mlp: MoE | FeedForward

    def expert_matrix(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one routed expert's matrix; shares memory with the model."""
        assert isinstance(self.mlp, MoE)
        return self.mlp.experts.matrix(name)[index].detach()[rows]

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix."""
        assert isinstance(self.mlp, MoE)
        _, rows, columns = self.mlp.experts.matrix(name).shape
        return rows, columns

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix; shares memory with the model."""
        if not isinstance(self.mlp, MoE) or self.mlp.shared_expert is None:
            return None
        return getattr(self.mlp.shared_expert, f"{name}_proj").weight.detach()

    def reference_matrix(self, name: str) -> Tensor | None:
        """A live model has no reference."""
        return None

    def run_experts(self, x: Tensor, needs: frozenset[Need]) -> Iterator[ExpertView]:
        """Run the modules."""
        assert isinstance(self.mlp, MoE)
        routed, shared = self.mlp.experts, self.mlp.shared_expert
        for index in range(routed.num_experts):
            activated = routed.activate(index, x)
            output = routed.finish(index, x, activated) if Need.OUTPUTS in needs else None
            yield ExpertView(index, output, activated if Need.ACTIVATIONS in needs else None)
        if shared is not None:
            yield ExpertView(
                routed.num_experts,
                self.mlp.shared_output(x) if Need.OUTPUTS in needs else None,
                shared.activation(shared.gate_proj(x)) if Need.ACTIVATIONS in needs else None,
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
        weights=ModuleWeights(block.mlp),
    )
