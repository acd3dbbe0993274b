"""A trace in memory, as probes ask for it: which experts each token went to, layer by layer.

B sequences, S positions, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.machine import provenance
from moebed.model.routers import Routing
from moebed.views.layer import HeadView, LayerView, Need, ProbeText

NONE = -1  # stands for an expert where a token has no further one, and for an id that nobody knows
MOST_GUESSED = 1024  # experts of a layer that a trace is believed to have by itself
_MOST = 2**15 - 1


@dataclass(frozen=True)
class RoutingTrace:
    """Choices of a text's tokens.

    Args:
        name: What it is called.
        kind: The format that it was read from, or is of.
        choices: (T, K) int64 by layer, the first choice first; -1 where a token has no further expert.
        num_experts: E by layer.
        text: The tokens; ids are -1 where they are not known.
        ordered: Whether it is known which tokens follow one another.
        notes: What a person should know of it.
        files: What stands for the files that it was read from.
    """

    name: str
    kind: str
    choices: Mapping[int, np.ndarray]
    num_experts: Mapping[int, int]
    text: ProbeText
    ordered: bool = True
    notes: list[str] = field(default_factory=list)
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offers(self) -> frozenset[Need]:
        """What probes can be shown of it."""
        return frozenset({Need.CHOICES} | ({Need.NEIGHBOURS} if self.ordered else set()))

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another in a summary."""
        layers, experts = len(self.choices), max(self.num_experts.values())
        return {"name": self.name, "model_type": f"trace of {self.kind}", "moe_layers": layers, "num_experts": experts}

    def record(self) -> dict[str, Any]:
        """What decides its views, as plain data."""
        experts = [self.num_experts[layer] for layer in self.choices]
        made = {"moebed": provenance.moebed_version(), "code": provenance.code()}
        return made | {"trace": dict(self.files), "num_experts": experts}

    def views(self, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
        """A view of each layer that is in it. It has a text of its own and takes no other."""
        for layer, index in self.choices.items():
            yield LayerView(
                index=layer,
                num_hidden_layers=max(self.choices) + 1,
                num_experts=self.num_experts[layer],
                num_experts_per_tok=index.shape[1],
                gate=None,
                text=self.text,
                routing=_routing(torch.from_numpy(index), self.num_experts[layer]),
            )


def _routing(index: Tensor, experts: int) -> Routing:
    """Choices (T, K) of equal weight; what a trace does not say is NaN."""
    unknown = torch.full((1, 1), torch.nan).expand(len(index), experts)
    chosen = index != NONE
    weight = chosen / chosen.sum(dim=1, keepdim=True).clamp_min(1)
    return Routing(unknown, unknown, index.clamp_min(0), weight.float(), ragged=not bool(chosen.all()))


def text_of(
    ids: Sequence[np.ndarray],
    domains: Sequence[str] = (),
    said: Sequence[str] = (),
) -> ProbeText:
    """The text of sequences of ids (S,).

    Args:
        ids: Of each sequence.
        domains: Of each sequence; all are of one if not given.
        said: What each of all T tokens says.
    """
    longest = max(map(len, ids))
    padded, mask = torch.zeros(len(ids), longest, dtype=torch.int64), torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, one in enumerate(ids):
        padded[row, : len(one)], mask[row, : len(one)] = torch.from_numpy(np.asarray(one, np.int64)), True
    names = tuple(dict.fromkeys(domains)) or ("text",)
    domain = [names.index(one) for one in domains] or [0] * len(ids)
    return ProbeText(padded, mask, torch.tensor(domain), names, tuple(said))


def choices_in(value: Any, what: str, dimensions: int) -> np.ndarray:
    """Numbers of experts from nested lists: an array of so many dimensions, the last of at least one expert.

    Raises:
        UserError: They are anything else.
    """
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        raise UserError(f"{what}: its lists are not of one length") from None
    if found.ndim != dimensions or not found.size or found.dtype.kind not in "iu":
        raise UserError(f"{what}: it holds no whole numbers in {dimensions} dimensions")
    if int(found.min()) < NONE or int(found.max()) >= _MOST:
        wrong = int(found.min()) if int(found.min()) < NONE else int(found.max())
        raise UserError(f"{what}: {wrong} is the number of no expert")
    return found.astype(np.int64)


def settled(
    choices: Mapping[int, np.ndarray], said: Mapping[int, int], wanted: int | None, where: str
) -> tuple[dict[int, np.ndarray], dict[int, int], list[str]]:
    """Choices (T, K) by layer, in order of layers and without empty columns; experts by layer; notes.

    Args:
        choices: By layer, as read.
        said: Experts by layer, as the trace says.
        wanted: Experts of every layer, as a person says.
        where: The trace, in an error.

    Raises:
        UserError: A layer has fewer experts than a token names, or a token names one twice.
    """
    most = max(int(index.max()) for index in choices.values()) + 1
    guessed = most if wanted is None and not set(choices) <= set(said) else None
    experts = {layer: wanted or (said[layer] if guessed is None else most) for layer in sorted(choices)}
    if wanted is None and max(experts.values()) > MOST_GUESSED:
        raise UserError(
            f"{where} names expert {max(most, *experts.values()) - 1}; if layers have so many, say --num-experts N"
        )
    found, notes = {}, []
    for layer, count in experts.items():
        index = choices[layer]
        if int(index.max()) >= count:
            raise UserError(f"{where}: layer {layer} names expert {int(index.max())}, but has {count} experts")
        index = index[:, (index != NONE).any(axis=0)] if (index != NONE).any() else index[:, :1]
        _require_different(index, f"{where}: layer {layer}")
        found[layer] = np.ascontiguousarray(index)
    if guessed is not None:
        notes.append(f"{where} does not say how many experts a layer has: taken to be {guessed}; --num-experts N")
    ascending = all((np.diff(one, axis=1) > 0).all() for one in found.values())
    if ascending and any(one.shape[1] > 1 for one in found.values()) and len(next(iter(found.values()))) > 8:
        notes.append(f"{where} lists experts by their numbers: which of a token's is the first says nothing")
    return found, experts, notes


def _require_different(index: np.ndarray, what: str) -> None:
    in_order = np.sort(index, axis=1)
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NONE)).any(axis=1)
    if twice.any():
        raise UserError(f"{what}: token {int(np.argmax(twice))} names an expert twice")
