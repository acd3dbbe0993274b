"""Layer views: what a probe sees of one layer, and the walk that offers them in order.

A live model and a streamed checkpoint offer the same walk over layers, so a probe never knows where a model came from.

B sequences, S positions, T valid tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.machine.finite import all_finite
from moebed.model.experts import MATRICES as MATRICES
from moebed.model.routers import Routing, TokenContext
from moebed.views.attribution import Attribution, Reading
from moebed.views.beside import ExpertSums, Rows
from moebed.views.interventions import Intervention

EVERY_ROW = slice(None)
# Is shown the activations act(x W_gateᵀ) (t, F) float32 of a routed expert, by its index, for some of the tokens.
Watch = Callable[[int, slice, Tensor], None]
Effects = Callable[[Sequence[Intervention]], dict[str, Tensor]]


class Need(Enum):
    """What a probe asks of a layer view; nothing is computed that no probe asked for.

    Whoever hands out views may have less than all of it: a trace has no more than choices, and neighbours only where
    it says which token follows which.
    """

    WEIGHTS = "weights"
    CHOICES = "choices"  # the experts that each token goes to, the first one first
    NEIGHBOURS = "neighbours"  # which tokens follow one another
    ROUTING = "routing"  # all of a Routing, and what the router saw
    OUTPUTS = "outputs"
    ACTIVATIONS = "activations"
    PREDICTIONS = "predictions"
    LOGITS = "logits"
    ATTRIBUTION = "attribution"


@dataclass(frozen=True)
class ProbeText:
    """Token sequences to probe on.

    Args:
        input_ids: (B, S) int64, padded on the right.
        token_mask: (B, S) bool, False where a position is padding.
        domain: (B,) int64, index into domains.
        domains: Names of the domains.
        token_text: What each of the T valid tokens says, for pictures; empty where no tokenizer tells.
        token_domain: (B, S) int64, which of the training data's domains each token is of, where that is known; unlike
            domain it means the same as in training, and may differ within a sequence.
        says: What an id says by itself, whether it is in the text or not; None where no tokenizer tells.
    """

    input_ids: Tensor
    token_mask: Tensor
    domain: Tensor
    domains: tuple[str, ...] = ("text",)
    token_text: tuple[str, ...] = ()
    token_domain: Tensor | None = None
    says: Callable[[int], str] | None = field(default=None, repr=False, compare=False)

    def words(self, ids: Iterable[int]) -> dict[int, str]:
        """What ids say, as far as is known: any, where a tokenizer tells, otherwise those that are in the text."""
        if self.says is not None:
            return {one: self.says(one) for one in ids}
        known = dict(zip(self.token_ids.tolist(), self.token_text, strict=True)) if self.token_text else {}
        return {one: known[one] for one in ids if one in known}

    def fingerprint(self) -> str:
        """A hash of the tokens, of where they stand, of what they say, and of their domains."""
        digest = hashlib.sha256(json.dumps([list(self.input_ids.shape), self.domains, self.token_text]).encode())
        known = () if self.token_domain is None else (self.token_domain,)
        for part in (self.token_ids, self.token_mask, self.domain, *known):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

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

    @functools.cached_property
    def first_with_past(self) -> Tensor:
        """(T,) index of the first valid token of all that have seen the same ids as each has, its own among them.

        A first id that is repeated adds nothing to what it sees itself, for a mean of equal values is the value; but to
        what another id sees after it, which weighs both.
        """
        ids = self.input_ids.cpu().numpy().astype(np.uint64)
        is_repeated = np.logical_and.accumulate(ids == ids[:, :1], axis=1)
        seen = ids + np.uint64(1)
        for place in range(1, ids.shape[1]):
            before = seen[:, place - 1]
            seen[:, place] = (before * np.uint64(6364136223846793005) + seen[:, place]) ^ (before >> np.uint64(29))
        known = np.where(is_repeated, seen[:, :1], seen)[self.token_mask.cpu().numpy()]
        _, first, group = np.unique(known, return_index=True, return_inverse=True)
        return torch.from_numpy(first[group])

    @property
    def position(self) -> Tensor:
        """(T,) place of each valid token in its sequence, from 0."""
        return self.token_mask.cumsum(dim=1)[self.token_mask] - 1

    @property
    def context(self) -> TokenContext:
        """What routers may ask of the T valid tokens."""
        domain = None if self.token_domain is None else self.token_domain[self.token_mask]
        return TokenContext(self.token_ids, domain, sequence=self.sequence, position=self.position)

    @property
    def targets(self) -> Tensor:
        """(T,) the id that follows each valid token in its sequence; -1 after the last one."""
        ids, sequence = self.token_ids, self.sequence
        targets = torch.full_like(ids, -1)
        targets[:-1] = torch.where(sequence[1:] == sequence[:-1], ids[1:], -1)
        return targets


class ExpertKind(Enum):
    """What an expert is; the value is its label, as in the paper's figures. A routed one's label is its number."""

    ROUTED = ""
    SHARED = "SE"
    REFERENCE = "F"


@dataclass
class ExpertView:
    """What one expert made of every token, whether it was chosen or not.

    The dense reference model's FFN comes as one more expert; it has seen that model's own hidden states.
    """

    index: int  # 0 to E - 1, routed; E, the shared expert; E + 1, the reference
    output: Tensor  # (T, H) float32, not weighted
    kind: ExpertKind = ExpertKind.ROUTED

    @property
    def label(self) -> str:
        """What figures and stored rows call it."""
        return self.kind.value or str(self.index)


@dataclass
class LayerView:
    """One MoE layer, or the dense FFN of a layer without experts (num_experts 0).

    Whoever hands out a model's layers makes it with what its weights say; where text runs, TextPass makes another one
    of it, with what the text did there. Tensors are float32 and read-only by agreement: they may share memory with the
    model.
    """

    index: int
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    gate: Tensor | None  # (E, H) router's gate embeddings W_g, where it has them
    shift_invariant: bool = True  # whether a vector that all gate embeddings share changes no choice and no weight
    weights: LayerWeights | None = field(default=None, repr=False)
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)  # what one probe made of the weights for others too
    work_bytes: int | None = None  # memory that a probe's work on the weights should stay within, if there is a limit
    error: UserError | None = None  # why this layer cannot be looked at, found before a probe asked for anything

    # What text did there: set by TextPass alone, all at once.
    text: ProbeText | None = None
    text_error: UserError | None = None  # why the text did not come to this layer, whose weights can be looked at
    routing: Routing | None = None  # of the T valid tokens, as the layer applies it
    moe_input: Tensor | None = None  # (T, H) normalised input of router and experts
    residual: Tensor | None = None  # (T, H) residual stream that the layer's output is added to
    reference_output: Tensor | None = None  # (T, H) what the dense reference's FFN made of its own hidden states
    attribution: Attribution | None = None  # how what the experts write adds to logits, where that was asked for
    # What residual stream (T, H) leaves the layer if this (T, H) is its output; while the text is in the layer.
    leave: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    # Loss (T,) of each token, NaN after the last of a sequence, with one expert masked out of the choice at this layer;
    # of expert -1, that of the model as it is. None where the model is not at hand as a whole.
    ablate: Callable[[int], Tensor] | None = field(default=None, repr=False)

    # Other streams whose tokens go through the experts while those run for the text.
    beside: ExpertSums | None = field(default=None, repr=False)

    # (T, H) what the layer makes of its input, shared experts and adapters included: set by the view itself, once all
    # experts have run.
    moe_output: Tensor | None = field(default=None, init=False)

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

    def experts(self, watch: Watch | None = None) -> Iterator[ExpertView]:
        """Run every expert on every token, one at a time; after the routed ones the shared one, then the reference.

        The real model's output is summed up on the way, so that it costs nothing more; what a model has beside all
        experts, such as HyperMoE's adapters, is no expert, but part of that output.

        Args:
            watch: Is shown the activations of the routed experts, a block of tokens at a time.

        Raises:
            UserError: An expert's output has NaN or Inf.
        """
        assert self.weights is not None
        assert self.moe_input is not None
        routing = self.routing
        total = torch.zeros_like(self.moe_input) if routing is not None else None  # (T, H)
        for expert in self.weights.run_experts(self.moe_input, watch, self.beside):
            if not all_finite(expert.output):
                raise UserError(f"an output of expert {expert.label} at layer {self.index} is NaN or Inf on this text")
            if total is not None and routing is not None:
                _add_chosen(total, expert, routing)
            yield expert
        if total is not None and routing is not None:
            adapted = self.weights.adapted(self.moe_input, routing)
            total = total if adapted is None else total + adapted
        self.moe_output = total
        if self.reference_output is not None:
            yield ExpertView(self.num_experts + 1, self.reference_output, ExpertKind.REFERENCE)


def _add_chosen(total: Tensor, expert: ExpertView, routing: Routing) -> None:
    """Add an expert's output to the sum (T, H) of the tokens that chose it; the shared expert's to all."""
    if expert.kind is ExpertKind.SHARED:
        total += expert.output
        return
    token, choice = torch.where((routing.topk_index == expert.index) & routing.assigned)
    total.index_add_(0, token, expert.output[token] * routing.topk_weight[token, choice, None])


@dataclass(frozen=True)
class HeadView:
    """What the model made of the text in the end, after its last layer."""

    text: ProbeText
    predicted: Tensor  # (T,) int64, the most probable next token
    loss: Tensor  # (T,) float32, nats of the token that follows; NaN after the last of a sequence
    logits: Tensor | None = None  # (T, V) float32, where they were asked for
    # By how much the loss (T,) of each token rises under interventions, by their names: 0 before the first token of its
    # text that one reaches, NaN after the last of a sequence, and NaN everywhere where the text did not come through.
    # Those that the pass was told of are known; for others the text goes through the model again.
    under: Effects | None = field(default=None, repr=False)
    rms: Tensor | None = None  # (T,) root mean square of the stream, by which the last norm divides it
    words: Reading | None = field(default=None, repr=False)  # reads rows of a residual stream


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

    def run_experts(
        self, x: Tensor, watch: Watch | None = None, beside: ExpertSums | None = None
    ) -> Iterator[ExpertView]:
        """What every expert, the shared one last, makes of tokens x (T, H).

        To the sums beside it adds what the chosen ones make of other streams; at its end those are whole.
        """
        ...

    def adapted(self, x: Tensor, routing: Routing) -> Tensor | None:
        """What HyperMoE's adapters add for tokens x (T, H) that are routed: (T, H) float32; None without any."""
        ...


class PassedWeights(LayerWeights, Protocol):
    """Those of a layer that text is taken through by itself."""

    def each(self, x: Tensor, topk_index: Tensor) -> Tensor:
        """What the experts topk_index (T, K) make of tokens x (T, H), for a router that asks: (T, K, H)."""
        ...

    def combine(self, parts: Sequence[Rows]) -> list[Tensor]:
        """What the layer makes of streams by the chosen experts alone, or by its dense FFN: (T, H) of each."""
        ...
