"""What is written of a checkpoint: all of its model, or the model with some of its experts alone.

E experts, K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.keys import Placed, TensorPart
from moebed.checkpoints.writer import read_bands
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.routers import build_router

_IN_MOE = re.compile(r"layers\.(\d+)\.mlp\.(experts|router)\.(.+)")
_BY_EXPERT, _OF_ALL = ("weight", "bias", "expert_bias"), ("l1_coefficient",)  # what routers store


class Copied:
    """What each region of the model's parameters holds, from a checkpoint of the same model."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self._name = ""
        self._parts: dict[str, Placed] = {}

    def __call__(self, name: str, placed: Placed) -> Iterator[Tensor]:
        """Bands of rows of a region of the parameter ``name``."""
        return read_bands(self.source, self.part(name, placed.region))

    def part(self, name: str, region: tuple[int | slice, ...]) -> TensorPart:
        """Where a region of the parameter ``name`` lies in the checkpoint."""
        if name != self._name:
            self._name = name
            self._parts = {str(found.region): found for found in self.source.keys.parameter(name)}
        return self._parts[str(region)].part


class Pruned(NamedTuple):
    """A model with fewer experts.

    Args:
        config: It.
        kept: By layer with experts, those of the model before that it has.
    """

    config: ModelConfig
    kept: Mapping[int, Sequence[int]]


def prune(config: ModelConfig, kept: Mapping[int, Sequence[int]]) -> Pruned:
    """The model that has only some of its experts; where those are fewer than K, a token has them all.

    Args:
        config: The model before.
        kept: The experts of each layer that has any, at least one.

    Raises:
        ConfigError: Its router goes by more than a row an expert, so that a part of it is no router.
    """
    with torch.device("meta"):
        stored = {
            name
            for index in config.moe_layers
            for name in build_router(config, config.layer(index)).state_dict(keep_vars=True)
        }
    if "weight" not in stored or not stored <= {*_BY_EXPERT, *_OF_ALL} or config.hyper_experts is not None:
        what = f"router {config.router}" if config.hyper_experts is None else "hyper_experts"
        raise ConfigError(f"{what} cannot be pruned: only routers with a row of weights for each expert are")
    layers = range(config.num_hidden_layers)
    sizes = [len(kept[index]) if index in kept else 0 for index in layers]
    most = [min(config.layer(i).num_experts_per_tok, sizes[i]) if sizes[i] else 1 for i in layers]
    changed: dict[str, Any] = {"num_experts": _one_or_all(sizes), "num_experts_per_tok": _one_or_all(most)}
    return Pruned(replace(config, **changed), {index: tuple(kept[index]) for index in config.moe_layers})


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


class Kept(Copied):
    """The same of a model with fewer experts, from a checkpoint of the model that has them all."""

    def __init__(self, source: Checkpoint, pruned: Pruned) -> None:
        super().__init__(source)
        self._kept = pruned.kept

    def __call__(self, name: str, placed: Placed) -> Iterator[Tensor]:
        """Bands of rows of a region of the parameter ``name``."""
        found = _IN_MOE.match(name)
        if found is None:
            yield from super().__call__(name, placed)
            return
        experts = self._kept[int(found.group(1))]
        if found.group(2) == "experts":
            expert, *rest = placed.region
            assert isinstance(expert, int)
            yield from read_bands(self.source, self.part(name, (experts[expert], *rest)))
            return
        part = self.part(name, ())
        whole = self.source.read(part).view(self.source.keys.shapes[name])
        yield whole[list(experts)] if found.group(3) in _BY_EXPERT else whole
