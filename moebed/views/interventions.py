"""Interventions: what a router decided is changed at some layers, and the text goes on from there.

Three removals of an expert are not the same, so that each is named. ``zero``: its output is 0, the others keep their
weights, fewer run. ``refill``: its logit is -inf, so that the next best moves up and all weights follow the router's
own rule; where they are probabilities that are not divided by their sum, the others' rise to p / (1 - p_e).
``drop_norm``: as ``zero``, and the weights that are left are scaled to the sum that all had. Shared experts are never
touched.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.model.config import LayerConfig, ModelConfig
from moebed.model.routers import Router, Routing
from moebed.views.intervention_words import DROP_NORM, REFILL, ZERO

_DRAW = 20240618  # of the tokens that are looked at
_STEER = 0.01  # how far a forced expert's logit is above the largest one (SteerMoE)


@dataclass(frozen=True)
class LayerContext:
    """What a change may ask of the layer that it is made at."""

    index: int
    router: Router


# The base routing of the text's T tokens and their normalised input x (T, H) -> another routing of them.
Change = Callable[[Routing, Tensor, LayerContext], Routing]
Objection = Callable[[LayerConfig], str]


def _none(layer: LayerConfig) -> str:
    return ""


def _no_other(layer: LayerConfig) -> str:
    """Why no expert can take another's place, if none can."""
    return "" if layer.num_experts > layer.num_experts_per_tok else "every token has all experts"


@dataclass(frozen=True)
class Intervention:
    """One change of what routers decide.

    Args:
        name: What stored results and figures call it; :func:`moebed.views.intervention_names.parse` reads most names.
        layers: Where it is made; all layers with experts if not given.
        change: What it makes of a routing, of which it changes nothing in place.
        experts: Those that it names, for :meth:`check`.
        objection: Why it means nothing at a layer, in words; empty where it does.
        everywhere: Every token is computed anew, whether or not its routing changed: what the machinery itself does.
        is_alone: Each token is changed by itself, a row effect: it attends to the text as it is, and no token after it
            sees the change. Else the whole text is changed, a stream effect.
        most: Where each is changed by itself, at how many tokens at most: those of :func:`drawn_tokens`.
    """

    name: str
    layers: frozenset[int] | None
    change: Change
    experts: tuple[int, ...] = ()
    objection: Objection = _none
    everywhere: bool = False
    is_alone: bool = False
    most: int | None = None

    def layers_of(self, config: ModelConfig) -> list[int]:
        """The layers of a model that it is made at, in order."""
        return sorted(config.moe_layers if self.layers is None else self.layers)

    def apply(self, routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        """What it makes of the routing of tokens x (T, H); what was computed for the old choice goes."""
        return self.change(routing, x, layer).without_precomputed()

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where a model has not what it names."""
        if not config.moe_layers:
            raise ConfigError(
                f"intervention {self.name!r}: the model has no layer with experts; only an MoE can be asked"
            )
        for index in self.layers_of(config):
            if index not in config.moe_layers:
                has = f"it has {', '.join(map(str, config.moe_layers))}"
                raise ConfigError(f"intervention {self.name!r}: layer {index} is none with experts; {has}")
            layer = config.layer(index)
            if any(expert >= layer.num_experts for expert in self.experts):
                raise ConfigError(
                    f"intervention {self.name!r}: layer {index} has experts 0 to {layer.num_experts - 1}, "
                    f"not {max(self.experts)}"
                )
            if said := self.objection(layer):
                raise ConfigError(f"intervention {self.name!r}: at layer {index} {said}")


Layers = Iterable[int] | None


def alone(intervention: Intervention, most: int | None = None) -> Intervention:
    """The same at each token by itself: the loss of the token that follows, had only this one's routing changed.

    Args:
        intervention: What is changed.
        most: At how many tokens at most, all of them if not given; the others are as they were.
    """
    where = "" if most is None else f" at {most} tokens"
    return replace(intervention, name=f"{intervention.name} alone{where}", is_alone=True, most=most)


def drawn_tokens(count: int, most: int | None) -> Tensor:
    """Which of so many tokens (T,) bool are looked at, of any text of that length the same; all if ``most`` is None."""
    if most is None:
        return torch.ones(count, dtype=torch.bool)
    place = torch.randperm(count, generator=torch.Generator().manual_seed(_DRAW))
    return place < most


def identity(layers: Layers = None) -> Intervention:
    """Nothing changes, and all is computed as if it did: what differs then is the noise of the machinery."""
    return _made("identity", layers, lambda routing, x, layer: routing, everywhere=True)


def mask_set(experts: Iterable[int], how: str = REFILL, layers: Layers = None) -> Intervention:
    """Some experts are removed, from every token."""
    gone = tuple(sorted(set(experts)))
    return _made(
        f"mask {_listed(gone)} {how}",
        layers,
        lambda routing, x, layer: remove(routing, layer.router, _columns(routing, gone), how),
        experts=gone,
        objection=lambda layer: "no expert would be left" if how == REFILL and len(gone) >= layer.num_experts else "",
    )


def mask(expert: int, how: str = REFILL, layers: Layers = None) -> Intervention:
    """One expert is removed, from every token."""
    return mask_set([expert], how, layers)


def keep(experts: Iterable[int] | Mapping[int, Iterable[int]], layers: Layers = None, name: str = "") -> Intervention:
    """All experts but some are removed, with ``refill``; of fewer than K, all run.

    Args:
        experts: Those that stay; by layer, where they differ.
        layers: Where; those of the mapping if not given.
        name: What it is called; by its experts if not given.
    """
    by_layer: dict[int, tuple[int, ...]] = {}
    named: tuple[int, ...] = ()
    if isinstance(experts, Mapping):
        by_layer = {index: tuple(sorted(set(some))) for index, some in experts.items()}
        layers = sorted(by_layer) if layers is None else layers
    else:
        named = tuple(sorted(set(experts)))

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        kept = _columns(routing, by_layer.get(layer.index, named))
        return remove(routing, layer.router, ~kept, REFILL)

    return _made(name or f"keep {_listed(named)}", layers, change, experts=named)


def keep_top(count: int, how: str = ZERO, layers: Layers = None) -> Intervention:
    """A token's first experts stay alone: those of the largest weights."""

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        return remove(routing, layer.router, _chosen(routing, routing.topk_index[:, count:]), how)

    return _made(f"keep_top {count} {how}", layers, change, objection=_has_place(count))


def drop_top(place: int, how: str = ZERO, layers: Layers = None) -> Intervention:
    """A token's expert of the largest weight is removed (place 1), or of the second largest (place 2), ..."""

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        return remove(routing, layer.router, _chosen(routing, routing.topk_index[:, place - 1 : place]), how)

    objection = _no_other if how == REFILL else _has_place(place)
    return _made(f"drop_top {place} {how}", layers, change, objection=objection)


def _has_place(place: int) -> Objection:
    def objection(layer: LayerConfig) -> str:
        most = layer.num_experts_per_tok
        return "" if place <= most else f"a token has {most} experts"

    return objection


def force(experts: Iterable[int], layers: Layers = None) -> Intervention:
    """Some experts are chosen by every token, with the largest weights.

    SteerMoE's rule: their logits become the largest plus .01, then the router's own. That it takes the logits'
    log-softmax first moves all of a token's alike, which a softmax does not see.
    """
    wanted = tuple(sorted(set(experts)))

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        logits = routing.router_logits
        most = logits.amax(dim=-1, keepdim=True) + _STEER
        return layer.router.choose(torch.where(_columns(routing, wanted), most, logits))

    return _made(f"force {_listed(wanted)}", layers, change, experts=wanted)


def shift(experts: Iterable[int], by: float, layers: Layers = None) -> Intervention:
    """The logits of some experts are raised by a number, or lowered, at all tokens."""
    moved = tuple(sorted(set(experts)))

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        return layer.router.choose(routing.router_logits + by * _columns(routing, moved))

    return _made(f"shift {_listed(moved)} by {by:g}", layers, change, experts=moved)


def swap(layers: Layers = None) -> Intervention:
    """A token's last expert gives its place, and its weight, to the first that was not chosen: the smallest change."""

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        chosen = chosen_experts(routing)
        last = (routing.assigned.sum(dim=1, keepdim=True) - 1).clamp_min(0)  # (T, 1) its place
        taken = routing.topk_index.gather(1, last)
        if routing.ragged:  # a rule that takes as many as it likes has no next one: that of the largest logit
            following = routing.router_logits.masked_fill(chosen, -torch.inf).argmax(dim=1, keepdim=True)
        else:
            without = layer.router.choose(routing.router_logits.scatter(1, taken, -torch.inf))
            following = (chosen_experts(without) & ~chosen).float().argmax(dim=1, keepdim=True)
        return routing._replace(topk_index=routing.topk_index.scatter(1, last, following))

    return _made("swap", layers, change, objection=_no_other)


def random_set(seed: int = 0, temperature: float = torch.inf, layers: Layers = None) -> Intervention:
    """As many experts as a token had, drawn at random: equal compute.

    Weights follow the router's rule on the drawn experts' logits, and are scaled to the sum that the token's had, so
    that a route is no longer or shorter for being another. Of a rule without a fixed K they are the token's own.

    Args:
        seed: Of the draw; another one in each layer.
        temperature: Drawn from softmax(logits / temperature) without replacement; uniformly if not given.
        layers: Where.
    """

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.index)
        uniform = torch.rand(routing.router_logits.shape, generator=generator).clamp(1e-12, 1 - 1e-7)
        drawn = routing.router_logits / temperature - (-uniform.log()).log().to(routing.router_logits.device)
        order = drawn.argsort(dim=1, descending=True)[:, : routing.topk_index.shape[1]]  # (T, K)
        if routing.ragged:
            return routing._replace(topk_index=order)
        out = torch.ones_like(routing.router_logits, dtype=torch.bool).scatter(1, order, False)
        other = remove(routing, layer.router, out, REFILL)
        return other._replace(topk_weight=_scaled(other.topk_weight, routing.topk_weight))

    warm = "" if temperature == torch.inf else f" temperature {temperature:g}"
    return _made(f"random_set {seed}{warm}", layers, change)


def replay(routings: Mapping[int, tuple[Tensor, Tensor]], layers: Layers = None, name: str = "replay") -> Intervention:
    """Choices and weights that were made elsewhere, of another text of equal length or by another checkpoint.

    Args:
        routings: By layer, experts (T, K) and weights (T, K); a weight of 0 is no choice.
        layers: Where; at all of those if not given.
        name: What it is called.
    """

    def change(routing: Routing, x: Tensor, layer: LayerContext) -> Routing:
        if layer.index not in routings:
            raise ConfigError(f"intervention {name!r}: nothing is known of layer {layer.index} to replay")
        index, weight = (part.to(x.device) for part in routings[layer.index])
        if len(index) != len(x):
            raise ConfigError(
                f"intervention {name!r}: {len(index)} tokens are to be replayed on a text of {len(x)}; give one as long"
            )
        return in_descending_weight(routing, index.long(), weight.float())

    return _made(name, sorted(routings) if layers is None else layers, change)


# What they are made of ----------------------------------------------------------------------------------------------


def remove(routing: Routing, router: Router, removed: Tensor, how: str) -> Routing:
    """The routing without the experts that are ``removed`` (T, E) bool, in one of the ``REMOVALS``."""
    if how == REFILL:
        other = router.choose(routing.router_logits.masked_fill(removed, -torch.inf))
        weight = other.topk_weight.masked_fill(removed.gather(1, other.topk_index), 0.0)  # fewer than K are left
        return in_descending_weight(other, other.topk_index, weight)
    weight = routing.topk_weight.masked_fill(removed.gather(1, routing.topk_index), 0.0)
    if how == DROP_NORM:
        weight = _scaled(weight, routing.topk_weight)
    return in_descending_weight(routing, routing.topk_index, weight)


def in_descending_weight(routing: Routing, index: Tensor, weight: Tensor) -> Routing:
    """A routing with other experts (T, K) and weights (T, K), of which those of 0 are no assignments."""
    weight, order = weight.sort(dim=-1, descending=True, stable=True)
    return routing._replace(topk_index=index.gather(1, order), topk_weight=weight, ragged=True)


def chosen_experts(routing: Routing) -> Tensor:
    """Which experts each token goes to: (T, E) bool."""
    return assigned_weights(routing) != 0


def assigned_weights(routing: Routing) -> Tensor:
    """The weight of each expert for each token, 0 where it does not go there: (T, E)."""
    weight = torch.where(routing.assigned, routing.topk_weight, 0.0)
    return torch.zeros_like(routing.router_logits).scatter(1, routing.topk_index, weight)


def _columns(routing: Routing, experts: Iterable[int]) -> Tensor:
    """These experts, of every token: (T, E) bool."""
    which = torch.tensor(list(experts), dtype=torch.int64, device=routing.router_logits.device)
    return torch.zeros_like(routing.router_logits, dtype=torch.bool).index_fill(1, which, True)


def _chosen(routing: Routing, index: Tensor) -> Tensor:
    """The experts index (T, n) of each token: (T, E) bool."""
    return torch.zeros_like(routing.router_logits, dtype=torch.bool).scatter(1, index, True)


def _scaled(weight: Tensor, like: Tensor) -> Tensor:
    """Weights (T, K) with the sums of others (T, K); where nothing is left, nothing."""
    total = weight.sum(dim=-1, keepdim=True)
    return weight * (like.sum(dim=-1, keepdim=True) / total.clamp_min(torch.finfo(total.dtype).tiny))


def _listed(experts: Iterable[int]) -> str:
    return ",".join(map(str, experts))


def _made(
    what: str,
    layers: Layers,
    change: Change,
    experts: tuple[int, ...] = (),
    objection: Objection = _none,
    everywhere: bool = False,
) -> Intervention:
    """An intervention that is called by what it does, and where."""
    if layers is None:
        return Intervention(what, None, change, experts, objection, everywhere)
    where = sorted(set(layers))
    name = f"{what} @ {'layer' if len(where) == 1 else 'layers'} {_listed(where)}"
    return Intervention(name, frozenset(where), change, experts, objection, everywhere)
