"""PretrainedMoE: a checkpoint of any size as a LightningModule, whose layers are read one after another.

E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.hub import find_checkpoint
from moebed.checkpoints.open_ffn import Precision, tokens_at_a_time
from moebed.checkpoints.pool import Piece, WeightPool, limit_of
from moebed.checkpoints.reading_order import ReadingPlan
from moebed.checkpoints.run import is_run
from moebed.checkpoints.streamed import (
    HEAD,
    StreamedModel,
    StreamedWeights,
    block_pieces,
    ffn_pieces,
    head_pieces,
    matrix_pieces,
    routing_step,
)
from moebed.checkpoints.text_options import TextOptions
from moebed.checkpoints.texts import read_texts
from moebed.errors import ConfigError, UserError
from moebed.machine import provenance
from moebed.machine.progress import say
from moebed.machine.units import parse_bytes
from moebed.model.config import ModelConfig
from moebed.model.routers import ROUTERS
from moebed.views.attribution import Words
from moebed.views.branches import copy_bytes, require_different
from moebed.views.interventions import Intervention
from moebed.views.layer import MATRICES, HeadView, LayerView, Need, ProbeText
from moebed.views.text_pass import Stream, TextPass, words

_REFERENCE = "reference "  # its steps in the plan


class PretrainedMoE(LightningModule):
    """A pretrained checkpoint, looked at a layer at a time; ``Trainer.predict`` on it walks its layers.

    A batch is the index of a layer, and the prediction for it is its LayerView, which reads what it is asked for.

    Args:
        checkpoint: Folder of a checkpoint, its id on the Hugging Face hub, or a ``.ckpt`` file of a training run.
        reference_dense: The same of the dense model whose FFNs the experts are compared with (the paper's "F").
        layers: Layers to walk; all of them if not given.
        memory_budget: Bytes, or a string such as 8GiB, for the weights held at a time and the work on them.
        dtype: Look at the weights as rounded to this, and compute in it; if not given, look at them as they are stored
            and compute in float32.
        text: Sequences to run through it, or which ones to read.

    Raises:
        UserError: A checkpoint is missing, damaged, or does not fit the other arguments.
    """

    def __init__(
        self,
        checkpoint: str,
        reference_dense: str | None = None,
        layers: list[int] | None = None,
        memory_budget: str | int = "8GiB",
        dtype: Literal["float32", "bfloat16"] | None = None,
        text: ProbeText | TextOptions | None = None,
    ) -> None:
        super().__init__()
        self.name = checkpoint if not Path(checkpoint).exists() else Path(checkpoint).resolve().name
        path = find_checkpoint(checkpoint)
        if is_run(path):  # whose checkpoints are all called alike
            folder = path.resolve().parent
            self.name = f"{(folder.parent if folder.name == 'checkpoints' else folder).name}/{path.name}"
        runs = text is not None and bool(text)
        self.checkpoint = Checkpoint.open(path, runs)
        self.reference = Checkpoint.open(find_checkpoint(reference_dense), runs) if reference_dense else None
        self.config: ModelConfig = self.checkpoint.config
        self.weights_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.memory_budget = parse_bytes(memory_budget)
        self.layers = list(range(self.config.num_hidden_layers)) if layers is None else sorted(set(layers))
        self.notes = list(self.checkpoint.notes) + (self.reference.notes if self.reference else [])
        self.on_read: Callable[[int], None] = lambda done: None
        self.text_pass: TextPass | None = None
        self.scratch: Path | None = None  # folder where what is large may lie meanwhile
        self._streams: tuple[Stream | None, Stream | None] = (None, None)
        self._skipped: frozenset[int] = frozenset()
        self._needs, self._every_expert = frozenset({Need.WEIGHTS}), False
        self._interventions: Sequence[Intervention] = ()
        self._attributed = False
        self._told: Sequence[Intervention] = ()  # those of them that are in the pass
        self._views: Iterator[LayerView | HeadView] | None = None
        self._pool: WeightPool | None = None
        self.text = text if isinstance(text, ProbeText) else None
        if isinstance(text, TextOptions) and text:
            self.text, notes = read_texts(text, path, self.config)
            self.notes += notes
        if dtype == "bfloat16":
            computed = " and what is made of text computed in it" if self.text is not None else ""
            self.notes.append(f"the weights were looked at as rounded to bfloat16{computed}, as --dtype asks")
        self._check()

    def _check(self) -> None:
        outside = [layer for layer in self.layers if not 0 <= layer < self.config.num_hidden_layers]
        if outside:
            raise ConfigError(
                f"layers: {self.checkpoint.name} has layers 0 to {self.config.num_hidden_layers - 1}, not {outside[0]}"
            )
        if self.reference is None:
            return
        dense = self.reference.config
        if dense.moe_layers:
            raise ConfigError(f"reference_dense: {self.reference.name} has experts itself; give a dense model")
        if dense.hidden_size != self.config.hidden_size:
            raise ConfigError(
                f"reference_dense: {self.reference.name} has hidden_size {dense.hidden_size} but "
                f"{self.checkpoint.name} has {self.config.hidden_size}; give the dense model of its size"
            )
        if self.text is not None and int(self.text.token_ids.max()) >= dense.vocab_size:
            raise ConfigError(
                f"reference_dense: {self.reference.name} has an embedding of {dense.vocab_size} rows but the text has "
                f"token {int(self.text.token_ids.max())}; give a dense model with the same tokenizer"
            )
        if dense.num_hidden_layers < self.config.num_hidden_layers:
            self.notes.append(f"{self.reference.name} has no layer from {dense.num_hidden_layers} on to compare with")

    # What the probes read ------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from another in a summary: its name, family and main sizes."""
        sizes = {key: getattr(self.config, key) for key in ("num_hidden_layers", "hidden_size", "num_experts")}
        return {"name": self.name, "model_type": self.checkpoint.family.model_type, **sizes}

    def record(self) -> dict[str, Any]:
        """All that decides what the walk shows of a layer, as plain data: the files, the text, the types, the code."""
        return {
            "moebed": provenance.moebed_version(),
            "code": provenance.code(),
            "model": self.checkpoint.record(),
            "reference": self.reference.record() if self.reference is not None else None,
            "router": provenance.source_of(ROUTERS[self.config.router]),
            "dtype": str(self.weights_dtype).removeprefix("torch.") if self.weights_dtype else "as stored",
            "text": self.text.fingerprint() if self.text is not None else None,
        }

    def require_unchanged(self) -> None:
        """Raise UserError where files that were opened have changed since."""
        for checkpoint in (self.checkpoint, self.reference):
            if checkpoint is not None:
                checkpoint.require_unchanged()

    def prepare(
        self,
        skipped: Collection[int],
        needs: frozenset[Need],
        streams: tuple[Stream | None, Stream | None] = (None, None),
        every_expert: bool = False,
        interventions: Sequence[Intervention] = (),
    ) -> None:
        """Before a walk.

        Args:
            skipped: Layers to leave out; their number stands for what comes after the last one.
            needs: What the probes ask for.
            streams: Where the text was, in the model and in the reference, when an earlier walk was stopped.
            every_expert: Of the layers that are left out every expert was run: where the text goes through them
                again, it is to come out with the same last digits.
            interventions: Those whose effects will be asked for after the last layer; as many as memory takes go
                through the layers beside the text.
        """
        self._skipped, self._needs, self._streams = frozenset(skipped), needs, streams
        require_different(interventions)
        for one in interventions:
            one.check(self.config)
        self._interventions = tuple(interventions)
        self._every_expert = every_expert

    def views(self, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
        """The walk over the layers that are not left out; the same views that a live model offers.

        Args:
            text: Sequences to run; None for weights alone.
            needs: What the probes ask for.

        Yields:
            A view a layer; then, where predictions are asked for and not left out, a HeadView.

        Raises:
            UserError: The text does not fit the model, or the memory budget is too small.
        """
        self.close()
        self._attributed = text is not None and Need.ATTRIBUTION in needs
        shown = frozenset(self.layers) - self._skipped
        head = self._wants_head(needs)
        runs = text is not None and bool(needs - {Need.WEIGHTS})
        told = self._interventions if runs and head else ()
        streams = self._streams if runs else (None, None)
        earliest = min((layer for one in told for layer in one.layers_of(self.config)), default=math.inf)
        if streams[0] is not None and streams[0].layer > min(shown, default=self.config.num_hidden_layers):
            streams = (None, None)  # a layer that is wanted lies before: the text goes through from the start
        if streams[0] is not None and streams[0].layer > earliest:
            streams = (None, None)  # where a branch has begun, which is not kept
        first = streams[0].layer if streams[0] is not None else 0
        streams = tuple(None if s is None else Stream(s.layer, s.hidden.to(self.device)) for s in streams)  # type: ignore[assignment]
        last = self.config.num_hidden_layers - 1 if runs and head else max(shown, default=-1)
        walked = range(first, last + 1)
        runs = runs and (len(walked) > 0 or head)
        if not runs or text is None:
            model, reference = self._models(lambda limit: self._plan(limit, walked, shown, needs, None))
            return (self._view(model, reference, layer) for layer in walked if layer in shown)
        self._told = self._riders(text, told, lambda limit: self._plan(limit, walked, shown, needs, text))
        spoken_for = self._text_bytes(text, len(self._told))
        model, reference = self._models(lambda limit: self._plan(limit, walked, shown, needs, text), spoken_for)
        self.text_pass = TextPass(
            model, text, reference, *streams, interventions=self._told, attributed=self._attributed
        )
        self.text_pass.scratch = self.scratch
        views = (self._view(model, reference, layer) for layer in walked)
        return self._walk(self.text_pass, views, shown, needs)

    def _models(
        self, planned: Callable[[int], ReadingPlan], spoken_for: int = 0, on_read: Callable[[int], None] | None = None
    ) -> tuple[StreamedModel, StreamedModel | None]:
        """The checkpoint and the dense reference as text goes through them, read as a plan says within a limit."""
        plan = planned(limit_of(self.memory_budget, spoken_for))
        tell = on_read or (lambda done: self.on_read(done))  # which another may have set by then
        self._pool = pool = WeightPool(plan.groups, self.memory_budget, tell, spoken_for)
        precision = Precision(self.weights_dtype, self.device)
        reference = StreamedModel(self.reference, pool, plan, precision, _REFERENCE) if self.reference else None
        return StreamedModel(self.checkpoint, pool, plan, precision), reference

    def _plan(
        self, limit: int, walked: range, shown: frozenset[int], needs: frozenset[Need], text: ProbeText | None
    ) -> ReadingPlan:
        """What is read of some layers, with text or for their weights alone, and of the head."""
        plan = ReadingPlan(limit)
        for layer in walked:
            if text is not None or layer in shown:
                self._plan_layer(plan, layer, Need.WEIGHTS in needs and layer in shown, text is not None)
        if text is not None and self._wants_head(needs):
            plan.add(HEAD, {number: [piece] for number, piece in enumerate(head_pieces(self.checkpoint))})
        return plan

    def _riders(
        self, text: ProbeText, interventions: Sequence[Intervention], planned: Callable[[int], ReadingPlan]
    ) -> Sequence[Intervention]:
        """The interventions that one pass takes beside the text: as many as leave room to read everything once.

        One is taken in any case. Those of early layers come first, as neighbours share a pass.
        """
        in_order = sorted(interventions, key=lambda one: one.layers_of(self.config)[0])
        limit = limit_of(self.memory_budget, self._text_bytes(text))
        sizes = [sum(piece.num_bytes for piece in group) for group in planned(limit).groups]
        needed = max((size for size in sizes if size <= limit), default=0)
        for count in range(len(in_order), 1, -1):
            if limit_of(self.memory_budget, self._text_bytes(text, count)) >= needed:
                return in_order[:count]
        return in_order[:1]

    @torch.no_grad()
    def _walk(
        self, run: TextPass, views: Iterator[LayerView], shown: frozenset[int], needs: frozenset[Need]
    ) -> Iterator[LayerView | HeadView]:
        yield from run.layers(views, shown, frozenset(self.layers) if self._every_expert else frozenset())
        head = run.head(Need.LOGITS in needs) if self._wants_head(needs) else None
        if head is not None:
            assert head.under is not None
            known = head.under(self._told)
            yield replace(head, under=partial(self._effects, head.text, known), words=partial(self._words, head.text))

    @torch.no_grad()
    def _words(self, text: ProbeText, rows: Tensor, group: Tensor, top: int) -> Words:
        """What rows of a residual stream say; the head is read once more."""
        self.close()
        needs = frozenset({Need.PREDICTIONS})
        model, _ = self._models(
            lambda limit: self._plan(limit, range(0), frozenset(), needs, text), 8 * rows.numel(), lambda done: None
        )
        return words(model, rows.to(self.device), group, top)

    @torch.no_grad()
    def _effects(
        self, text: ProbeText, known: dict[str, Tensor], interventions: Sequence[Intervention]
    ) -> dict[str, Tensor]:
        """By how much losses rise: of those that the walk was told of, and in passes of their own of the others."""
        require_different(interventions)
        needs, layers, nothing = frozenset({Need.PREDICTIONS}), range(self.config.num_hidden_layers), frozenset[int]()
        left = [one for one in interventions if one.name not in known]
        while left:
            some = self._riders(text, left, lambda limit: self._plan(limit, layers, nothing, needs, text))
            say(f"once more over the weights, for {len(some)} of {len(left)} interventions")
            self.close()
            model, _ = self._models(
                lambda limit: self._plan(limit, layers, nothing, needs, text),
                self._text_bytes(text, len(some)),
                lambda done: None,
            )
            run = TextPass(model, text, interventions=some)
            for _ in run.layers(self._view(model, None, layer) for layer in layers):
                pass
            known |= run.effects(some)
            left = [one for one in left if one.name not in known]
        return {one.name: known[one.name] for one in interventions}

    def _wants_head(self, needs: frozenset[Need]) -> bool:
        return bool(needs & {Need.PREDICTIONS, Need.LOGITS}) and self.config.num_hidden_layers not in self._skipped

    def _text_bytes(self, text: ProbeText, copies: int = 0) -> int:
        """About what the text's states, with so many copies, and the weights at work take, beside the pool."""
        config = self.config
        widths = [config.layer(i).moe_intermediate_size for i in config.moe_layers] + [config.intermediate_size or 0]
        attention = sum(piece.part.rows * piece.part.columns for piece in block_pieces(self.checkpoint, 0).values())
        tokens = int(text.token_mask.sum())
        # In the type of the products: one at a time, and of an expert whose tokens are many all three beside it.
        matrices = 4 if copies or tokens > tokens_at_a_time(max(widths)) else 1
        states = (8 + self._attributed) * tokens * config.hidden_size
        beside = copies * copy_bytes(tokens, config.hidden_size)
        return 4 * (matrices * max(widths) * config.hidden_size + attention + states) + beside

    @property
    def bytes_total(self) -> int:
        """Bytes that the walk reads."""
        return self._pool.total if self._pool is not None else 0

    def close(self) -> None:
        """End a walk: stop reading, free the weights."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _plan_layer(self, plan: ReadingPlan, layer: int, by_matrix: bool, runs: bool) -> None:
        """Plan what is read of a layer: each matrix for probes that compare weights, each expert for text."""
        sizes = self.config.layer(layer)
        matrices: dict[Hashable, list[Piece]] = {}
        run: dict[Hashable, list[Piece]] = {}
        routing: dict[Hashable, list[Piece]] = {}
        reference: dict[Hashable, list[Piece]] = {}
        if by_matrix and sizes.num_experts:
            matrices = {name: matrix_pieces(self.checkpoint, self.reference, layer, name) for name in MATRICES}
        if runs:
            plan.add(layer, {"block": list(block_pieces(self.checkpoint, layer).values())})
            if self.reference is not None and layer < self.reference.config.num_hidden_layers:
                reference = {f"{_REFERENCE}block": list(block_pieces(self.reference, layer).values())}
                reference[f"{_REFERENCE}ffn"] = _flat(ffn_pieces(self.reference, layer, "ffn"))
            steps: list[int | str] = [*range(sizes.num_experts)] or ["ffn"]
            steps += ["shared"] if sizes.num_experts and sizes.num_shared_experts else []
            run = {step: _flat(ffn_pieces(self.checkpoint, layer, step)) for step in steps}
            if ROUTERS[self.config.router].runs_experts:
                experts = range(sizes.num_experts)
                routing = {routing_step(e): _flat(ffn_pieces(self.checkpoint, layer, e)) for e in experts}
        plan.add(layer, routing, reference, matrices, run)  # in the order in which they are asked for

    def _view(self, model: StreamedModel, reference: StreamedModel | None, layer: int) -> LayerView:
        sizes, gate, error = self.config.layer(layer), None, None
        if sizes.num_experts:
            try:
                gate = model.gate(layer)
            except UserError as found:
                error = found
        return LayerView(
            index=layer,
            num_hidden_layers=self.config.num_hidden_layers,
            num_experts=sizes.num_experts,
            num_experts_per_tok=sizes.num_experts_per_tok if sizes.num_experts else 0,
            gate=gate,
            shift_invariant=ROUTERS[self.config.router].shift_invariant,
            weights=StreamedWeights(model, layer, reference),
            work_bytes=self.memory_budget - model.pool.most,
            error=error,
        )

    # Lightning -----------------------------------------------------------------------------------------------------

    def predict_dataloader(self) -> list[int]:
        """The layers, and one more for what comes after the last."""
        return [*self.layers, self.config.num_hidden_layers]

    def on_predict_start(self) -> None:
        """Begin the walk."""
        self._views = self.views(self.text, self._needs)

    def predict_step(self, batch: int, batch_idx: int) -> LayerView | HeadView | None:
        """The view of a layer; None for one that is left out, and after the last one if nothing is asked of it."""
        assert self._views is not None
        if batch in self._skipped:
            return None
        view = next(self._views, None)
        place = view.index if isinstance(view, LayerView) else self.config.num_hidden_layers
        if place != batch:
            raise RuntimeError(f"the walk came to layer {place} where {batch} was to be shown")
        return view

    def on_predict_end(self) -> None:
        """End the walk."""
        self.close()


def _flat(pieces: Mapping[str, list[Piece]]) -> list[Piece]:
    return [piece for factors in pieces.values() for piece in factors]
