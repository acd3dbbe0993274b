"""Which family of transformers expresses a model, if any does."""

from __future__ import annotations

from typing import NamedTuple

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.own import MOEBED
from moebed.checkpoints.families.registry import FAMILIES
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

# Plainest first; only those that transformers has a class for.
IN_TRANSFORMERS = {
    False: ("llama", "mistral", "qwen2"),
    True: (
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "granitemoe",
        "granitemoeshared",
        "dots1",
        "glm4_moe",
        "minimax_m2",
        "ernie4_5_moe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "flex_olmo",
        "phimoe",
    ),
}


class Choice(NamedTuple):
    """A family for a model.

    Args:
        family: The first that expresses it; moebed's own layout if none does.
        note: What stood in the way of each, in one line, where it is moebed's own.
    """

    family: Family
    note: str


def choose_family(config: ModelConfig) -> Choice:
    """The plainest family that transformers loads and that expresses a model exactly; else moebed's own layout."""
    refusals = []
    for name in IN_TRANSFORMERS[bool(config.moe_layers)]:
        try:
            FAMILIES[name].write_config(config)
        except ConfigError as error:
            said = str(error).removeprefix("model config: ")
            refusals.append(f"{name}: {said.split(', which')[0].split(', but')[0]}")
        else:
            return Choice(FAMILIES[name], "")
    return Choice(
        MOEBED,
        f"no family of transformers expresses this model ({'; '.join(refusals)}); it is written in moebed's own "
        "layout, which moebed reads and transformers does not",
    )
