"""The walk over the layers of a live model, which is a forward pass: each layer's input is what the real model made.

E experts, K experts per token, H hidden, F expert intermediate, T valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block, Decoder, FeedForward, MoE, evaluating
from moebed.model.routers import Routing
from moebed.views.beside import ExpertSums, Rows
from moebed.views.branches import copy_bytes, require_different
from moebed.views.interventions import Intervention, LayerContext, mask
from moebed.views.layer import ExpertKind, ExpertView, HeadView, LayerView, Need, PassedWeights, ProbeText, Watch
from moebed.views.text_pass import TextModel, TextPass, band_rows, logits_in_bands

_COPIES = 1 << 30  # bytes of all interventions' copies of a text at a time


@dataclass(frozen=True)
class ModuleWeights:
    """The weights of a live layer."""

    mlp: MoE | FeedForward

    def expert_matrix(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one routed expert's matrix; shares memory with the model, unless it is a product."""
        assert isinstance(self.mlp, MoE)
        return self.mlp.experts.expert_matrix(name, index).detach()[rows]

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix."""
        assert isinstance(self.mlp, MoE)
        _, hidden, width = self.mlp.experts.down_proj.shape
        return (hidden, width) if name == "down" else (width, hidden)

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix; shares memory with the model."""
        if not isinstance(self.mlp, MoE) or self.mlp.shared_expert is None:
            return None
        return getattr(self.mlp.shared_expert, f"{name}_proj").weight.detach()

    def reference_matrix(self, name: str) -> Tensor | None:
        """A live model has no reference."""
        return None

    def run_experts(
        self, x: Tensor, watch: Watch | None = None, beside: ExpertSums | None = None
    ) -> Iterator[ExpertView]:
        """Run the modules."""
        assert isinstance(self.mlp, MoE)
        routed, shared = self.mlp.experts, self.mlp.shared_expert
        x, every = x.to(routed.down_proj.dtype), slice(0, len(x))
        for index in range(routed.num_experts):
            activated = routed.activate(index, x)
            if watch is not None:
                watch(index, every, activated.float())
            yield ExpertView(index, routed.finish(index, x, activated).float())
        if shared is not None:
            yield ExpertView(routed.num_experts, self.mlp.shared_output(x).float(), ExpertKind.SHARED)
        if beside is not None:  # whose weights are at hand anyway
            beside.totals = self.combine(beside.parts)

    def each(self, x: Tensor, topk_index: Tensor) -> Tensor:
        """Run the modules."""
        assert isinstance(self.mlp, MoE)
        return self.mlp.experts.each(x.to(self.mlp.experts.down_proj.dtype), topk_index)

    def adapted(self, x: Tensor, routing: Routing) -> Tensor | None:
        """Run the modules."""
        assert isinstance(self.mlp, MoE)
        adapters = self.mlp.hyper_experts
        return None if adapters is None else adapters(x.to(self.mlp.experts.down_proj.dtype), routing).float()

    def combine(self, parts: Sequence[Rows]) -> list[Tensor]:
        """Run the modules on the chosen experts alone."""
        return [self._combined(*part).float() for part in parts]

    def _combined(self, x: Tensor, routing: Routing | None) -> Tensor:
        if not isinstance(self.mlp, MoE):
            return self.mlp(x.to(self.mlp.down_proj.weight.dtype))
        assert routing is not None
        experts = self.mlp.experts
        return self.mlp.combine(x.to(experts.down_proj.dtype), routing, experts.known_outputs(routing))


@torch.no_grad()
def walk(decoder: Decoder, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
    """Views of a live decoder's layers, from the first to the last, in float32 and in evaluation mode.

    The model's parameters, its training flag and every random state are as before when the walk ends.

    Args:
        decoder: The model.
        text: Sequences to run; None for weights alone.
        needs: What the probes ask for; without routing, outputs or activations no text is run.

    Yields:
        A view a layer, layers without experts included; then, where predictions are asked for, a HeadView.
    """
    with evaluating(decoder):
        yield from walk_model(LiveModel(decoder), text, needs)


@torch.no_grad()
def walk_model(model: TextModel, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
    """The same of any model that hands out its layers in order."""
    views = _views(model, 0)
    if text is None or not needs - {Need.WEIGHTS}:
        yield from views
        return
    run = TextPass(model, text, attributed=Need.ATTRIBUTION in needs)
    yield from run.layers(views, ablation=_Ablations(model, run))
    head = run.head(Need.LOGITS in needs) if needs & {Need.PREDICTIONS, Need.LOGITS} else None
    if head is not None:
        yield replace(head, under=partial(_effects, model, text))


@torch.no_grad()
def intervene(decoder: Decoder, text: ProbeText, interventions: Sequence[Intervention]) -> dict[str, Tensor]:
    """By how much the loss (T,) of each token rises under interventions, by their names; NaN where none follows.

    Raises:
        UserError: The text does not come through the model as it is, or an intervention does not fit it.
    """
    with evaluating(decoder):
        return _effects(LiveModel(decoder), text, interventions)


@torch.no_grad()
def _effects(model: TextModel, text: ProbeText, interventions: Sequence[Intervention]) -> dict[str, Tensor]:
    """The same of any model that hands out its layers in order, so many at a time as _COPIES take memory."""
    require_different(interventions)
    found: dict[str, Tensor] = {}
    most = max(1, _COPIES // copy_bytes(int(text.token_mask.sum()), model.config.hidden_size))
    for start in range(0, len(interventions), most):
        some = interventions[start : start + most]
        run = TextPass(model, text, interventions=some)
        for _ in run.layers(_views(model, 0)):
            pass
        found |= run.effects(some)
    return found


class _Ablations:
    """Makes, of a layer, what the loss (T,) of each token is without one of its experts; -1 is with all."""

    def __init__(self, model: TextModel, run: TextPass) -> None:
        self._model, self._run = model, run
        self._whole: Tensor | None = None  # the same at every layer

    def __call__(self, index: int, x: Tensor, routing: Routing) -> Callable[[int], Tensor]:
        mlp = self._model.block(index).mlp
        assert isinstance(mlp, MoE)
        layer = LayerContext(index, mlp.router)

        def loss(expert: int) -> Tensor:
            if expert >= 0:
                return self._after(index, mlp, x, mask(expert).apply(routing, x, layer))
            if self._whole is None:
                self._whole = self._after(index, mlp, x, routing)
            return self._whole

        return loss

    def _after(self, index: int, mlp: MoE, x: Tensor, routing: Routing) -> Tensor:
        (output,) = ModuleWeights(mlp).combine([Rows(x, routing)])
        rest = self._run.continued(output)
        for _ in rest.layers(_views(self._model, index + 1)):
            pass
        head = rest.head()
        if head is None:
            raise rest.stopped or UserError("the text did not come to the head")
        return head.loss


@dataclass(frozen=True)
class LiveModel:
    """A decoder in memory, as a TextPass asks for it."""

    decoder: Decoder

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.decoder.config

    def embed(self, ids: Tensor) -> Tensor:
        """Residual stream (N, H) of ids (N,)."""
        table = self.decoder.embed_tokens
        return table(ids.to(table.weight.device)) * self.config.embedding_multiplier

    def block(self, index: int) -> Block:
        """The layer."""
        return self.decoder.blocks[index]

    def layer_weights(self, index: int) -> PassedWeights:
        """The layer's FFN or experts."""
        return ModuleWeights(self.decoder.blocks[index].mlp)

    def head(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits (N, v), band after band of the vocabulary."""
        x, head = self.decoder.norm(hidden), self.decoder.lm_head
        bands = head.weight.split(band_rows(len(x)))
        yield from logits_in_bands(x, bands, head.bias, self.config.logits_multiplier)

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows (N, H) of the head, with the last norm's scale."""
        weight, scale = self.decoder.lm_head.weight, self.decoder.norm.weight
        assert isinstance(scale, Tensor)
        return weight[ids.to(weight.device)].float() * (scale * self.config.logits_multiplier)

    def computing(self) -> AbstractContextManager[object]:
        """In float32, or in what the parameters are in."""
        return computing_like(self.decoder.embed_tokens.weight)


def computing_like(weight: Tensor) -> AbstractContextManager[object]:
    """Products in float32, or in the dtype of the weights."""
    if weight.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(weight.device.type, dtype=weight.dtype)


def _views(model: TextModel, start: int) -> Iterator[LayerView]:
    """Views of the layers from one on, each made when it is asked for."""
    for index in range(start, model.config.num_hidden_layers):
        layer, mlp = model.config.layer(index), model.block(index).mlp
        gate = mlp.router.gate() if isinstance(mlp, MoE) else None
        yield LayerView(
            index=index,
            num_hidden_layers=model.config.num_hidden_layers,
            num_experts=layer.num_experts,
            num_experts_per_tok=layer.num_experts_per_tok if layer.num_experts else 0,
            gate=None if gate is None else gate.detach().float(),
            shift_invariant=mlp.router.shift_invariant if isinstance(mlp, MoE) else True,
            weights=model.layer_weights(index),
        )
