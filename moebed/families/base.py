"""What a family is: names of settings and of tensors, and the few things that are not a matter of names.

A config map is read both ways. Reading turns a checkpoint's ``config.json`` into a ModelConfig and refuses what the
decoder does not compute. Writing reads its own result back, so that a model which a family cannot express is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moebed.config import ROPE_SCALING, ModelConfig
from moebed.errors import ConfigError

Settings = Mapping[str, Any]  # a Hugging Face config.json

# Ours -> theirs, the same in every family.
COMMON_FIELDS = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_READ_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}

# How a model is trained or computed, not what it is: a checkpoint does not keep these.
NOT_IN_CHECKPOINTS = frozenset(
    {
        "router_aux_loss_coef",
        "router_aux_loss_scope",
        "router_z_loss_coef",
        "output_diversity_loss_coef",
        "weight_diversity_loss_coef",
        "initializer_range",
        "experts_backend",
        "attention_backend",
    }
)


@dataclass(frozen=True)
class ExpertNames:
    """Names of the routed experts' matrices; ``{i}`` is the layer and ``{e}`` the expert.

    Args:
        gate: (F, H), the matrix under the activation, one tensor an expert.
        up: (F, H).
        down: (H, F).
        gate_up_fused: (E, 2F, H), gate first; how recent transformers may write both for all experts.
        down_fused: (E, H, F).
    """

    gate: str
    up: str
    down: str
    gate_up_fused: str | None = None
    down_fused: str | None = None


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Args:
        model_type: What ``config.json`` calls it.
        architecture: Name of its class in Hugging Face terms.
        tensors: Our parameter -> their tensor; ``{i}`` is the layer. Routed experts are in ``experts``.
        experts: Names of the routed experts' matrices; None for a dense family.
        fields: Our config field -> their key, beside the common ones.
        fixed: Our config fields that are the same in every model of the family.
        defaults: Their keys that ``config.json`` may leave out, and what that means.
        accepts: Their keys that change what the model computes -> the values for which it computes what ours does.
        decode: Further fields of ours from their settings.
        encode: Further settings of theirs from our config.
    """

    model_type: str
    architecture: str
    tensors: Mapping[str, str]
    experts: ExpertNames | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    decode: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    encode: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}

    def read_config(self, settings: Settings, where: str = "config.json") -> ModelConfig:
        """The ModelConfig of a ``config.json``.

        Args:
            settings: Its content.
            where: What an error calls it.

        Raises:
            ConfigError: A setting is missing, or asks for something that the decoder does not compute.
        """
        found = {**_DEFAULTS, **self.defaults, **settings}
        for key, accepted in {**_ACCEPTS, **self.accepts}.items():
            if key in found and found[key] not in accepted:
                wanted = " or ".join(repr(value) for value in accepted)
                raise ConfigError(
                    f"{where}: {key} is {found[key]!r}; {self.model_type} is supported with {wanted} only"
                )
        names = {**COMMON_FIELDS, **self.fields}
        missing = [theirs for theirs in names.values() if theirs not in found]
        if missing:
            raise ConfigError(f"{where}: {missing[0]} is missing; a {self.model_type} config has it")
        values = {ours: found[theirs] for ours, theirs in names.items()}
        values |= _rope(found, where) | {"head_dim": found.get("head_dim")}
        values["hidden_act"] = _READ_ACTIVATIONS.get(found["hidden_act"])
        if values["hidden_act"] is None:
            known = ", ".join(_READ_ACTIVATIONS)
            raise ConfigError(f"{where}: hidden_act is {found['hidden_act']!r}; the known ones are {known}")
        try:
            return ModelConfig(**{**values, **self.fixed, **self.decode(found)})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{where}: not a {self.model_type} config ({error})") from error

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The ``config.json`` of a model.

        Raises:
            ConfigError: The family cannot express the model.
        """
        settings: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        settings |= {theirs: one_number(config, ours) for ours, theirs in {**COMMON_FIELDS, **self.fields}.items()}
        settings |= {"head_dim": config.head_dim, "hidden_act": ACTIVATIONS[config.hidden_act]}
        # Older and newer transformers look for the base in different places.
        settings["rope_theta"] = config.rope_theta
        kind = "default" if config.rope_scaling is None else "llama3"
        settings["rope_parameters"] = {
            "rope_type": kind,
            "rope_theta": config.rope_theta,
            **(config.rope_scaling or {}),
        }
        settings |= self.encode(config)
        back = self.read_config(settings, f"{self.model_type} config").to_dict()
        values = config.to_dict()
        for name in dict.fromkeys((*_PER_LAYER, *values)):
            value = values[name]
            if name not in NOT_IN_CHECKPOINTS and not same_setting(config, back, name):
                raise ConfigError(
                    f"model config: {name} is {value!r}, which a {self.model_type} checkpoint cannot express "
                    f"(it would be read as {back[name]!r}); choose another family"
                )
        return settings


_DEFAULTS = {"hidden_act": "silu", "num_key_value_heads": None, "tie_word_embeddings": False, "rope_theta": 10000.0}
_ACCEPTS: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
}


def _rope(settings: Settings, where: str) -> dict[str, Any]:
    """The rotary base and Llama 3's scaling, from their old place or from their new one."""
    key = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    given: Mapping[str, Any] = settings.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    plain = given.get("partial_rotary_factor", 1.0) == 1.0
    if kind == "default" and plain:
        scaling = None
    elif kind == "llama3" and plain and all(name in given for name in ROPE_SCALING):
        scaling = {name: float(given[name]) for name in ROPE_SCALING}
    else:
        raise ConfigError(
            f"{where}: {key} is {given!r}; supported are rope_type 'default', and 'llama3' with "
            f"{', '.join(ROPE_SCALING)}"
        )
    return {"rope_theta": float(given.get("rope_theta", settings["rope_theta"])), "rope_scaling": scaling}


def same_setting(config: ModelConfig, other: Mapping[str, Any], name: str) -> bool:
    """Whether a field means in config what it means in the plain data of another one."""
    return _plain(config, name, getattr(config, name)) == _plain(config, name, other[name])


def _as_dict(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


_PER_LAYER = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts")


def _plain(config: ModelConfig, name: str, value: Any) -> Any:
    """A field's value in a model such as config: the same where it means the same, None where it means nothing."""
    layers, moe = config.num_hidden_layers, config.moe_layers
    if name == "attention_multiplier":
        return value or (config.head_dim or 1) ** -0.5
    if name == "intermediate_size" and len(moe) == layers:
        return None
    if name in ("norm_topk_prob", "router") and not moe:
        return None
    if name == "router_options":  # the plain rule has none
        return None if config.router == "softmax_topk" or not moe else _as_dict(value)
    if name == "shared_expert_gate" and not any(config.layer(i).num_shared_experts for i in moe):
        return None
    if name not in _PER_LAYER:
        return value
    values = value if isinstance(value, list) else [value] * layers
    return values if name == "num_experts" else [values[i] for i in moe]


def one_number(config: ModelConfig, name: str) -> Any:
    """The value of a per-layer field in the layers that have experts; the first one, if they differ."""
    value = getattr(config, name)
    if name in _PER_LAYER and isinstance(value, list):
        return value[config.moe_layers[0]] if config.moe_layers else 0
    return value
