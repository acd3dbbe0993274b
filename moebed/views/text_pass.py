"""A pass of text through a model, a layer at a time: the same code for a live decoder and for weights read as it goes.

The text's valid tokens lie side by side, sequence after sequence; padding exists within attention alone.

T valid tokens, B sequences, S positions, E experts, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.errors import UserError
from moebed.machine.finite import all_finite
from moebed.machine.mapped import new_array
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block, MoE
from moebed.model.routers import Routing
from moebed.views.attending import TextAttention
from moebed.views.attribution import Attribution, Following, Words, most_raised, root_mean_square
from moebed.views.beside import ExpertSums, Rows
from moebed.views.branches import Branches, route
from moebed.views.interventions import Intervention, LayerContext
from moebed.views.layer import HeadView, LayerView, PassedWeights, ProbeText

_BAND_LOGITS = 1 << 25  # at a time


class TextModel(Protocol):
    """What a pass asks of a model; weights are valid until those of the next layer are asked for."""

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Residual stream (N, H) float32 that ids (N,) enter the first layer with."""
        ...

    def block(self, index: int) -> Block:
        """A layer whose attention, norms and router have their weights."""
        ...

    def layer_weights(self, index: int) -> PassedWeights:
        """The layer's FFN or experts."""
        ...

    def head(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits (N, v) of one band of the vocabulary after another; see ``band_rows``."""
        ...

    def head_rows(self, ids: Tensor) -> Tensor:
        """What ``head`` makes the logits of ids (N,) of: (N, H) float32, of a stream over its root mean square."""
        ...

    def computing(self) -> AbstractContextManager[object]:
        """The precision of products."""
        ...


# Makes, of a layer's index, its input (T, H) and its routing, what LayerView.ablate is.
Ablation = Callable[[int, Tensor, Routing], Callable[[int], Tensor]]


@dataclass
class Stream:
    """Residual stream of the valid tokens on their way through a model.

    Args:
        layer: The layer that they enter next.
        hidden: (T, H) float32.
    """

    layer: int
    hidden: Tensor


class TextPass:
    """Text on its way through a model, and through the dense reference beside it.

    Where it cannot go on, because weights cannot be read or a value is NaN, ``stopped`` says why, the layer's view has
    the error, and later views have no text.

    Args:
        model: The model.
        text: Its sequences.
        reference: A dense model that sees the same text; its FFN's outputs are offered beside the experts'.
        stream: Where an earlier pass was stopped; from the start if not given.
        reference_stream: The same of the reference.
        interventions: Under each of which the text goes through the layers as well, beside the text as it is;
            ``stream`` is where none of them has begun.
        attributed: Whether views say how what a layer writes adds to logits.

    Raises:
        UserError: The text does not fit the model, or an intervention does not.
    """

    def __init__(
        self,
        model: TextModel,
        text: ProbeText,
        reference: TextModel | None = None,
        stream: Stream | None = None,
        reference_stream: Stream | None = None,
        interventions: Sequence[Intervention] = (),
        attributed: bool = False,
    ) -> None:
        self.text = text
        self._following = Following.of(model.head_rows, text.targets, model.config.norm_type) if attributed else None
        self._branches = Branches(interventions, text, model.config)
        self.scratch: Path | None = None  # folder where large logits are kept; in memory if not given
        self.stopped: UserError | None = None
        self._main = _Way(model, text, stream)
        self._reference = _Way(reference, text, reference_stream) if reference is not None else None

    @property
    def streams(self) -> tuple[Stream, Stream | None]:
        """Where the text is, in the model and in the reference."""
        return self._main.stream, self._reference.stream if self._reference is not None else None

    def layers(
        self,
        views: Iterable[LayerView],
        shown: frozenset[int] | None = None,
        every_expert: frozenset[int] = frozenset(),
        ablation: Ablation | None = None,
    ) -> Iterator[LayerView]:
        """Each layer with what happened there, and on to the next when it was looked at.

        Args:
            views: All layers in order, from that which the streams enter, as their weights are.
            shown: Layers to yield; all of them if not given.
            every_expert: Layers that are gone through by running every expert, whether or not who looks asks for it.
            ablation: Makes ``LayerView.ablate``, where the model is at hand as a whole.
        """
        for weights_view in views:
            view = self._enter(weights_view, ablation)
            if shown is None or view.index in shown:
                yield view
            if view.index in every_expert and view.num_experts and view.text is not None and view.moe_output is None:
                with suppress(UserError):  # as where the layer is shown: it is gone through by the chosen ones then
                    for _ in view.experts():
                        pass
            self._leave(view)

    def continued(self, output: Tensor) -> TextPass:
        """A pass of its own from here on, as if the layer that the text is in had made this output (T, H) of it."""
        return TextPass(self._main.model, self.text, stream=self._main.after(output))

    def head(self, with_logits: bool = False) -> HeadView | None:
        """What the model predicts after the last layer; None where the text did not come that far."""
        if self.stopped is not None:
            return None
        try:
            return self._main.head(self.text, with_logits, self.scratch, self._branches)
        except UserError as error:
            self.stopped = error
            return None

    def effects(self, interventions: Sequence[Intervention]) -> dict[str, Tensor]:
        """By how much the loss (T,) rises under those of the pass; see ``HeadView.under``.

        Raises:
            UserError: The text did not come to the end as it is.
        """
        head = self.head()
        if head is None or head.under is None:
            raise self.stopped or UserError("the text did not come to the head")
        return head.under(interventions)

    def _enter(self, view: LayerView, ablation: Ablation | None) -> LayerView:
        """The view of a layer with what text did there, or why it did not come there."""
        if self.stopped is not None:
            return replace(view, text_error=self.stopped)
        try:
            x, routing = self._main.enter(self._branches)
            reference = self._reference_output(view.index)
        except UserError as error:
            self.stopped = error
            return replace(view, error=error, text_error=error)
        ablate = ablation(view.index, x, routing) if ablation and routing is not None and view.num_experts > 1 else None
        return replace(
            view,
            text=self.text,
            routing=routing,
            moe_input=x,
            residual=self._main.attended,
            reference_output=reference,
            ablate=ablate,
            beside=self._branches.sums(),
            attribution=self._main.attribution(self._following),
            leave=lambda output: self._main.after(output).hidden,
        )

    def _reference_output(self, layer: int) -> Tensor | None:
        """What the dense reference's FFN makes of its own hidden states (T, H); None where it has no such layer."""
        if self._reference is None or layer >= self._reference.model.config.num_hidden_layers:
            return None
        x, _ = self._reference.enter()
        with self._reference.model.computing():
            (output,) = self._reference.model.layer_weights(layer).combine([Rows(x, None)])
        require_finite(output, f"the reference's FFN output at layer {layer}")
        return output

    def _leave(self, view: LayerView) -> None:
        if self.stopped is not None:
            return
        try:
            output = view.moe_output if view.moe_output is not None else self._main.combine(view)
            self._main.leave(output, self._branches, view.beside)
            if self._reference is not None and view.reference_output is not None:
                self._reference.leave(view.reference_output)
        except UserError as error:
            self.stopped = error


class _Way:
    """The text's way through one model."""

    def __init__(self, model: TextModel, text: ProbeText, stream: Stream | None) -> None:
        lengths = text.token_mask.sum(dim=1)
        longest = int(lengths.max())
        if longest > model.config.max_position_embeddings:
            raise UserError(
                f"a sequence of {longest} tokens is longer than the model's max_position_embeddings "
                f"{model.config.max_position_embeddings}; shorten the text or raise it"
            )
        self.model, self._context = model, text.context
        if stream is None:
            with model.computing():
                stream = Stream(0, model.embed(text.token_ids).float())
        self.stream = stream
        self._attention = TextAttention(model.config, lengths, stream.hidden.device)
        self._block: Block | None = None
        self.attended = stream.hidden  # (T, H) residual stream between attention and FFN

    def enter(self, branches: Branches | None = None) -> tuple[Tensor, Routing | None]:
        """Through attention: the FFN's or MoE's normalised input (T, H), and the routing of an MoE."""
        self._block = block = self.model.block(self.stream.layer)
        with self.model.computing():
            self.attended = self._attention.attend(block, self.stream.hidden)
            x = block.pre_ffn_norm(self.attended)
            require_finite(x, f"the hidden states at layer {self.stream.layer}")
            if branches is not None:
                branches.attend(block, self._attention, self.stream.hidden, self.attended)
            if not isinstance(block.mlp, MoE):
                return x, None
            weights = self.model.layer_weights(self.stream.layer)
            others = [] if branches is None else [branch.x for branch in branches.begun if branch.x is not None]
            context = self._context.changed(lambda of_token: of_token.to(x.device))
            routings = route(block.mlp.router, weights, [x, *others], context)
            routing = next(routings)
            if branches is not None:
                branches.change(LayerContext(self.stream.layer, block.mlp.router), x, routing, routings)
            return x, routing

    def combine(self, view: LayerView) -> Tensor:
        """The layer's output (T, H), by the chosen experts alone, and what they make of streams beside the text."""
        assert view.moe_input is not None
        beside = view.beside
        with self.model.computing():
            weights = self.model.layer_weights(view.index)
            parts = [Rows(view.moe_input, view.routing), *([] if beside is None else beside.parts)]
            output, *others = (total.float() for total in weights.combine(parts))
        if beside is not None:
            beside.totals = others
        return output

    def leave(self, output: Tensor, branches: Branches | None = None, beside: ExpertSums | None = None) -> None:
        """On to the next layer with the FFN's or MoE's output (T, H), and those of branches."""
        attended = self.attended
        self.stream = self.after(output)
        require_finite(self.stream.hidden, f"the hidden states after layer {self.stream.layer - 1}")
        if branches is not None and beside is not None:
            assert self._block is not None
            with self.model.computing():
                branches.leave(attended, self.stream.hidden, self._block.leave, beside)
        self._block = None

    def after(self, output: Tensor) -> Stream:
        """What enters the next layer if this one makes this output (T, H)."""
        assert self._block is not None
        with self.model.computing():
            return Stream(self.stream.layer + 1, self._block.leave(self.attended, output))

    def attribution(self, following: Following | None) -> Attribution | None:
        """How what this layer writes adds to logits."""
        if following is None or self._block is None:
            return None
        return Attribution(following, self._block.residual_multiplier, self._block.post_ffn_norm)

    def head(self, text: ProbeText, with_logits: bool, scratch: Path | None, branches: Branches) -> HeadView:
        """Predictions and losses, over the vocabulary a band at a time."""
        hidden, tokens = self.stream.hidden, len(self.stream.hidden)
        targets = text.targets.to(hidden.device)
        others, rows = branches.last(targets)
        if others:
            hidden = torch.cat([hidden, *rows])
            rows.clear()
            targets = torch.cat([targets, *(targets[token] for token in others)])
        shape = (tokens, self.model.config.vocab_size)
        kept = torch.from_numpy(new_array(shape, np.dtype(np.float32), scratch)) if with_logits else None
        predicted, loss = self._predict(hidden, targets, kept)
        mine, *theirs = loss.split([tokens, *map(len, others)])
        effects = branches.effects(mine, others, theirs)
        config = self.model.config
        rms = root_mean_square(self.stream.hidden, config.rms_norm_eps, config.norm_type)
        return HeadView(text, predicted[:tokens], mine, kept, partial(_known, effects), rms, partial(words, self.model))

    def _predict(self, hidden: Tensor, targets: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The most probable ids (N,) after rows (N, H), and the losses (N,) of targets (N,), NaN where those are -1.

        Logits of the first rows are written to ``kept``.
        """
        best = hidden.new_full((len(hidden),), -torch.inf)
        predicted = torch.zeros_like(targets)
        total, wanted = best.clone(), torch.full_like(best, torch.nan)
        start = 0
        with self.model.computing():
            for band in self.model.head(hidden):
                logits = band.float()  # (N, v)
                most, at = logits.max(dim=1)
                predicted = torch.where(most > best, at + start, predicted)
                best, total = torch.maximum(most, best), torch.logaddexp(total, logits.logsumexp(dim=1))
                inside = (targets >= start) & (targets < start + logits.shape[1])
                found = logits.gather(1, (targets - start).clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
                wanted = torch.where(inside, found, wanted)
                if kept is not None:
                    kept[:, start : start + logits.shape[1]].copy_(logits[: len(kept)])
                start += logits.shape[1]
        require_finite(total, "the logits")
        return predicted, total - wanted


def words(model: TextModel, rows: Tensor, group: Tensor, top: int) -> Words:
    """The ids whose logits rows (N, H) raise most over the mean of their group; see ``Reading``."""
    with model.computing():
        return most_raised(model.head(rows), group, top)


def _known(effects: dict[str, Tensor], interventions: Sequence[Intervention]) -> dict[str, Tensor]:
    """Those of the effects that are asked for."""
    return {one.name: effects[one.name] for one in interventions}


def band_rows(num_tokens: int) -> int:
    """Rows of the vocabulary whose logits for so many tokens are made at a time."""
    return max(256, _BAND_LOGITS // max(1, num_tokens))


def logits_in_bands(
    x: Tensor, table: Iterable[Tensor], bias: Tensor | None, multiplier: float = 1.0
) -> Iterator[Tensor]:
    """Logits (N, v) of x (N, H), band after band of the vocabulary.

    Args:
        x: (N, H), normalised.
        table: Rows (v, H) of the output embedding, band after band.
        bias: (V,), or none.
        multiplier: Of the logits.
    """
    start = 0
    for rows in table:
        stop = start + len(rows)
        yield F.linear(x, rows, None if bias is None else bias[start:stop].to(rows.dtype)) * multiplier
        start = stop


def require_finite(values: Tensor, what: str) -> None:
    """Raise UserError if NaN or Inf is among the values."""
    if not all_finite(values):
        kind = "NaN" if bool(values.isnan().any()) else "Inf"
        raise UserError(f"{what} hold {kind}: what follows would be meaningless, and is left out")
