"""moebed's own layout, for models that no published family expresses: every name is the decoder's.

``config.json`` is ``{"model_type": "moebed", "config": {field of ModelConfig: value, ...}}``, and every tensor of the
safetensors has the name and the shape of the decoder's parameter: ``layers.{i}.mlp.experts.gate_up_proj (E, 2F, H)``
(gate first), ``layers.{i}.mlp.experts.down_proj (E, H, F)``, ``layers.{i}.mlp.router.weight (E, H)``, ... A run's
``.ckpt`` has the same names, with ``decoder.`` before each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moebed.checkpoints.families.base import ExpertNames, Family, Reading, Settings, Stored
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


class _Prefixed(Mapping[str, str | Stored]):
    """Every parameter's own name, after a prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __getitem__(self, name: str) -> str:
        return self._prefix + name

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class OwnFamily(Family):
    """A family whose ``config.json`` holds a ModelConfig as it is, so that it expresses every model."""

    def read(self, settings: Settings, where: str = "config.json") -> Reading:
        """The ModelConfig under ``config``, which says everything; raises ConfigError if it is none."""
        return Reading(self._content(settings, where), [], [])

    def _content(self, settings: Settings, where: str) -> ModelConfig:
        content = settings.get("config")
        if not isinstance(content, Mapping):
            raise ConfigError(f"{where}: config is missing; a {self.model_type} config has the model's settings there")
        try:
            return ModelConfig.from_dict(content)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: not a {self.model_type} config ({error})") from error

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The ``config.json`` of any model."""
        return {"model_type": self.model_type, "architectures": [self.architecture], "config": config.to_dict()}


def _own(prefix: str, architecture: str) -> Family:
    experts = prefix + "layers.{i}.mlp.experts"
    return OwnFamily(
        model_type="moebed",
        architecture=architecture,
        tensors=_Prefixed(prefix),
        # No name for one expert's matrix: they are always fused.
        in_transformers=False,
        experts=ExpertNames("", "", "", f"{experts}.gate_up_proj", f"{experts}.down_proj"),
    )


MOEBED = _own("", "Decoder")
RUN = _own("decoder.", "MoEModule")
