"""A training run's own ``.ckpt`` file, read as one more kind of checkpoint (its family: ``moebed.families.own``)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moebed.checkpoints.files import MappedEntry, TensorEntry, load_mapped
from moebed.config import ModelConfig
from moebed.errors import UserError


def open_run(path: Path) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    """The model of a ``.ckpt`` file, and its weights; the optimizer's state is not read.

    Raises:
        UserError: The file is damaged or was not written by a run of moebed.
    """
    found = load_mapped(path)
    config, state = found.get("model_config"), found.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint of a moebed run: it has no model_config and state_dict")
    entries = {name: MappedEntry(path, value) for name, value in state.items() if isinstance(value, Tensor)}
    return ModelConfig.from_dict(config), dict(entries)
