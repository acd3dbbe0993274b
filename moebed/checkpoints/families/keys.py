"""The key map at work: which part of which checkpoint tensor makes up which parameter of the decoder.

E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import nn

from moebed.checkpoints.families.base import Family, Stored
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.experts import bias_name
from moebed.model.routers import ROUTERS

_LAYER = re.compile(r"^layers\.(\d+)\.")
_BIAS = re.compile(r"layers\.\{i\}\.mlp\.experts\.(gate|up|down)_proj_bias")
_GATE_UP, _DOWN = "layers.{i}.mlp.experts.gate_up_proj", "layers.{i}.mlp.experts.down_proj"


class TensorPart(NamedTuple):
    """Some rows of a checkpoint tensor, whose leading dimensions are taken as one; all of them for most tensors.

    A row has ``shape[-1]`` numbers, and the rows of a part lie side by side on disk.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor, as the config has it
    first: int  # row
    rows: int

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[-1]


class Placed(NamedTuple):
    """A part, and the region of a decoder's parameter that it fills."""

    part: TensorPart
    region: tuple[int | slice, ...]


class KeyMap:
    """Where a model's parameters lie in a checkpoint of a family.

    Args:
        family: The checkpoint's family.
        config: The model.
        present: Names in the checkpoint, which tell whether experts are fused; none for the published names. A family
            without names for one expert's matrices has them fused always.
    """

    def __init__(self, family: Family, config: ModelConfig, present: Container[str] = ()) -> None:
        self.family, self.config, self._present = family, config, present
        with torch.device("meta"):
            decoder = Decoder(config)
        stored = decoder.stored()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        self.state = frozenset(name for name, tensor in stored.items() if not isinstance(tensor, nn.Parameter))
        always = family.experts is not None and not family.experts.gate
        self._fused = {layer for layer in config.moe_layers if always or self._fused_name(_GATE_UP, layer) in present}

    def _fused_name(self, template: str, layer: int) -> str | None:
        """What the tensor of all experts of a layer is called; None where a family has none."""
        experts = self.family.experts
        name = None if experts is None else experts.gate_up_fused if template == _GATE_UP else experts.down_fused
        return None if name is None else self._named(template, name, layer)

    def _named(self, template: str, name: str, layer: int) -> str:
        """A name, or another one that a parameter's tensor may have and that is there."""
        names = [name, *([self.family.other_names[template]] if template in self.family.other_names else [])]
        if template == "embed_tokens.weight" and self.config.tie_word_embeddings:
            names.append(Stored.of(self.family.tensors["lm_head.weight"]).name)
        experts = self.config.layer(layer).num_experts if layer >= 0 else 0
        named = [one.format(i=layer, e=experts) for one in names]
        return next((one for one in named if one in self._present), named[0])

    def parameter(self, name: str) -> list[Placed]:
        """The parts that make up a parameter of the decoder.

        Raises:
            ConfigError: The family has no such tensor.
        """
        found = _LAYER.match(name)
        layer = int(found.group(1)) if found else -1
        template = _LAYER.sub("layers.{i}.", name)
        if template == _GATE_UP:
            width = self.config.layer(layer).moe_intermediate_size
            halves = {"gate": slice(0, width), "up": slice(width, 2 * width)}
            experts = range(self.config.layer(layer).num_experts)
            return [Placed(self.expert(layer, m, e), (e, half)) for e in experts for m, half in halves.items()]
        if template == _DOWN:
            return [Placed(self.expert(layer, "down", e), (e,)) for e in range(self.config.layer(layer).num_experts)]
        if bias := _BIAS.fullmatch(template):
            return [Placed(self.bias(layer, bias[1], e), (e,)) for e in range(self.config.layer(layer).num_experts)]
        return [Placed(self._whole(template, layer), ())]

    def _whole(self, template: str, layer: int) -> TensorPart:
        if template not in self.family.tensors:
            raise ConfigError(f"a {self.family.model_type} checkpoint has no tensor for the parameter {template}")
        stored, shape = Stored.of(self.family.tensors[template]), self.shapes[template.format(i=layer)]
        rows = math.prod(shape[:-1])
        whole = (*stored.before, *shape)
        if unused := self.unused(template.format(i=layer)):
            whole = (shape[0] + unused, *shape[1:])
        if stored.bands > 1:
            whole = (shape[0] * stored.bands, *shape[1:])
        return TensorPart(self._named(template, stored.name, layer), whole, stored.band * rows, rows)

    def unused(self, name: str) -> int:
        """Rows that a parameter's tensor has after the parameter's own, which nothing is made of."""
        found, template = _LAYER.match(name), _LAYER.sub("layers.{i}.", name)
        field = Stored.of(self.family.tensors.get(template, template)).unused
        return getattr(self.config.layer(int(found[1])), field) if found and field else 0

    def expert(self, layer: int, matrix: str, expert: int) -> TensorPart:
        """One routed expert's ``gate`` or ``up`` (F, H), or ``down`` (H, F)."""
        names, sizes = self.family.experts, self.config.layer(layer)
        if names is None:
            raise ConfigError(f"a {self.family.model_type} checkpoint has no experts, but layer {layer} does")
        hidden, width = self.config.hidden_size, sizes.moe_intermediate_size
        rows, columns = (hidden, width) if matrix == "down" else (width, hidden)
        if layer not in self._fused:
            name = {"gate": names.gate, "up": names.up, "down": names.down}[matrix].format(i=layer, e=expert)
            return TensorPart(name, (rows, columns), 0, rows)
        template, stacked = (_DOWN, rows) if matrix == "down" else (_GATE_UP, 2 * rows)
        fused = self._fused_name(template, layer)
        assert fused is not None
        first = expert * stacked + (rows if matrix == "up" else 0)
        return TensorPart(fused, (sizes.num_experts, stacked, columns), first, rows)

    def bias(self, layer: int, matrix: str, expert: int) -> TensorPart:
        """What one routed expert adds to its products with a matrix: (F,), or (H,) of ``down``."""
        template = f"layers.{{i}}.mlp.experts.{bias_name(matrix)}"
        if layer in self._fused:
            return self._whole(template, layer)._replace(first=expert, rows=1)
        weights = self.expert(layer, matrix, expert).name
        return TensorPart(f"{weights.removesuffix('.weight')}.bias", self.shapes[template.format(i=layer)][1:], 0, 1)

    def factors(self, layer: int, matrix: str, expert: int) -> list[TensorPart]:
        """The parts whose product is one routed expert's matrix: itself, where the router's experts have no factors."""
        found = []
        for name in ROUTERS[self.config.router].experts_class.factors.get(matrix, ()):
            whole = self._whole(f"layers.{{i}}.mlp.{name}", layer)
            found.append(whole._replace(first=expert * whole.shape[1], rows=whole.shape[1]))
        return found or [self.expert(layer, matrix, expert)]

    def shared(self, layer: int, matrix: str) -> TensorPart | None:
        """The shared expert's matrix; None in a layer that has none."""
        sizes = self.config.layer(layer)
        if not (sizes.num_experts and sizes.num_shared_experts):
            return None
        return self._whole(f"layers.{{i}}.mlp.shared_expert.{matrix}_proj.weight", layer)

    def dense(self, layer: int, matrix: str) -> TensorPart | None:
        """The matrix of a layer's dense FFN; None in a layer that has experts."""
        if self.config.layer(layer).num_experts:
            return None
        return self._whole(f"layers.{{i}}.mlp.{matrix}_proj.weight", layer)

    def everything(self) -> Iterator[TensorPart]:
        """Every part of every parameter, each tensor's name and shape included."""
        for name in self.shapes:
            for placed in self.parameter(name):
                yield placed.part
