"""Whether a checkpoint is of the model that a run trains: one that it starts from, or one that it goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.meaning import NOT_IN_CHECKPOINTS, beside_experts, same_setting
from moebed.errors import ConfigError
from moebed.machine.progress import say
from moebed.model.config import ModelConfig


def require_start(config: ModelConfig, checkpoint: Checkpoint, name: str) -> None:
    """Raise ConfigError if the weights of a checkpoint of this name, ``model.init_from``, are of another model.

    It may lack what is silent at first.
    """
    ours, theirs = config.to_dict(), checkpoint.config.to_dict()
    may_differ = NOT_IN_CHECKPOINTS | beside_experts(config, checkpoint.config).keys()
    other = [key for key in ours if key not in may_differ and not same_setting(config, theirs, key)]
    if other:
        raise ConfigError(
            f"model.init_from: {name} has {other[0]} {theirs[other[0]]!r} but model.config has "
            f"{ours[other[0]]!r}; `moebed upcycle` writes a start.yaml with the config that fits"
        )


def require_same_run(config: ModelConfig, saved: Mapping[str, Any]) -> None:
    """Raise ConfigError if the model_config of a run's checkpoint is of another model; say what changes only how this
    one is computed.
    """
    ours = config.to_dict()
    theirs = ModelConfig.from_dict(saved).to_dict()  # an older one lacks the settings that are new
    changed = [key for key, value in ours.items() if theirs.get(key) != value]
    other = [key for key in changed if key not in NOT_IN_CHECKPOINTS]
    if other:
        raise ConfigError(
            f"the checkpoint's model differs from the config in {', '.join(other)}; "
            "use the run's own config.yaml or another run folder"
        )
    for key in changed:
        say(f"{key} was {theirs[key]!r} in the checkpoint and is {ours[key]!r} now")
