"""The text under several interventions at a time, beside the text as it is.

A branch begins where its intervention first changes a routing, and holds a stream of its own from there on. A token
before the first change of its text is as it is without: its rows are copies, and its experts do not run again.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.machine.finite import all_finite
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block
from moebed.model.routers import Router, Routing, TokenContext
from moebed.model.routers.contract import ExpertOutputs
from moebed.views.attending import TextAttention
from moebed.views.beside import ExpertSums, Rows
from moebed.views.interventions import Intervention, LayerContext, assigned_weights, drawn_tokens

_ROUNDING = 1e-6  # a weight that changes by less is that of the same rule, computed once more


class HasTokens(Protocol):
    """What branches ask of a text."""

    @property
    def sequence(self) -> Tensor:
        """(T,) which sequence each token is of."""
        ...


@dataclass
class Branch:
    """One intervention, and the text under it.

    Args:
        intervention: It.
        reached: (T,) bool, tokens that differ, or may: from the first change of their text on, or those changed alone.
        hidden: (T, H) residual stream; None before the first change, and once it is no number.
        x: (T, H) the experts' input at the layer that the text is in.
        routing: Where tokens go there.
        stopped: Why it ended before the text did.
    """

    intervention: Intervention
    reached: Tensor
    hidden: Tensor | None = None
    x: Tensor | None = None
    routing: Routing | None = None
    stopped: str = ""

    def stop(self, why: str) -> None:
        """End here; what it holds is let go."""
        self.hidden = self.x = self.routing = None
        self.stopped = why


class Branches:
    """All branches of one pass.

    Args:
        interventions: One for each; of different names.
        text: Whose tokens they are.
        config: The model.

    Raises:
        ConfigError: The model has not what one of them names.
    """

    def __init__(self, interventions: Sequence[Intervention], text: HasTokens, config: ModelConfig) -> None:
        for one in interventions:
            one.check(config)
        self._sequence = text.sequence
        nobody = torch.zeros(len(self._sequence), dtype=torch.bool)
        self.branches = [Branch(one, nobody) for one in interventions]
        self._where = {one.name: frozenset(one.layers_of(config)) for one in interventions}

    @property
    def begun(self) -> list[Branch]:
        """Those that have a stream of their own."""
        return [branch for branch in self.branches if branch.hidden is not None]

    def attend(self, block: Block, attention: TextAttention, text: Tensor, attended: Tensor) -> None:
        """Through attention, and the norm after it.

        Args:
            block: The layer.
            attention: Of the text's tokens.
            text: (T, H) residual stream before it of the text as it is.
            attended: (T, H) and after it.
        """
        for branch in self.begun:
            assert branch.hidden is not None
            if branch.intervention.is_alone:
                branch.hidden = attention.attend_alone(block, branch.hidden, branch.reached, text)
            else:
                branch.hidden = attention.attend(block, branch.hidden, branch.reached)
            branch.hidden[~branch.reached] = attended[~branch.reached]
            branch.x = block.pre_ffn_norm(branch.hidden)
            if not all_finite(branch.x):
                branch.stop("its hidden states are no numbers")

    def change(self, layer: LayerContext, x: Tensor, base: Routing, own: Iterator[Routing]) -> None:
        """Change the routings of this layer; a branch may begin.

        Args:
            layer: The layer.
            x: (T, H) experts' input of the text as it is.
            base: Its routing.
            own: What the router made of those that have begun, in order.
        """
        for branch in self.branches:
            begun = branch.hidden is not None
            if branch.stopped or not (begun or layer.index in self._where[branch.intervention.name]):
                continue
            before, seen = (next(own), branch.x) if begun else (base, x)
            assert seen is not None
            after = before
            if layer.index in self._where[branch.intervention.name]:
                after = branch.intervention.apply(before, seen, layer)
                branch.reached = branch.reached.to(x.device) | self._newly_reached(branch.intervention, before, after)
            if begun or bool(branch.reached.any()):
                branch.x, branch.routing = seen, _of_some(after, branch.reached)

    def _newly_reached(self, intervention: Intervention, before: Routing, after: Routing) -> Tensor:
        """Tokens (T,) whose routing changed, and unless each is alone those after the first such one of a text."""
        looked_at = drawn_tokens(len(before.topk_index), intervention.most).to(before.topk_index.device)
        if intervention.everywhere:
            return looked_at
        same = (assigned_weights(before) - assigned_weights(after)).abs() <= _ROUNDING  # which NaN never is
        differs = ~same.all(dim=1)
        if intervention.is_alone:
            return differs & looked_at
        sequence = self._sequence.to(differs.device)
        place = torch.arange(len(differs), device=differs.device)
        first = place.new_full((int(sequence.max()) + 1,), len(place))  # by sequence, some of which may be empty
        first.scatter_reduce_(0, sequence, torch.where(differs, place, len(place)), "amin")
        return place >= first[sequence]

    def at_work(self) -> list[Branch]:
        """Those whose tokens go through this layer's experts, or its FFN, on their own."""
        return [branch for branch in self.branches if branch.x is not None]

    def sums(self) -> ExpertSums | None:
        """What their tokens ask of the experts; None where no branch has begun."""
        rows = [Rows(branch.x, branch.routing) for branch in self.at_work() if branch.x is not None]
        return ExpertSums(rows) if rows else None

    def leave(
        self, attended: Tensor, after: Tensor, added: Callable[[Tensor, Tensor], Tensor], sums: ExpertSums
    ) -> None:
        """On to the next layer.

        Args:
            attended: (T, H) residual stream after attention of the text as it is.
            after: (T, H) and after the layer.
            added: What enters the next layer, of a stream after attention and what the experts make of it.
            sums: Of the experts' outputs of each.
        """
        sums.parts.clear()  # which the layer's view would keep
        for number, branch in enumerate(self.at_work()):
            branch.x = branch.routing = None
            hidden = added(attended if branch.hidden is None else branch.hidden, sums.totals[number])
            sums.totals[number] = torch.empty(0)  # let go
            hidden[~branch.reached] = after[~branch.reached]
            branch.hidden = hidden
            if not all_finite(hidden):
                branch.stop("its hidden states are no numbers")

    def last(self, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of each that has begun, the tokens (n,) that differ and that another one follows, and their rows (n, H).

        The streams end here.
        """
        tokens, rows = [], []
        for branch in self.begun:
            assert branch.hidden is not None
            tokens.append(torch.where(branch.reached & (targets >= 0))[0])
            rows.append(branch.hidden[tokens[-1]])
            branch.hidden = branch.hidden.new_empty(0)
        return tokens, rows

    def effects(self, loss: Tensor, tokens: Sequence[Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """By how much losses (T,) rise, by name.

        Args:
            loss: (T,) of the text as it is, NaN where no token follows.
            tokens: As :meth:`last` says.
            losses: (n,) of those tokens.
        """
        found = {}
        changed = zip(tokens, losses, strict=True)
        for branch in self.branches:
            rise = torch.where(loss.isnan(), torch.nan, torch.zeros_like(loss))
            if branch.stopped:
                rise = torch.full_like(loss, torch.nan)
            elif branch.hidden is not None:
                token, under = next(changed)
                rise[token] = under - loss[token]
            found[branch.intervention.name] = rise
        return found


def copy_bytes(tokens: int, hidden_size: int) -> int:
    """What a branch holds at most: the stream, the experts' input and the sum of their outputs, float32."""
    return 3 * 4 * tokens * hidden_size


def route(
    router: Router, experts: ExpertOutputs, streams: Sequence[Tensor], context: TokenContext
) -> Iterator[Routing]:
    """The routing of each of several streams (T, H) of the same tokens.

    A router that runs experts sees all at once, as their weights are at hand once.
    """
    if len(streams) == 1 or not router.runs_experts:
        yield from (router(x, experts, context) for x in streams)
        return
    whole = router(torch.cat(list(streams)), experts, context.changed(lambda of: of.repeat(len(streams))))
    for start in range(0, len(whole.topk_index), len(streams[0])):
        part = slice(start, start + len(streams[0]))
        rows = {name: one[part] for name, one in whole._asdict().items() if isinstance(one, Tensor)}
        yield whole._replace(**rows)


def _of_some(routing: Routing, tokens: Tensor) -> Routing:
    """Where some tokens (T,) bool go; the others go nowhere. What only the router's losses need is let go."""
    weight = torch.where(routing.assigned & tokens.unsqueeze(1), routing.topk_weight, 0.0)
    return Routing(weight, weight, routing.topk_index, weight, ragged=True)


def require_different(interventions: Sequence[Intervention]) -> None:
    """Raise UserError where two have one name."""
    names = [one.name for one in interventions]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"intervention {name!r} is given twice; results are told apart by their names")
