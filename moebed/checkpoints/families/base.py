"""What a family is: names of settings and of tensors, and the few things that are not a matter of names.

A config map is read both ways. Reading turns a checkpoint's ``config.json`` into a ModelConfig and refuses what the
decoder does not compute. Writing reads its own result back, so that a model which a family cannot express is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args, get_type_hints

from moebed.checkpoints.families.declared import HARMLESS_SETTINGS, QUANTISED_SETTINGS
from moebed.checkpoints.families.meaning import NOT_IN_CHECKPOINTS, PER_LAYER, one_number, same_setting
from moebed.checkpoints.families.rope import BLOCKS, ROPE_KEYS, read_rope, write_rope
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

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


class Stored(NamedTuple):
    """Where a parameter lies that is no tensor by itself, or one of another shape.

    Args:
        name: The tensor; ``{i}`` is the layer.
        band: Which of the equal bands of rows it is.
        bands: Of how many, one above the other.
        before: Leading sizes of the tensor that the parameter has not.
        unused: The LayerConfig field that says how many rows the tensor has after the parameter's, which nothing is
            made of; they are written as 0.
    """

    name: str
    band: int = 0
    bands: int = 1
    before: tuple[int, ...] = ()
    unused: str | None = None

    @classmethod
    def of(cls, stored: str | Stored) -> Stored:
        """A tensor that is the parameter, where there is only a name."""
        return cls(stored) if isinstance(stored, str) else stored


class Stacked(NamedTuple):
    """A tensor of all experts of a layer, transposed, in which matrices lie in turn (see moebed.checkpoints.stacked).

    Args:
        name: What it is called; ``{i}`` is the layer.
        of: Names of one expert's n matrices (R, C) in it, or of its vectors (R,); ``{e}`` is the expert. The tensor is
            (E, C, n·R), or (E, n·R): number n·r + k of one of its rows is of row r of the k-th.
    """

    name: str
    of: tuple[str, ...]


class Reading(NamedTuple):
    """What a ``config.json`` says.

    Args:
        config: The model, as far as the decoder computes it.
        uncomputed: What it does not compute, in words: an error for whoever runs the model, not for who looks at its
            weights.
        notes: What was passed over, as transformers does.
    """

    config: ModelConfig
    uncomputed: list[str]
    notes: list[str]


def pooled_balancing(config: ModelConfig) -> dict[str, Any]:
    """The coefficient with which transformers' load-balancing loss pulls as hard as ours does.

    Its shares of the assignments add up to K, not to 1, so that the loss is K times ours where all layers are alike.
    """
    return {"router_aux_loss_coef": config.router_aux_loss_coef / one_number(config, "num_experts_per_tok")}


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Args:
        model_type: What ``config.json`` calls it.
        architecture: Name of its class in Hugging Face terms.
        tensors: Our parameter -> their tensor, or which part of one; ``{i}`` is the layer, ``{e}`` the number of its
            routed experts. These are in ``experts``.
        experts: Names of the routed experts' matrices; None for a dense family.
        stacked: Tensors that hold those of all experts of a layer in an order of their own.
        fields: Our config field -> their key, beside the common ones.
        fixed: Our config fields that are the same in every model of the family.
        defaults: Their keys that ``config.json`` may leave out, and what that means.
        accepts: Their keys that change what the model computes -> the values for which it computes what ours does.
        reads: Their keys that ``decode`` and ``uncomputed`` read, beside those that have a default.
        harmless: Their keys that change nothing of what a trained model computes, beside those of every family.
        same: Another name of a key -> the key.
        other_names: Our parameter, those of all experts too, -> what else their tensor may be called; the one that is
            stored is taken.
        partial_rotary: The share of a head that turns where ``config.json`` does not say it as others do, from their
            settings; None of a family whose heads turn as a whole.
        rope_magnitudes: Whether LongRoPE's cos and sin are multiplied by numbers of its own (``rope.MAGNITUDES``).
        further: A pattern of the names of tensors that predict further tokens, with ``{layers}`` for their number; such
            tensors are passed over with a note, as transformers does.
        in_transformers: Whether transformers has a class for it. That class passes over settings that it does not know,
            and so does moebed, with a note; of another family they are an error for whoever runs the model.
        uncomputed: What the decoder does not compute of their settings, in words, beside ``accepts``.
        decode: Further fields of ours from their settings.
        encode: Further settings of theirs from our config.
        balancing: Their settings of the load-balancing loss, in their normalisation; not read back, as it is no part of
            what a model computes.
    """

    model_type: str
    architecture: str
    tensors: Mapping[str, str | Stored]
    experts: ExpertNames | None = None
    stacked: tuple[Stacked, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: Callable[[Settings], float] | None = None
    rope_magnitudes: bool = False
    further: str | None = None
    in_transformers: bool = True
    uncomputed: Callable[[Settings], list[str]] = lambda settings: []
    decode: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    encode: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    balancing: Callable[[ModelConfig], dict[str, Any]] = pooled_balancing

    def read(self, settings: Settings, where: str = "config.json") -> Reading:
        """What a ``config.json`` says.

        Args:
            settings: Its content.
            where: What an error calls it.

        Raises:
            ConfigError: A setting is missing or wrong, or asks for weights that the decoder does not have.
        """
        try:
            return self._read(settings)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{where}: not a {self.model_type} config ({error})") from error

    def read_config(self, settings: Settings, where: str = "config.json") -> ModelConfig:
        """The ModelConfig of a ``config.json``.

        Args:
            settings: Its content.
            where: What an error calls it.

        Raises:
            ConfigError: A setting is missing or wrong, or asks for something that the decoder does not compute.
        """
        reading = self.read(settings, where)
        if reading.uncomputed:
            raise ConfigError(f"{where}: {reading.uncomputed[0]}")
        return reading.config

    def _read(self, settings: Settings) -> Reading:
        settings = self._by_one_name(settings)
        found = {**_DEFAULTS, **self.defaults, **settings}
        for key in QUANTISED_SETTINGS:
            if found.get(key) is not None:
                raise ConfigError(f"{key} says that the weights are quantised; get the checkpoint without quantisation")
        names = {**COMMON_FIELDS, **self.fields}
        accepts = {key: good for key, good in {**_ACCEPTS, **self.accepts}.items() if key not in names.values()}
        uncomputed = []
        for key, accepted in accepts.items():
            if key in found and not any(_is(found[key], one) for one in accepted):
                wanted = " or ".join(repr(value) for value in accepted)
                uncomputed.append(f"{key} is {found[key]!r}; {self.model_type} is supported with {wanted} only")
        uncomputed += self.uncomputed(found)
        missing = [theirs for theirs in names.values() if theirs not in found]
        if missing:
            raise ConfigError(f"{missing[0]} is missing; a {self.model_type} config has it")
        partial = None if self.partial_rotary is None else self.partial_rotary(found)
        given = [block for key, block in self.defaults.items() if key in BLOCKS and settings.get(key) is None]
        stretched = (
            {**settings, "rope_parameters": given[0]} if given and not settings.get("rope_scaling") else settings
        )
        theta = self.defaults.get("rope_theta", 10000.0)
        rope = read_rope(stretched, theta, partial, self.rope_magnitudes)
        values: dict[str, Any] = {ours: found[theirs] for ours, theirs in names.items()}
        values["head_dim"] = found.get("head_dim")
        for ours, value in values.items():
            _require_kind(ours, names.get(ours, ours), value)
        values |= {"rope_theta": rope.theta, "rope_scaling": rope.scaling, "partial_rotary_factor": rope.partial}
        values["hidden_act"] = _READ_ACTIVATIONS.get(str(found["hidden_act"]))
        if values["hidden_act"] is None:
            known = ", ".join(_READ_ACTIVATIONS)
            raise ConfigError(f"hidden_act is {found['hidden_act']!r}; the known ones are {known}")
        config = ModelConfig(**{**values, **self.fixed, **self.decode(found)})
        declared = {*names.values(), *_DEFAULTS, *self.defaults, *accepts, *self.reads, *self.harmless, *ROPE_KEYS}
        declared |= {"head_dim", *HARMLESS_SETTINGS, *QUANTISED_SETTINGS}
        unknown = [key for key, value in settings.items() if key not in declared and value is not None]
        notes = list(rope.notes)
        if unknown and self.in_transformers:
            notes.append(f"{', '.join(unknown)}: no setting of {self.model_type}; passed over, as transformers does")
        elif unknown:
            uncomputed.append(
                f"{', '.join(unknown)}: no setting of {self.model_type} that is known here; take it out of the file if "
                "it changes nothing of what the model computes"
            )
        return Reading(config, rope.uncomputed + uncomputed, notes)

    def _by_one_name(self, settings: Settings) -> dict[str, Any]:
        """Settings in which each that has two names has the family's own."""
        found = dict(settings)
        for other, name in self.same.items():
            if other not in found:
                continue
            value = found.pop(other)
            if found.setdefault(name, value) != value:
                raise ConfigError(
                    f"{other} is {value!r} but {name} is {found[name]!r}, which are one setting; take one of them out"
                )
        return found

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The ``config.json`` of a model.

        Raises:
            ConfigError: The family cannot express the model.
        """
        settings: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        settings |= {theirs: one_number(config, ours) for ours, theirs in {**COMMON_FIELDS, **self.fields}.items()}
        settings |= {"head_dim": config.head_dim, "hidden_act": ACTIVATIONS.get(config.hidden_act, "silu")}
        settings |= {**write_rope(config, self.partial_rotary is not None), **self.encode(config)}
        back = self.read_config(settings, f"{self.model_type} config").to_dict()
        values = config.to_dict()
        for name in dict.fromkeys((*PER_LAYER, *values)):
            value = values[name]
            if name not in NOT_IN_CHECKPOINTS and not same_setting(config, back, name):
                raise ConfigError(
                    f"model config: {name} is {value!r}, which a {self.model_type} checkpoint cannot express "
                    f"(it would be read as {back[name]!r}); choose another family"
                )
        return settings


_DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
# What only a forward pass needs, or what comes with tensors that have no place in the decoder.
_ACCEPTS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "per_layer_config": (None,),  # other sizes for single layers
}
_HINTS = get_type_hints(ModelConfig)


def _is(value: Any, wanted: Any) -> bool:
    """Whether a setting is what is wanted; true is not 1."""
    return isinstance(value, bool) is isinstance(wanted, bool) and bool(value == wanted)


def _require_kind(ours: str, theirs: str, value: Any) -> None:
    """Raise ConfigError if a setting's value is not of the kind of our field; JSON's true is no number here."""
    kinds = set(get_args(_HINTS[ours])) or {_HINTS[ours]}
    kinds = {bool} if ours == "norm_topk_prob" else kinds
    if value is None and type(None) in kinds:
        return
    if bool in kinds:
        good, wanted = isinstance(value, bool), "true or false"
    elif float in kinds:
        good, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        wanted = "a whole number above 0"
    if not good:
        raise ConfigError(f"{theirs} is {json.dumps(value)}; it must be {wanted}")


def require_count(settings: Settings, key: str, least: int = 1) -> int:
    """The whole number that a setting is.

    Raises:
        ConfigError: It is missing, none, or less than ``least``.
    """
    if key not in settings:
        raise ConfigError(f"{key} is missing")
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} is {json.dumps(value)}; it must be a whole number, at least {least}")
    return value
