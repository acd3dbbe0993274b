"""HyperMoE (2402.12656) in numbers: what a config says of it, and the shapes that follow.

L layers with experts, E experts of one, H hidden, A width of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from moebed.errors import ConfigError, did_you_mean
from moebed.model.checks import Config, require

Adapters = Literal["unchosen", "constant", "free", "shared_equal_flops", "shared_equal_parameters"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class HyperExperts:
    """HyperMoE, or one of its controls: an adapter beside the experts, Ê(x) = W_up ReLU(W_down x + b_down) + b_up.

    The sizes are the published ones.

    Args:
        adapters: Where a token's adapter comes from. unchosen: generated from the embeddings of the experts that the
            token did not choose, summed up (HyperMoE). The controls: constant, generated from the sum of all
            experts' embeddings, whatever was chosen; free, one of E adapters a layer that are learned by themselves,
            that of the one expert chosen; shared_equal_flops and shared_equal_parameters, a shared expert
            of such a width that a token takes as many FLOPs as with an adapter, or that the model has as many
            parameters. The last two are resolved at construction into shared_expert_intermediate_size.
        adapter_size: Width of an adapter (A).
        expert_embedding_size: Width of an expert's embedding.
        layer_embedding_size: Width of a layer's embedding.
        generator_size: Width of the layers that make an adapter of them.
    """

    adapters: Adapters = "unchosen"
    adapter_size: int = 64
    expert_embedding_size: int = 128
    layer_embedding_size: int = 10
    generator_size: int = 128

    def __post_init__(self) -> None:
        if self.adapters not in get_args(Adapters):
            near = did_you_mean(self.adapters, get_args(Adapters))
            raise ConfigError(
                f"model config: hyper_experts.adapters is {self.adapters!r}; choose one of "
                f"{', '.join(get_args(Adapters))}" + (f" ({near})" if near else "")
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "adapters" and not (isinstance(value, int) and value >= 1):
                raise ConfigError(
                    f"model config: hyper_experts.{field.name} is {value!r}; it must be a whole number, at least 1"
                )

    @classmethod
    def of(cls, given: HyperExperts | Mapping[str, Any] | None) -> HyperExperts | None:
        """From plain data; an unknown key is an error that names the nearest known one."""
        if given is None or isinstance(given, HyperExperts):
            return given
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                hint = did_you_mean(key, known, f"its keys are {', '.join(known)}")
                raise ConfigError(f"model config: unknown key {key!r} in hyper_experts; {hint}")
        return cls(**given)

    @property
    def is_generated(self) -> bool:
        """Whether adapters come from a generator that the layers share."""
        return self.adapters in ("unchosen", "constant")

    def adapter_shapes(self, hidden: int) -> dict[str, Shape]:
        """Of one adapter: ``down`` (A, H), ``down_bias`` (A), ``up`` (H, A), ``up_bias`` (H)."""
        width = self.adapter_size
        return {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}

    def adapter_parameters(self, hidden: int) -> int:
        """Numbers of one adapter."""
        return _numbers(self.adapter_shapes(hidden).values())

    def heads(self, hidden: int) -> dict[str, int]:
        """Outputs of the linear maps that make each part of an adapter."""
        return {name: math.prod(shape) for name, shape in self.adapter_shapes(hidden).items()}

    def generator_shapes(self, hidden: int) -> list[Shape]:
        """Of the parameters that all layers share; none where adapters are free."""
        if not self.is_generated:
            return []
        trunk = _linear(self.generator_size + self.layer_embedding_size, self.generator_size)
        heads = (_linear(self.generator_size, outputs) for outputs in self.heads(hidden).values())
        return [*trunk, *(shape for head in heads for shape in head)]

    def layer_shapes(self, hidden: int, num_experts: int) -> list[Shape]:
        """Of the parameters of one layer."""
        if not self.is_generated:
            return [(num_experts * first, *rest) for first, *rest in self.adapter_shapes(hidden).values()]
        embeddings = [(num_experts, self.expert_embedding_size), (self.layer_embedding_size,)]
        first = _linear(self.expert_embedding_size, self.generator_size)
        return [*embeddings, *first, *_linear(self.generator_size, self.generator_size)]

    def parameters(self, hidden: int, num_experts: Iterable[int]) -> int:
        """Of HyperMoE in a model with so many experts in each of its layers that have any."""
        layers = (_numbers(self.layer_shapes(hidden, experts)) for experts in num_experts)
        return _numbers(self.generator_shapes(hidden)) + sum(layers)

    def shared_width(self, hidden: int, num_experts: list[int]) -> int:
        """Width of the shared expert of either control, in a model with so many experts in each layer that has any.

        A gated FFN of width F takes 6·F·H FLOPs a token, an adapter 4·A·H; it has 3·F·H parameters a layer.
        """
        if self.adapters == "shared_equal_flops":
            return round(4 * self.adapter_size / 6)
        whole = HyperExperts(**{**vars(self), "adapters": "unchosen"})
        return round(whole.parameters(hidden, num_experts) / (3 * hidden * len(num_experts)))


def settle_hyper_experts(config: Config, fixed_top_k: bool) -> None:
    """Check a config's; the controls that are a shared expert become one, as wide as they ask for beside what is there.

    Args:
        config: Whose ``hyper_experts`` are plain data, or none.
        fixed_top_k: Whether its router sends every token to as many experts.

    Raises:
        ConfigError: They do not fit the model.
    """
    settings = config.hyper_experts = HyperExperts.of(config.hyper_experts)
    if settings is None:
        return
    layers = [config.layer(index) for index in config.moe_layers]
    require(bool(layers), "hyper_experts stand beside experts, but num_experts is 0; leave them out")
    if settings.adapters == "free":
        require(
            fixed_top_k and all(layer.num_experts_per_tok == 1 for layer in layers),
            "hyper_experts.adapters free has an adapter for each expert, which needs num_experts_per_tok 1, and a "
            f"router with a fixed K; here they are {config.num_experts_per_tok} and {config.router}",
        )
    if not settings.adapters.startswith("shared_"):
        return
    shared = {(layer.num_shared_experts, layer.shared_intermediate_size) for layer in layers}
    require(
        len(shared) == 1,
        f"hyper_experts.adapters {settings.adapters} is a shared expert, but layers have shared experts of "
        "different widths; give them one",
    )
    count, width = shared.pop()
    width += settings.shared_width(config.hidden_size, [layer.num_experts for layer in layers])
    config.num_shared_experts, config.shared_expert_intermediate_size = max(1, count), width
    config.hyper_experts = None


def _linear(inputs: int, outputs: int) -> list[Shape]:
    """Weight and bias of a linear map."""
    return [(outputs, inputs), (outputs,)]


def _numbers(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
