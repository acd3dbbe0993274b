"""The layers of a transformers model in memory, whatever its class: what its experts were given by a text.

The model runs as a whole, by its own code. Its experts alone are computed by a function that transformers knows by
name, which notes down what they are given; routers are listened to. Probes look at that afterwards, layer by layer.

B sequences, S positions, T valid tokens, E experts, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.errors import ConfigError, UserError
from moebed.machine import provenance
from moebed.model.decoder import evaluating
from moebed.model.in_transformers import is_experts
from moebed.model.routers import Routing
from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from moebed.views.text_pass import require_finite
from moebed.views.transformers_experts import TransformersExperts, offered_by, remarks_on, why_not_seen

NAME = "moebed_probe"
_TOKENS = 1 << 14  # of sequences that go through the model at a time, with their padding
_ALIKE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # by which weights over scores may differ within a token
_ALONE = re.compile(r"(Experts|MoE|Moe)$")
_SHARED, _SHARED_GATE = ("shared_expert", "shared_experts", "shared_mlp"), "shared_expert_gate"
_SOFTMAX = "the router's scores are softmax of its logits"
_SIGMOID = "the router's scores are sigmoid of its logits; probabilities that are shown are their shares"
_OTHER = "the router's weights are neither softmax nor sigmoid of its logits; probabilities that are shown are softmax"
# Who listens to which experts, while text goes through their model.
_listeners: WeakKeyDictionary[nn.Module, Callable[..., None]] = WeakKeyDictionary()


def register() -> str:
    """Make the listening implementation known to transformers; its name. A second time changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs (T, H), as transformers calls for it; whoever listens is told."""
    if module in _listeners:
        _listeners[module](hidden_states, top_k_index, top_k_weights)
    return TransformersExperts(module).chosen(hidden_states, top_k_index, top_k_weights)


@dataclass(frozen=True)
class _Place:
    """A layer with experts, and what lies beside them."""

    index: int
    experts: Any
    router: nn.Module | None = None
    column: int = 0  # of what the router gives out, where its logits are
    shared: nn.Module | None = None
    shared_gate: nn.Module | None = None


@dataclass
class _Seen:
    """What happened at a layer: rows of all calls so far."""

    parts: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, **parts: Tensor) -> None:
        for name, rows in parts.items():
            self.parts[name].append(rows.detach().reshape(-1, rows.shape[-1]))

    def take(self, name: str) -> Tensor | None:
        return torch.cat(self.parts.pop(name)) if self.parts.get(name) else None

    def keep_valid(self, before: dict[str, int], valid: Tensor, what: str) -> None:
        """Of the parts that came since, put together, only rows that are no padding (T) bool."""
        for name, rows in self.parts.items():
            new = torch.cat(rows[before.get(name, 0) :])
            if len(new) != len(valid):
                raise UserError(f"{what}: {len(new)} rows came for {len(valid)} positions of text; it cannot be probed")
            self.parts[name][before.get(name, 0) :] = [new[valid]]


class TransformersModel:
    """A model of transformers in memory, as probes ask for it: ``views(text, needs)``.

    Args:
        model: A PreTrainedModel whose experts go through transformers' experts interface.
        name: What it is called.

    Raises:
        ConfigError: It has no experts, or some that cannot be looked at.
    """

    def __init__(self, model: Any, name: str = "") -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.name = name or type(model).__name__
        self._places = _places(model, self.config.num_hidden_layers)
        self.notes = list(dict.fromkeys(remark for place in self._places for remark in remarks_on(place.experts)))

    @property
    def offers(self) -> frozenset[Need]:
        """What probes can be shown of it."""
        needs = frozenset.intersection(*(offered_by(place.experts) for place in self._places))
        needs |= {Need.CHOICES, Need.NEIGHBOURS}
        if all(place.router is not None for place in self._places):
            needs |= {Need.ROUTING}
        if self.model.get_output_embeddings() is not None:
            needs |= {Need.PREDICTIONS, Need.LOGITS}
        return needs

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of a sequence at most; where the model does not say, of any."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    def record(self) -> dict[str, Any]:
        """What decides its views, as plain data: its settings, and the code."""
        import transformers

        return {
            "moebed": provenance.moebed_version(),
            "code": provenance.code(),
            "transformers": transformers.__version__,
            "model": {"name": self.name, "settings": provenance.fingerprint(repr(self.model.config.to_dict()))},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "through": "transformers",
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from another in a summary."""
        sizes = {key: getattr(self.config, key, None) for key in ("num_hidden_layers", "hidden_size")}
        experts = {"num_experts": max(TransformersExperts(place.experts).num_experts for place in self._places)}
        return {"name": self.name, "model_type": self.config.model_type, **sizes, **experts}

    @torch.no_grad()
    def views(self, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
        """A view a layer, layers without experts included; then, where predictions are asked for, a HeadView.

        Without text a few tokens go through: what they do tells how the router's rows are used.
        Its parameters, its training flag and the implementation of its experts are as before once text is through.
        Outputs are those of the routed experts, and of a shared one that lies beside them in one block.

        Raises:
            UserError: The text does not fit the model, or the model does not hand each position to its experts.
        """
        runs = text is not None and bool(needs - {Need.WEIGHTS})
        asked = text if text is not None and runs else _few_tokens(self.vocab_size)
        seen, head = self._run(asked, needs if runs else frozenset())
        stopped: UserError | None = None
        by_index = {place.index: place for place in self._places}
        for index in range(self.config.num_hidden_layers):
            view = self._view(index, by_index.get(index))
            if index in seen and stopped is None:
                try:
                    after = self._with_text(view, by_index[index], seen.pop(index), asked)
                    view = after if runs else replace(view, gate=after.gate, shift_invariant=after.shift_invariant)
                except UserError as error:
                    stopped = error
                    view = replace(view, error=error if runs else None)
            yield replace(view, text_error=stopped) if stopped is not None and runs else view
        if head is not None and stopped is None:
            yield head

    def _view(self, index: int, place: _Place | None) -> LayerView:
        """What the weights of a layer say."""
        layers = self.config.num_hidden_layers
        if place is None:
            return LayerView(index, layers, 0, 0, None)
        experts = TransformersExperts(place.experts, place.shared)
        return LayerView(index, layers, experts.num_experts, 0, self._gate(place), weights=experts)

    def _gate(self, place: _Place) -> Tensor | None:
        """The router's rows (E, H), where it has such; of a width that is the experts' own."""
        shape = TransformersExperts(place.experts).num_experts, TransformersExperts(place.experts).expert_shape("up")[1]
        rows = [] if place.router is None else [one for one in place.router.parameters() if tuple(one.shape) == shape]
        return rows[0].detach().float() if len(rows) == 1 else None

    def _with_text(self, view: LayerView, place: _Place, seen: _Seen, text: ProbeText) -> LayerView:
        hidden, index, weight = (seen.take(name) for name in ("hidden", "index", "weight"))
        assert hidden is not None and index is not None and weight is not None  # noqa: PT018
        require_finite(hidden, f"the hidden states at layer {view.index}")
        routing, rule = _routing(seen.take("logits"), index, weight, view.num_experts)
        if rule not in (_SOFTMAX, "", *self.notes):
            self.notes.append(rule)
        shared, gate, routed = (seen.take(name) for name in ("shared", "shared_gate", "router_input"))
        if shared is not None and gate is not None:
            shared = gate.float().sigmoid() * shared.float()
        if shared is not None and shared.shape != hidden.shape:
            shared = None  # beside experts of another width
        sees_the_same = routed is None or (routed.shape == hidden.shape and torch.equal(routed.to(hidden), hidden))
        return replace(
            view,
            num_experts_per_tok=index.shape[1],
            gate=view.gate if sees_the_same else None,
            shift_invariant=rule == _SOFTMAX,
            weights=TransformersExperts(place.experts, place.shared, shared),
            text=text,
            routing=routing,
            moe_input=hidden.float(),
        )

    def _run(self, text: ProbeText, needs: frozenset[Need]) -> tuple[dict[int, _Seen], HeadView | None]:
        """Text through the model, some sequences at a time."""
        longest = int(text.token_mask.sum(dim=1).max())
        if longest > (most := self.max_position_embeddings):
            raise UserError(f"a sequence of {longest} tokens is longer than the model's {most} positions; shorten it")
        seen = {place.index: _Seen() for place in self._places}
        heads: list[tuple[Tensor, Tensor, Tensor | None]] = []
        keeps, asks = Need.LOGITS in needs, bool(needs & {Need.PREDICTIONS, Need.LOGITS})
        device = self.model.get_input_embeddings().weight.device
        with evaluating(self.model), self._listening(seen):
            for some in torch.arange(len(text.input_ids)).split(max(1, _TOKENS // text.input_ids.shape[1])):
                ids, mask = text.input_ids[some], text.token_mask[some]
                before = {index: {name: len(rows) for name, rows in one.parts.items()} for index, one in seen.items()}
                output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device).long(), use_cache=False)
                for index, one in seen.items():
                    if not one.parts:
                        raise UserError(f"the experts of layer {index} were not called; the model cannot be probed")
                    one.keep_valid(before[index], mask.flatten().to(device), f"layer {index}")
                if asks:
                    heads.append(_head(output.logits, ids, mask, keeps))
        if not asks:
            return seen, None
        predicted, loss, logits = zip(*heads, strict=True)
        return seen, HeadView(text, torch.cat(predicted), torch.cat(loss), torch.cat(logits) if keeps else None)

    @contextmanager
    def _listening(self, seen: dict[int, _Seen]) -> Iterator[None]:
        """The experts computed by the function that listens, and routers and shared experts listened to."""
        configs = {id(place.experts.config): place.experts.config for place in self._places}.values()
        before = [(config, config._experts_implementation) for config in configs]
        with ExitStack() as stack:
            for config, implementation in before:
                stack.callback(setattr, config, "_experts_implementation", implementation)
                config._experts_implementation = register()
            for place in self._places:
                one = seen[place.index]
                stack.callback(_listeners.pop, place.experts, None)
                _listeners[place.experts] = lambda x, index, weight, one=one: one.add(
                    hidden=x, index=index, weight=weight
                )
                for handle in _hooks(place, one):
                    stack.callback(handle.remove)
            yield


def _hooks(place: _Place, seen: _Seen) -> Iterator[Any]:
    """Of a layer's router and shared expert."""

    def on_router(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = next(one for one in (*inputs, *named.values()) if isinstance(one, Tensor))
        seen.add(router_input=given, logits=output[place.column] if isinstance(output, tuple) else output)

    if place.router is not None:
        yield place.router.register_forward_hook(on_router, with_kwargs=True)
    for name, module in (("shared", place.shared), ("shared_gate", place.shared_gate)):
        if module is not None:
            yield module.register_forward_hook(lambda _, __, output, name=name: seen.add(**{name: output}))


def _places(model: Any, num_hidden_layers: int) -> list[_Place]:
    """The layers with experts, in order."""
    kind = type(model).__name__
    modules = dict(model.named_modules())
    found = {name: module for name, module in modules.items() if is_experts(module)}
    if not found:
        own = {type(one).__name__ for one in modules.values() if _ALONE.search(type(one).__name__)}
        own_way = sorted(own, key=lambda name: (not name.endswith("Experts"), name))
        why = f": {own_way[0]} computes by itself" if own else ""
        raise ConfigError(f"{kind} has no experts that go through transformers' experts interface{why}")
    places = []
    for name, experts in found.items():
        reason = why_not_seen(experts)
        if reason is not None:
            raise ConfigError(f"{type(experts).__name__} of {kind} cannot be looked at: {reason}")
        places.append(_place(name, experts, modules, _logits_of(model)))
    numbers = [place.index for place in places]
    if len(set(numbers)) < len(numbers) or max(numbers) >= num_hidden_layers:
        raise ConfigError(f"{kind} has several experts in one layer, which cannot be told apart")
    return sorted(places, key=lambda place: place.index)


def _place(name: str, experts: nn.Module, modules: dict[str, nn.Module], recorded: dict[type, int]) -> _Place:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    if number is None:
        raise ConfigError(f"{name}: the layer that these experts are of cannot be told by their name")
    beside = {key: one for key, one in modules[name.rpartition(".")[0]].named_children() if one is not experts}
    routers = [one for one in beside.values() if type(one) in recorded]
    router = routers[0] if len(routers) == 1 else None
    shared = next((beside[key] for key in _SHARED if key in beside), None)
    column = 0 if router is None else recorded[type(router)]
    return _Place(int(number[1]), experts, router, column, shared, beside.get(_SHARED_GATE))


def _logits_of(model: Any) -> dict[type, int]:
    """Classes that transformers knows to give out router logits, and where among what they give out."""
    found: dict[type, int] = {}
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for one in recorder if isinstance(recorder, (list, tuple)) else [recorder]:
            if one is not None:
                found[getattr(one, "target_class", one)] = getattr(one, "index", 0)
    return found


def _routing(logits: Tensor | None, index: Tensor, weight: Tensor, experts: int) -> tuple[Routing, str]:
    """The routing, the largest weight first, and in words the rule by which logits become weights.

    It is measured: by softmax or sigmoid, the weights of a token's experts over their scores are all the same number.
    """
    exact = _ALIKE.get(weight.dtype, 1e-4)
    weight, order = weight.float().sort(dim=-1, descending=True, stable=True)
    index = index.long().gather(1, order)
    if logits is None:
        unknown = weight.new_full((1, 1), torch.nan).expand(len(index), experts)
        return Routing(unknown, unknown, index, weight), ""
    logits = logits.float()
    shares, spread = {_SOFTMAX: logits.softmax(dim=-1), _SIGMOID: logits.sigmoid()}, {}
    for rule, scores in shares.items():
        ratio = weight / scores.gather(1, index).clamp_min(torch.finfo(torch.float32).tiny)
        spread[rule] = float(((ratio.amax(dim=1) - ratio.amin(dim=1)) / ratio.abs().amax(dim=1)).mean())
    rule = min(spread, key=lambda name: spread[name])  # of two that do, the first
    probs = shares[rule] / shares[rule].sum(dim=-1, keepdim=True)
    if spread[rule] > exact:
        rule, probs = _OTHER, shares[_SOFTMAX]
    return Routing(logits, probs, index, weight), rule


def _few_tokens(vocab_size: int) -> ProbeText:
    ids = torch.arange(8).view(1, -1) * 97 % vocab_size
    return ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))


def _head(logits: Tensor, ids: Tensor, mask: Tensor, keeps: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The most probable next token (T,), the loss (T,), and the logits (T, V) where they are kept."""
    valid = ProbeText(ids, mask, torch.zeros(len(ids), dtype=torch.int64))
    rows = logits[mask.to(logits.device)].float()  # (T, V)
    require_finite(rows, "the logits")
    targets = valid.targets.to(rows.device)
    loss = F.cross_entropy(rows, targets.clamp_min(0), reduction="none").masked_fill(targets < 0, torch.nan)
    return rows.argmax(dim=-1), loss, rows if keeps else None
