"""A run's config as ``moebed fit`` would read it, checked without starting anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebed.data.datamodule import TextDataModule
from moebed.model.config import ModelConfig
from moebed.plan.plan import takes_any_gpu, world_size
from moebed.training.command_line import TrainingCLI, quiet
from moebed.training.jsonargparse_private import subcommand_parser


class _ResolvedCLI(TrainingCLI):
    """Reads arguments, builds model, data and callbacks to check them, and stops there.

    Nothing is drawn, read or written: the model is on the meta device, and there is no Trainer, since the machine that
    asks may not be the one that trains.
    """

    def _set_seed(self) -> None:
        """Leave random states alone."""

    def before_instantiate_classes(self) -> None:
        """Leave folders alone."""

    def instantiate_classes(self) -> None:
        """Build on the meta device."""
        with torch.device("meta"):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Stop."""


@dataclass(frozen=True)
class Resolved:
    """The run that a command line of ``moebed fit`` is.

    Args:
        content: The whole config, as plain data.
        config: The model's.
        tokens_per_step: Of an optimizer step, over all processes; where the recipe leaves their number open, one.
        devices: GPUs of a node that the run is to see; 0 where it takes none, or names its own.
        data: Its text, of which nothing has been read.
    """

    content: dict[str, Any]
    config: ModelConfig
    tokens_per_step: int
    devices: int
    data: TextDataModule


def resolve(arguments: Sequence[str]) -> Resolved:
    """The run that ``moebed fit`` with these arguments is.

    Raises:
        UserError: What ``moebed fit`` would say before it reads any text.
    """
    quiet()
    cli = _ResolvedCLI(["fit", *arguments])
    recipe = cli.config.fit
    content = json.loads(subcommand_parser(cli, "fit").dump(recipe, skip_none=False, format="json"))
    # What a recipe leaves open is one GPU in a study: each run is given one, whatever else the machine has.
    processes = world_size(recipe, min(1, torch.cuda.device_count()))
    micro_batches = processes * recipe.trainer.accumulate_grad_batches
    tokens = micro_batches * recipe.data.batch_size * recipe.data.sequence_length
    devices = processes // recipe.trainer.num_nodes if takes_any_gpu(recipe, torch.cuda.device_count()) else 0
    return Resolved(content, cli.model.config, tokens, devices, cli.datamodule)


def as_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as the command line takes them: ``--key=value``."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        inner = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
