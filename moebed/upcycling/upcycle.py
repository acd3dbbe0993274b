"""A dense checkpoint into an MoE checkpoint, streamed: at most one layer's FFN and one expert's matrix in memory.

E experts, K of them a token, H hidden, D width of the dense FFN, F width of an expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.companions import copy_tokenizer, special_ids, write_start_recipe
from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.choice import choose_family
from moebed.checkpoints.families.keys import KeyMap, Placed
from moebed.checkpoints.families.registry import family_of
from moebed.checkpoints.writer import FolderWriter, read_bands, stored_dtypes
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.routers import cautions
from moebed.upcycling.contract import Copy, Settings, TextFacts, generator
from moebed.upcycling.first_loss import FirstLosses
from moebed.upcycling.methods import METHODS

_MLP = re.compile(r"^layers\.(\d+)\.mlp\.(experts\.|router\.|shared_expert)")


class Plan(NamedTuple):
    """What is about to be written.

    Args:
        config: The MoE.
        family: In whose layout.
        note: Why it is moebed's own layout, where it is.
    """

    config: ModelConfig
    family: Family
    note: str


def plan_upcycling(
    source: Checkpoint,
    method: str,
    settings: Settings,
    shared_experts: int = 0,
    dense_layers: Collection[int] = (),
    family: str | None = None,
) -> Plan:
    """The MoE that a dense checkpoint becomes.

    Args:
        source: The dense checkpoint.
        method: Name of the method.
        settings: What it reads.
        shared_experts: Shared experts that a layer gets beside the routed ones. Their ``down`` is zero, so that they
            add nothing until they are trained. They have a sigmoid gate where attention has biases, as in Qwen2-MoE.
        dense_layers: Layers that stay as they are.
        family: Layout of the output; the first that transformers loads and that expresses it, if not given.

    Raises:
        ConfigError: The checkpoint is no dense one, or the settings do not fit it or the family.
    """
    config = upcycled_config(source.config, method, settings, shared_experts, dense_layers, source.name)
    if family is not None:
        chosen = family_of(family, "family")
        chosen.write_config(config)
        return Plan(config, chosen, "")
    found = choose_family(config)
    note = found.note
    if note and config.attention_bias and not (config.attention_output_bias or shared_experts):
        note += "; --shared-experts 1 adds what qwen2_moe wants"
    return Plan(config, found.family, note)


def upcycled_config(
    dense: ModelConfig,
    method: str,
    settings: Settings,
    shared_experts: int = 0,
    dense_layers: Collection[int] = (),
    name: str = "the model",
) -> ModelConfig:
    """Config of the MoE that a dense model becomes; the arguments are those of :func:`plan_upcycling`.

    Raises:
        ConfigError: The model, called ``name``, is no dense one, or the settings do not fit it.
    """
    if dense.moe_layers:
        raise ConfigError(f"{name} has experts already, in layer {dense.moe_layers[0]}; give a dense checkpoint")
    outside = [layer for layer in dense_layers if not 0 <= layer < dense.num_hidden_layers]
    if outside:
        raise ConfigError(
            f"dense-layers: {name} has layers 0 to {dense.num_hidden_layers - 1}, not {outside[0]}; "
            "name layers that are there"
        )
    if shared_experts < 0:
        raise ConfigError(f"shared-experts is {shared_experts}; it must not be negative")
    assert dense.intermediate_size is not None
    experts, per_token, width = METHODS[method].sizes(settings, dense.intermediate_size)
    decided = METHODS[method].model(settings)
    if shared_experts and "num_shared_experts" in decided:
        raise ConfigError(
            f"shared-experts is {shared_experts}, but by {settings.by} makes {decided['num_shared_experts']} residual "
            "ones, which are the shared experts; leave one of them out"
        )
    counts = [0 if layer in dense_layers else experts for layer in range(dense.num_hidden_layers)]
    if not any(counts):
        raise ConfigError("dense-layers names every layer; leave some out, which become MoE layers")
    return dataclasses.replace(
        dense,
        num_experts=counts if dense_layers else experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=width,
        intermediate_size=dense.intermediate_size if dense_layers else None,
        norm_topk_prob=True,
        **{
            "num_shared_experts": shared_experts,
            "shared_expert_gate": bool(shared_experts) and dense.attention_bias,
            "router": "softmax_topk",
            **decided,
        },
    )


class UpcycledWeights:
    """What each region of the new model's parameters holds; asked in the order of its layers.

    Args:
        source: The dense checkpoint.
        plan: The new model.
        method: Name of the method.
        settings: What it reads.
        facts: What text told of the layers, by their index.
    """

    def __init__(
        self, source: Checkpoint, plan: Plan, method: str, settings: Settings, facts: Mapping[int, TextFacts]
    ) -> None:
        self.source, self.plan, self.settings, self._facts = source, plan, settings, facts
        self._method = METHODS[method]
        self._current: Copy | None = None

    def __call__(self, name: str, placed: Placed) -> Iterator[Tensor]:
        """Bands of rows of a region of the parameter ``name``."""
        found = _MLP.match(name)
        if found is None:
            yield from read_bands(self.source, self.source.keys.parameter(name)[0].part)
            return
        layer, kind = int(found.group(1)), found.group(2)
        if self._current is None or self._current.ffn.layer != layer:
            self._current = self._method(self.settings, _SourceFFN(self.source, layer), self._facts.get(layer))
        if kind == "shared_expert":
            made = self._current.shared(name.removesuffix("_proj.weight").rpartition(".")[2])
            yield self._silent(name, layer) if made is None else made
            return
        if kind == "router.":
            yield self._current.router(name.rpartition(".router.")[2])
            return
        matrix = "down"
        if name.endswith("gate_up_proj"):
            half = placed.region[1]
            assert isinstance(half, slice)
            matrix = "up" if half.start else "gate"
        expert = placed.region[0]
        assert isinstance(expert, int)
        yield self._current.expert(matrix, expert)

    def _silent(self, name: str, layer: int) -> Tensor:
        """A shared expert's matrix, or its gate (1, H): random, and zero where that keeps it silent."""
        config = self.plan.config
        wide, hidden = config.layer(layer), config.hidden_size
        width = wide.shared_intermediate_size
        if name.endswith("down_proj.weight"):
            return torch.zeros(hidden, width)
        rows = 1 if name.endswith("shared_expert_gate.weight") else width
        draws = generator(self.settings.seed, layer, "shared", name.rsplit(".", 2)[-2])
        return torch.randn(rows, hidden, generator=draws).mul_(self.settings.init_std)


class _SourceFFN:
    """The FFN of a layer; each matrix is read once and kept as it is stored."""

    def __init__(self, source: Checkpoint, layer: int) -> None:
        self.source, self.layer = source, layer
        self._matrices: dict[str, Tensor] = {}

    def matrix(self, name: str) -> Tensor:
        """``gate`` or ``up`` (D, H), or ``down`` (H, D)."""
        if name not in self._matrices:
            part = self.source.keys.dense(self.layer, name)
            assert part is not None
            self._matrices[name] = self.source.read(part)
        return self._matrices[name]


@torch.no_grad()
def upcycle(
    source: Checkpoint,
    source_path: Path,
    plan: Plan,
    method: str,
    settings: Settings,
    folder: Path,
    dtype: torch.dtype | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_write: Callable[[int], None] = lambda count: None,
    facts: Mapping[int, TextFacts] | None = None,
    first: FirstLosses | None = None,
) -> list[str]:
    """Write the MoE: weights, config, the dense model's tokenizer, and ``start.yaml`` to train from it.

    Args:
        source: The dense checkpoint.
        source_path: Its folder or ``.ckpt`` file.
        plan: From :func:`plan_upcycling`.
        method: Name of the method.
        settings: What it reads.
        folder: A new or empty folder.
        dtype: What the weights are stored in; if not given, each as in the dense checkpoint, and new ones as its
            embedding.
        on_start: Called with the bytes that will be written.
        on_write: Called with the bytes of every band that is written.
        facts: What text told of the layers, from ``moebed.upcycling.from_text.ask_text``.
        first: First losses, from there too, to be kept beside the settings.

    Returns:
        Notes for the person who asked.

    Raises:
        UserError: A weight is NaN or Inf, or the folder cannot be written; or the method asks for text.
    """
    config = plan.config
    if facts is None and (why := METHODS[method].asks_text(settings)):
        raise ConfigError(f"method {method} needs text: {why}; give --text FILE or --domain NAME=FILE")
    stored = dtype or stored_dtypes(source)["embed_tokens.weight"]
    keys = KeyMap(plan.family, config)
    # transformers keeps what it does not know.
    ids = special_ids(source_path, source.settings)
    made = {"method": method, "dense": source.name, **_said(method, settings)}
    if first is not None:
        made["first_loss"] = {"dense": first.dense, **first.moe, "tokens": first.tokens}
    written = {**plan.family.write_config(config), **ids, "moebed_upcycled": made}
    writer = FolderWriter(keys, written, stored, dtypes=stored_dtypes(source) if dtype is None else None)
    on_start(writer.total)
    notes = [note for note in (plan.note, *cautions(config)) if note] + METHODS[method].notes(settings)
    shards = settings.granularity
    if method == "split" and stored != torch.float32 and shards & (shards - 1):
        notes.append(
            f"down times {shards} is rounded to {str(stored).removeprefix('torch.')}, so the first logits are the "
            "dense model's but for that; a granularity that is a power of two, or --dtype float32, is exact"
        )

    def finish(partial: Path) -> None:
        source.require_unchanged()
        tokenizer, note = copy_tokenizer(source_path, partial)
        notes.extend([note] if note else [])
        write_start_recipe(partial, folder, config, tokenizer)

    writer.write(folder, UpcycledWeights(source, plan, method, settings, facts or {}), finish, on_write)
    return notes


def _said(method: str, settings: Settings) -> dict[str, Any]:
    """The settings; of ``partition``'s own those alone that it reads."""
    own = METHODS["partition"].uses - METHODS["cluster"].uses
    read = METHODS[method].reads(settings)
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in own or name in read}


def stored_as(source: Checkpoint, dtype: torch.dtype | None) -> Callable[[str], torch.dtype]:
    """What a parameter of the MoE is stored in, by its name: as asked, or as in the dense checkpoint."""
    dtypes = stored_dtypes(source)
    stored = dtype or dtypes["embed_tokens.weight"]
    return lambda name: stored if dtype else dtypes.get(name, stored)
