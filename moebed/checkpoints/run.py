"""A training run's own ``.ckpt``, file or folder, read as one more kind of checkpoint (see
``moebed.checkpoints.families.own``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moebed.checkpoints.files import MappedEntry, TensorEntry, load_mapped
from moebed.checkpoints.gguf.header import is_gguf
from moebed.checkpoints.sharded import entries, is_sharded, read_rest
from moebed.errors import UserError
from moebed.model.config import ModelConfig


def is_run(path: Path) -> bool:
    """Whether a checkpoint is a run's: a file, or a folder to which ranks wrote their parts."""
    return is_sharded(path) or (path.is_file() and not is_gguf(path))


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a ``.ckpt`` belongs to: where its ``checkpoints/`` lies, or where itself was put.

    No other folder above it is asked, which may be another run's, or hold what is no run at all.
    """
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def read_run(path: Path) -> Mapping[str, Any]:
    """What a run's checkpoint holds; of a folder, all but its tensors."""
    return read_rest(path) if is_sharded(path) else load_mapped(path)


def open_run(path: Path) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    """The model of a ``.ckpt``, and its weights; the optimizer's state is not read.

    Raises:
        UserError: It is damaged or was not written by a run of moebed.
    """
    found = read_run(path)
    config, state = found.get("model_config"), found.get("state_dict", {})
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise UserError(
            f"{path} is no checkpoint of a moebed run: it has no model_config and state_dict; "
            "give one of the run's checkpoints/"
        )
    if is_sharded(path):
        return ModelConfig.from_dict(config), entries(path)
    mapped = {name: MappedEntry(path, value) for name, value in state.items() if isinstance(value, Tensor)}
    return ModelConfig.from_dict(config), dict(mapped)
