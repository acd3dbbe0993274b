"""``moebed size RECIPE.yaml``: what a recipe's model costs, layer by layer, and the width that matches another's.

Nothing is built; the numbers are those of moebed.model.flops.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moebed.arguments import OneLineParser, parse_setting, read_recipe, whole
from moebed.errors import ConfigError
from moebed.machine.progress import waiting
from moebed.machine.units import human
from moebed.model.config import ModelConfig


class Matched(NamedTuple):
    """A model whose experts were made as wide as brings it nearest to another's size."""

    config: ModelConfig
    parameters: float  # relative difference in total parameters that remains; below 0 where it is the smaller one
    flops: float  # relative difference in active FLOPs


def match_width(config: ModelConfig, reference: ModelConfig, sequence_length: int, granularity: int = 8) -> Matched:
    """Give all experts of ``config`` the width at which its total parameters come nearest to those of ``reference``.

    Experts of each layer, and what else it has, stay. Active FLOPs follow, and match only where the number of active
    experts fits; the result says how far they are off.

    Args:
        config: A model whose ``moe_intermediate_size`` is one number.
        reference: What it is to be as large as.
        sequence_length: Tokens of a sequence, for the FLOPs of attention.
        granularity: The width is a multiple of this.

    Raises:
        ConfigError: It has no experts, or layers of several widths, or is larger even with the narrowest experts.
    """
    from moebed.model.flops import count_parameters, flops_per_token

    if not config.moe_layers or not isinstance(config.moe_intermediate_size, int):
        raise ConfigError("match: the model needs experts, and one number as their width, moe_intermediate_size")
    wanted = count_parameters(reference)[0]

    def at(width: int) -> int:
        return count_parameters(dataclasses.replace(config, moe_intermediate_size=width))[0]

    # Parameters are linear in the width.
    slope = at(2 * granularity) - at(granularity)
    steps = 1 + round((wanted - at(granularity)) / slope)
    if steps < 1:
        raise ConfigError(
            f"match: even with experts of width {granularity} the model has {at(granularity):,} parameters, more than "
            f"{wanted:,}; give it fewer experts"
        )
    found = dataclasses.replace(config, moe_intermediate_size=steps * granularity)
    flops = flops_per_token(found, sequence_length) / flops_per_token(reference, sequence_length) - 1
    return Matched(found, count_parameters(found)[0] / wanted - 1, flops)


def size_table(config: ModelConfig, sequence_length: int) -> str:
    """The FFN or experts of every layer, and the whole model's parameters and forward FLOPs a token."""
    from moebed.model.flops import count_parameters, flops_per_token

    lines = [f"{'layer':>5}{'experts':>9}{'chosen':>8}{'shared':>8}{'width':>8}"]
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        if layer.num_experts:
            numbers = layer.num_experts, layer.num_experts_per_tok, layer.num_shared_experts
            lines.append(f"{index:>5}{numbers[0]:>9}{numbers[1]:>8}{numbers[2]:>8}{layer.moe_intermediate_size:>8}")
        else:
            lines.append(f"{index:>5}{'dense':>9}{'':>16}{config.intermediate_size:>8}")
    total, active = count_parameters(config)
    flops = flops_per_token(config, sequence_length)
    lines.append(
        f"{total:,} parameters, {active:,} active a token; {human(flops, 'FLOP', 4)} a token forward, in sequences of "
        f"{sequence_length}"
    )
    return "\n".join(lines)


class Settings(NamedTuple):
    """What a recipe says of its model, as plain data."""

    model: dict[str, Any]
    sequence_length: int

    def config(self) -> ModelConfig:
        """The model's config; raises ConfigError where it is wrong. Loads PyTorch."""
        return ModelConfig.from_dict(self.model)


def read_settings(recipe: Path, overrides: Sequence[str] = ()) -> Settings:
    """The model of a recipe under overrides such as ``num_experts=16``, and the recipe's sequence length.

    Raises:
        ConfigError: The file cannot be read, has no model, or what changes it is not well formed.
    """
    content = read_recipe(recipe)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
        raise ConfigError(f"recipe {recipe} has no model.config; give a recipe of `moebed fit`")
    changes = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"{text!r} changes nothing; write KEY=VALUE, such as num_experts=16")
        changes[key.removeprefix("model.config.")] = parse_setting(text, value)
    length = (content.get("data") or {}).get("sequence_length", 256)
    found = Settings(overridden(model["config"], changes), length)
    ModelConfig.look_first(found.model)
    return found


def overridden(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data with some of its keys, dotted, set to other values."""
    result = dict(content)
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        result[first] = overridden(result.get(first) or {}, {rest: value}) if dot else value
    return result


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed size",
        description="What a recipe's model has in each layer, and what it costs; nothing is built or trained.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="a recipe of `moebed fit`")
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE", help="changes of its model.config, such as allocation=ascending"
    )
    parser.add_argument(
        "--match", type=Path, metavar="OTHER.yaml", help="find the width of experts that gives as many parameters"
    )
    parser.add_argument(
        "--granularity", type=whole(1), default=8, metavar="N", help="which is a multiple of N; default 8"
    )
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Print a model's size, and the width that matches another's."""
    options = build_parser().parse_args(arguments)
    settings = read_settings(options.recipe, options.changes)
    other = None if options.match is None else read_settings(options.match)
    with waiting("loading PyTorch"):
        config, length = settings.config(), settings.sequence_length
    if other is None:
        print(size_table(config, length))
        return
    found = match_width(config, other.config(), length, options.granularity)
    print(size_table(found.config, length))
    print(
        f"moe_intermediate_size {found.config.moe_intermediate_size} matches {options.match}: total parameters "
        f"{found.parameters:+.3%}, active FLOPs {found.flops:+.3%}"
    )
