"""HyperMoE (2402.12656): beside its experts a token passes an adapter, generated from those that it did not choose.

T tokens, E experts, K experts per token, S sets of chosen experts, H hidden, A adapter, R slots of the sorted order.

Tokens with the same set of experts have the same adapter, so that weights are generated once a set, not once a token;
tokens are sorted by their set, and the products are grouped. Where the adapters of all sets would take more than
SET_BYTES, they are made some sets at a time, and made again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebed.errors import ConfigError
from moebed.model.config import LayerConfig, ModelConfig
from moebed.model.grouped import alignment, compute_dtype, from_slots, grouped_mm, sort_by_expert, to_slots
from moebed.model.routers import ROUTERS
from moebed.model.routing import Routing

SET_BYTES = 64 << 20  # of generated weights at a time


class Adapters(NamedTuple):
    """Weights of S adapters."""

    down: Tensor  # (S, A, H)
    down_bias: Tensor  # (S, A)
    up: Tensor  # (S, H, A)
    up_bias: Tensor  # (S, H)


class AdapterGenerator(nn.Module):
    """What all layers share: z = ReLU(B [p; layer]), and a linear map of z to each part of an adapter.

    Heads begin so small that adapters add nearly nothing; the other maps begin as PyTorch's do, with biases of 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings = config.hyper_experts
        assert settings is not None
        size, hidden = settings.generator_size, config.hidden_size
        self.shapes = settings.adapter_shapes(hidden)
        self.trunk = _linear(size + settings.layer_embedding_size, size)
        # Hyper-fan-in: an adapter's weights have 1e-3 of the usual size, at an input of size 1 (released code).
        fans = {"down": hidden, "up": settings.adapter_size}
        for name, outputs in settings.heads(hidden).items():
            self.add_module(name, _linear(size, outputs, 1e-3 * math.sqrt(3 / (size * fans.get(name, 1)))))

    def forward(self, z: Tensor) -> Adapters:
        """The adapters of z (S, ·)."""

        def part(name: str, shape: tuple[int, ...]) -> Tensor:
            head = self.get_submodule(name)
            assert isinstance(head, nn.Linear)
            return head(z.to(head.weight.dtype)).unflatten(1, shape)

        return Adapters(**{name: part(name, shape) for name, shape in self.shapes.items()})


class HyperAdapters(nn.Module):
    """A layer's side: s = Σ e_i over the experts that were not chosen, p = A₂ ReLU(A₁ s), and the generator makes an
    adapter of [p; layer embedding].

    The choice is discrete, so that no gradient reaches the router. With ``constant`` s is the sum of all e_i.

    Args:
        config: The model.
        layer: The layer.
        generator: Of the decoder, which owns it.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, generator: AdapterGenerator) -> None:
        super().__init__()
        settings = config.hyper_experts
        assert settings is not None
        self.is_constant = settings.adapters == "constant"
        self.num_experts, self.possible_sets = layer.num_experts, num_sets(config, layer)
        self.expert_embedding = _drawn(torch.empty(layer.num_experts, settings.expert_embedding_size), std=1.0)
        self.layer_embedding = _drawn(torch.empty(settings.layer_embedding_size), std=1.0)
        self.inner = _linear(settings.expert_embedding_size, settings.generator_size)
        self.outer = _linear(settings.generator_size, settings.generator_size)
        self.adapter_parameters = settings.adapter_parameters(config.hidden_size)
        self._generator = (generator,)  # a tuple, since it is no part of this layer

    @property
    def generator(self) -> AdapterGenerator:
        """The one that the layers share."""
        return self._generator[0]

    @property
    def compiles(self) -> bool:
        """Whether a forward pass is one graph: the adapters of all possible sets, in float32, are made at once."""
        return self.possible_sets <= sets_at_once(4 * self.adapter_parameters)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """What is added to the layer's output for tokens x (T, H): (T, H)."""
        chosen, set_of_token = self._sets(routing)
        z = self.condition(chosen)  # (S, ·)
        return sorted_by(set_of_token, len(z), x, lambda rows, offsets: self._in_parts(rows, z, offsets))

    def _sets(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Which experts each set has, (S, E) bool, and each token's set, (T,)."""
        index, tokens = routing.topk_index, len(routing.topk_index)
        if self.is_constant:
            return index.new_zeros(1, self.num_experts, dtype=torch.bool), index.new_zeros(tokens)
        chosen = index.new_zeros(tokens, self.num_experts, dtype=torch.bool).scatter(1, index, routing.assigned)
        return distinct_rows(chosen, min(tokens, self.possible_sets))

    def condition(self, chosen: Tensor) -> Tensor:
        """z (S, ·) of sets of chosen experts (S, E) bool, in float32 at least."""
        dtype = torch.promote_types(self.expert_embedding.dtype, torch.float32)

        def through(linear: nn.Linear, rows: Tensor) -> Tensor:
            return F.linear(rows, linear.weight.to(dtype), linear.bias.to(dtype))

        with torch.autocast(chosen.device.type, enabled=False):
            left = (~chosen).to(dtype) @ self.expert_embedding.to(dtype)
            p = through(self.outer, F.relu(through(self.inner, left)))
            layer = self.layer_embedding.to(dtype).expand(len(p), -1)
            return F.relu(through(self.generator.trunk, torch.cat([p, layer], dim=1)))

    def _in_parts(self, rows: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
        """Outputs (R, H) of rows (R, H) in segments, by adapters of which SET_BYTES are in memory at a time."""
        at_once = sets_at_once(self.adapter_parameters * rows.element_size())
        if len(z) <= at_once:
            return self._adapt(rows, z, offsets)
        if torch.compiler.is_compiling():
            raise ConfigError(f"hyper_experts: more than {at_once} sets at a time are not one graph; turn compile off")
        bounds, parts = offsets.tolist(), []
        for first, last in pairwise([*range(0, len(z), at_once), len(z)]):
            start, stop = bounds[first], bounds[last]
            if stop > start:
                some = rows[start:stop], z[first:last], offsets[first : last + 1] - start
                parts.append(checkpoint(self._adapt, *some, use_reentrant=False, preserve_rng_state=False))
        out = torch.cat(parts)
        return F.pad(out, (0, 0, 0, len(rows) - len(out)))

    def _adapt(self, rows: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
        return adapt(rows, self.generator(z), offsets)


class FreeAdapters(nn.Module):
    """A control, for one expert a token: E adapters that are learned by themselves, one for each expert."""

    compiles = True

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        settings = config.hyper_experts
        assert settings is not None
        self.num_experts = layer.num_experts
        self.shapes = settings.adapter_shapes(config.hidden_size)
        # As generated ones they add nothing at first. One after the other, so that biases are vectors to the optimizer.
        fills = {"down": config.initializer_range, "up": 0.0}
        for name, (first, *rest) in self.shapes.items():
            self.register_parameter(
                name, _drawn(torch.empty(layer.num_experts * first, *rest), std=fills.get(name, 0.0))
            )

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """What is added to the layer's output for tokens x (T, H): (T, H)."""
        dtype = compute_dtype(x)
        parts = {name: getattr(self, name).to(dtype).view(-1, *shape) for name, shape in self.shapes.items()}
        adapters = Adapters(**parts)
        return sorted_by(
            routing.topk_index[:, 0], self.num_experts, x, lambda rows, offsets: adapt(rows, adapters, offsets)
        )


Beside = HyperAdapters | FreeAdapters


def build_generator(config: ModelConfig) -> AdapterGenerator | None:
    """What the layers of a model share; None where its adapters, if it has any, are not generated."""
    settings = config.hyper_experts
    return AdapterGenerator(config) if settings is not None and settings.is_generated else None


def build_adapters(config: ModelConfig, layer: LayerConfig, generator: AdapterGenerator | None) -> Beside | None:
    """The adapters of one layer with experts; None where the model has none."""
    if config.hyper_experts is None:
        return None
    return FreeAdapters(config, layer) if generator is None else HyperAdapters(config, layer, generator)


def num_sets(config: ModelConfig, layer: LayerConfig) -> int:
    """Sets of experts that tokens can have in a layer: C(E, K), any set where the router has no fixed K; one if s is
    constant. A forward pass makes adapters of as many, or of as many as it has tokens.
    """
    settings = config.hyper_experts
    assert settings is not None
    if settings.adapters == "constant":
        return 1
    if not ROUTERS[config.router].fixed_top_k:
        return 2**layer.num_experts
    return math.comb(layer.num_experts, layer.num_experts_per_tok)


def sets_at_once(set_bytes: int) -> int:
    """Sets whose generated weights, of so many bytes each, are in memory at a time."""
    return max(1, SET_BYTES // set_bytes)


def padding(num_tokens: int, sets: int, device_type: str, itemsize: int) -> int:
    """Rows that the segments of so many sets are padded to a multiple of: as the experts', unless that doubles them."""
    align = alignment(device_type, itemsize)
    return align if sets * align <= num_tokens else 1


def sorted_by(which: Tensor, sets: int, x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What ``run`` makes of tokens x (T, H) that lie in a segment (R, H) for each set: (T, H) in their own order.

    Args:
        which: (T,) set of each token.
        sets: How many there are (S).
        x: (T, H).
        run: Of rows (R, H) and the bounds (S + 1,) of their segments, outputs (R, H).
    """
    dtype = compute_dtype(x)
    align = padding(len(x), sets, x.device.type, dtype.itemsize)
    ones = torch.ones(len(x), 1, dtype=dtype, device=x.device)
    dispatch = sort_by_expert(which.unsqueeze(1), ones, sets, align)
    out = run(to_slots(x.to(dtype), dispatch), dispatch.offsets)
    if align > 1:  # so that what pads has no gradient
        out = out * dispatch.slot_weight.unsqueeze(1)
    return from_slots(out, dispatch)


def adapt(rows: Tensor, adapters: Adapters, offsets: Tensor) -> Tensor:
    """Outputs (R, H) of rows (R, H), which lie in a segment for each adapter; differentiable in rows and adapters.

    Args:
        rows: (R, H).
        adapters: S of them.
        offsets: (S + 1,) int32 bounds of the segments; rows after the last have outputs that mean nothing.
    """
    place = torch.arange(len(rows), device=rows.device, dtype=offsets.dtype)
    which = torch.searchsorted(offsets[1:], place, right=True).clamp(max=len(offsets) - 2)  # (R,)
    product = partial(grouped_mm, offsets=offsets, ragged=True)
    inner = F.relu(product(rows, adapters.down) + adapters.down_bias.index_select(0, which))  # (R, A)
    return product(inner, adapters.up) + adapters.up_bias.index_select(0, which)


def distinct_rows(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The rows (N, E) bool that differ, at most so many, and which of them each row is, (N,).

    Shapes do not depend on the values: those of ``most`` that are left over hold False.
    """
    order = torch.arange(len(rows), device=rows.device)
    for word in rows.split(62, dim=1):  # the bits of an int64; sorted by each in turn, equal rows come together
        bits = torch.arange(word.shape[1], device=rows.device)
        number = (word.long() << bits).sum(dim=1)
        order = order[torch.sort(number[order], stable=True).indices]
    ordered = rows[order]
    starts = (ordered[1:] != ordered[:-1]).any(dim=1)
    place = F.pad(starts.cumsum(0), (1, 0))  # (N,)
    found = rows.new_zeros(most, rows.shape[1]).index_put((place,), ordered)  # equal rows into one place
    return found, torch.empty_like(order).scatter(0, order, place)


def _linear(inputs: int, outputs: int, bound: float | None = None) -> nn.Linear:
    """A linear map that begins uniform within ±bound, 1/√inputs if not given, with a bias of 0."""
    linear = nn.Linear(inputs, outputs)
    bound = 1 / math.sqrt(inputs) if bound is None else bound
    _set_draw(linear.weight, partial(nn.init.uniform_, a=-bound, b=bound))
    return linear


def _drawn(values: Tensor, std: float) -> nn.Parameter:
    """A parameter that begins normal, or as 0."""
    parameter = nn.Parameter(values)
    _set_draw(parameter, partial(nn.init.normal_, mean=0.0, std=std))
    return parameter


def _set_draw(parameter: Tensor, draw: partial[Tensor]) -> None:
    parameter.draw = draw  # type: ignore[attr-defined]  # which Decoder.initial calls
