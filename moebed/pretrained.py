"""PretrainedMoE: a checkpoint of any size as a LightningModule, whose layers are read one after another.

E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.hub import find_checkpoint
from moebed.checkpoints.pool import Piece, WeightPool
from moebed.config import ModelConfig
from moebed.errors import ConfigError, UserError
from moebed.families.keys import TensorPart
from moebed.views import MATRICES, ExpertView, LayerView, Need, ProbeText

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class PretrainedMoE(LightningModule):
    """A pretrained checkpoint, looked at a layer at a time; ``Trainer.predict`` on it walks its layers.

    A batch is the index of a layer, and the prediction for it is its LayerView, which reads what it is asked for.

    Args:
        checkpoint: Folder of a checkpoint, its id on the Hugging Face hub, or a ``.ckpt`` file of a training run.
        reference_dense: The same of the dense model whose FFNs the experts are compared with (the paper's "F").
        layers: Layers to walk; all of them if not given.
        memory_budget: Bytes, or a string such as 8GiB, for the weights held at a time and the work on them.
        dtype: Look at the weights as rounded to this; as they are stored if not given.

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
    ) -> None:
        super().__init__()
        self.name = checkpoint if not Path(checkpoint).exists() else Path(checkpoint).resolve().name
        self.checkpoint = Checkpoint.open(find_checkpoint(checkpoint))
        self.reference = Checkpoint.open(find_checkpoint(reference_dense)) if reference_dense else None
        self.config: ModelConfig = self.checkpoint.config
        self.weights_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.memory_budget = parse_bytes(memory_budget)
        self.layers = list(range(self.config.num_hidden_layers)) if layers is None else sorted(set(layers))
        self.notes = list(self.checkpoint.notes) + (self.reference.notes if self.reference else [])
        self.on_read: Callable[[int], None] = lambda done: None
        self._skipped: frozenset[int] = frozenset()
        self._needs = frozenset({Need.WEIGHTS})
        self._views: Iterator[LayerView] | None = None
        self._pool: WeightPool | None = None
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
        if dense.num_hidden_layers < self.config.num_hidden_layers:
            self.notes.append(f"{self.reference.name} has no layer from {dense.num_hidden_layers} on to compare with")

    # What the probes read ------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from another in a summary: its name, family and main sizes."""
        sizes = {key: getattr(self.config, key) for key in ("num_hidden_layers", "hidden_size", "num_experts")}
        return {"name": self.name, "model_type": self.checkpoint.family.model_type, **sizes}

    def fingerprint(self) -> str:
        """A hash of all that decides what the walk shows of a layer: the files and the arguments."""
        parts = [self.checkpoint.fingerprint(), self.reference.fingerprint() if self.reference else None]
        return hashlib.sha256(json.dumps([*parts, str(self.weights_dtype)]).encode()).hexdigest()

    def skip(self, layers: Collection[int], needs: frozenset[Need]) -> None:
        """Before a walk by ``Trainer.predict``: layers to leave out, and what the probes ask for."""
        self._skipped, self._needs = frozenset(layers), needs

    def views(self, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView]:
        """The walk over the layers that are not left out; the same views that a live model offers.

        Args:
            text: Must be None: only weights can be looked at.
            needs: What the probes ask for.

        Raises:
            UserError: The probes ask for more than weights.
        """
        if text is not None or needs - {Need.WEIGHTS}:
            raise UserError("a checkpoint that is read layer by layer offers its weights alone; leave out other probes")
        layers = [layer for layer in self.layers if layer not in self._skipped]
        moe_layers = [layer for layer in layers if self.config.layer(layer).num_experts]
        plan = [self._pieces(layer, name) for layer in moe_layers for name in MATRICES]
        self.close()
        self._pool = WeightPool(plan, self.memory_budget, lambda done: self.on_read(done))
        return (self._view(self._pool, layer, moe_layers) for layer in layers)

    @property
    def bytes_total(self) -> int:
        """Bytes that the walk reads."""
        return self._pool.total if self._pool is not None else 0

    def close(self) -> None:
        """End a walk: stop reading, free the weights."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _pieces(self, layer: int, name: str) -> list[Piece]:
        keys = self.checkpoint.keys
        experts = range(self.config.layer(layer).num_experts)
        pieces = [Piece(self.checkpoint, keys.expert(layer, name, expert)) for expert in experts]
        shared, reference = keys.shared(layer, name), self._reference_part(layer, name)
        pieces += [Piece(self.checkpoint, shared)] if shared is not None else []
        return pieces + ([reference] if reference is not None else [])

    def _reference_part(self, layer: int, name: str) -> Piece | None:
        if self.reference is None or layer >= self.reference.config.num_hidden_layers:
            return None
        part = self.reference.keys.dense(layer, name)
        return Piece(self.reference, part) if part is not None else None

    def _view(self, pool: WeightPool, layer: int, moe_layers: list[int]) -> LayerView:
        sizes = self.config.layer(layer)
        view = LayerView(layer, self.config.num_hidden_layers, sizes.num_experts, sizes.num_experts_per_tok, None)
        if not sizes.num_experts:
            view.num_experts_per_tok = 0
            return view
        view.weights = StreamedWeights(self, pool, layer, len(MATRICES) * moe_layers.index(layer))
        router = self.checkpoint.keys.router(layer)
        try:
            view.gate = self.converted(self.checkpoint.read(router)).float() if router is not None else None
        except UserError as error:
            view.error = error
        return view

    def converted(self, weights: Tensor) -> Tensor:
        """Weights as the probes are to see them: on the device, and rounded where that was asked for."""
        return weights.to(device=self.device, dtype=self.weights_dtype or weights.dtype)

    # Lightning -----------------------------------------------------------------------------------------------------

    def predict_dataloader(self) -> list[int]:
        """The layers."""
        return self.layers

    def on_predict_start(self) -> None:
        """Begin the walk."""
        self._views = self.views(None, self._needs)

    def predict_step(self, batch: int, batch_idx: int) -> LayerView | None:
        """The view of a layer; None for one that is left out."""
        assert self._views is not None
        return None if batch in self._skipped else next(self._views)

    def on_predict_end(self) -> None:
        """End the walk."""
        self.close()


class StreamedWeights:
    """The weights of one layer of a checkpoint: those of one matrix at a time are in memory."""

    def __init__(self, model: PretrainedMoE, pool: WeightPool, layer: int, first_group: int) -> None:
        self._model, self._pool, self._layer, self._first_group = model, pool, layer, first_group

    def expert_matrix(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one routed expert's matrix, as stored."""
        return self._give(name, Piece(self._model.checkpoint, self._expert(name, index)), rows)

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix."""
        part = self._expert(name, 0)
        return part.rows, part.columns

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix."""
        part = self._model.checkpoint.keys.shared(self._layer, name)
        return None if part is None else self._give(name, Piece(self._model.checkpoint, part))

    def reference_matrix(self, name: str) -> Tensor | None:
        """The matrix of the dense reference model's FFN at this layer."""
        piece = self._model._reference_part(self._layer, name)
        return None if piece is None else self._give(name, piece)

    def run_experts(self, x: Tensor, needs: frozenset[Need]) -> Iterator[ExpertView]:
        """Not offered: no text is run through a streamed checkpoint."""
        raise UserError("a checkpoint that is read layer by layer offers its weights alone")

    def _expert(self, name: str, index: int) -> TensorPart:
        return self._model.checkpoint.keys.expert(self._layer, name, index)

    def _give(self, name: str, piece: Piece, rows: slice = slice(None)) -> Tensor:
        self._pool.enter(self._first_group + MATRICES.index(name))
        return self._model.converted(self._pool.rows(piece, rows))


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or a string such as 8GiB, 500MB.

    Raises:
        ConfigError: It is no such string.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", str(text), re.IGNORECASE)
    if found is None or found.group(2).upper() not in _UNITS:
        raise ConfigError(f"memory_budget is {text!r}; write it such as 8GiB or 500MB")
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])
