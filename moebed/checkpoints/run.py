"""A training run's own ``.ckpt`` file, as one more family of checkpoints: its names are the decoder's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from moebed.checkpoints.files import MappedEntry, TensorEntry, load_mapped
from moebed.config import ModelConfig
from moebed.errors import UserError
from moebed.families.base import ExpertNames, Family

_PREFIX = "decoder."


class _Prefixed(Mapping[str, str]):
    """Every parameter's own name, as the LightningModule has it."""

    def __getitem__(self, name: str) -> str:
        return _PREFIX + name

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


_EXPERTS = _PREFIX + "layers.{i}.mlp.experts"
OWN = Family(
    model_type="moebed",
    architecture="MoEModule",
    tensors=_Prefixed(),
    experts=ExpertNames("", "", "", f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj"),
)


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
