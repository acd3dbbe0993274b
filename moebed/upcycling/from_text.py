"""All that upcycling asks of a text: importance of neurons, a scale of the output, first losses.

H hidden, D width of the dense FFN, T valid tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.keys import KeyMap
from moebed.errors import ConfigError
from moebed.machine.units import human
from moebed.model.flops import count, layer_shapes
from moebed.upcycling.contract import Settings, TextFacts
from moebed.upcycling.first_loss import FirstLosses, first_losses
from moebed.upcycling.importance import importance_of
from moebed.upcycling.methods import METHODS
from moebed.upcycling.partition import by_importance
from moebed.upcycling.scales import SCALES
from moebed.upcycling.text import TextWalk
from moebed.upcycling.upcycle import Plan, UpcycledWeights, stored_as
from moebed.views.layer import ProbeText

_ACTIVATIONS = 200 << 20  # bytes of the work on some tokens, about


def layers_passed(plan: Plan, settings: Settings, method: str) -> int:
    """How often the text passes a layer."""
    return (3 if _wants_importance(method, settings) else 1) * plan.config.num_hidden_layers


def ask_text(
    source: Checkpoint,
    plan: Plan,
    method: str,
    settings: Settings,
    text: ProbeText,
    memory_budget: int,
    scratch: Path | None = None,
    dtype: torch.dtype | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[dict[int, TextFacts], FirstLosses]:
    """What a text tells of the dense model's layers, by their index, and the first losses of the MoE.

    Args:
        source: The dense checkpoint.
        plan: The MoE, as ``plan_upcycling`` has it.
        method: Name of the method.
        settings: What it reads.
        text: Sequences, which fit the model.
        memory_budget: Bytes for weights and text at a time.
        scratch: A folder where large arrays may lie meanwhile; in memory if not given.
        dtype: What the MoE will be stored in; see :func:`moebed.upcycling.upcycle.upcycle`.
        on_layer: Called whenever the text has passed a layer.

    Raises:
        UserError: The text does not suit the settings, or takes more memory than the budget.
    """
    walk = TextWalk(source, text)
    if not walk.num_predicted:
        raise ConfigError("the text has no token that another one follows; give a longer one")
    scaled = METHODS[method].has_scale
    _require_room(walk, memory_budget, streams=3 + (len(SCALES) + 1) * scaled)
    facts: dict[int, TextFacts] = {}
    if _wants_importance(method, settings):
        experts, by_domain = settings.num_experts, settings.text_clusters == "domains"
        facts = importance_of(walk, plan.config.moe_layers, experts, by_domain, settings.seed, scratch, on_layer)
    unscaled = dataclasses.replace(settings, output_scale=1.0) if scaled else settings
    content = UpcycledWeights(source, plan, method, unscaled, facts)
    stored = stored_as(source, dtype)
    first = first_losses(
        walk,
        KeyMap(plan.family, plan.config),
        lambda name, placed: (band.to(stored(name)) for band in content(name, placed)),
        settings.output_scale if scaled else None,
        scaled,
        on_layer,
    )
    for layer, scale in first.scales.items():
        facts[layer] = facts.get(layer, TextFacts())._replace(scale=scale)
    return facts, first


def _wants_importance(method: str, settings: Settings) -> bool:
    return "by" in METHODS[method].uses and by_importance(settings)


def _require_room(walk: TextWalk, budget: int, streams: int) -> None:
    """Raise ConfigError where a layer of both models and the text do not fit the budget."""
    layer = 4 * 3 * sum(map(count, layer_shapes(walk.config, 0).values()))  # of both models, and as they are read
    head = 4 * walk.config.vocab_size * walk.config.hidden_size
    states = 4 * streams * walk.num_tokens * walk.config.hidden_size
    needed = max(layer, head) + states + _ACTIVATIONS
    if needed > budget:
        raise ConfigError(
            f"{walk.num_tokens:,} tokens of text and a layer of the model take about {human(needed, 'B')}, more than "
            f"memory-budget {human(budget, 'B')}; give less text, or a larger budget"
        )
