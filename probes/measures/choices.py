"""What the probes of routing share: choices in order of weight, counts by sequence, domains as keys, chance.

T tokens, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch

from moebed.model.routers import Routing
from moebed.views.layer import LayerView, ProbeText
from probes.contract import Arrays

NONE = -1  # stands for an expert where a token has no further one
ALL = "all"  # stands for the whole text where a domain's name may stand


def ranked(routing: Routing, top_k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts (T, K) int64 and their weights (T, K), the largest weight first; -1 where a token has no more.

    A checkpoint's own routing may come unsorted, so the first column of ``topk_index`` need not be the first choice.
    Where the number of experts differs from token to token, K is that of the busiest one, or top_k if that is less.
    """
    weight, order = routing.topk_weight.float().sort(dim=-1, descending=True, stable=True)
    index = routing.topk_index.gather(1, order).masked_fill(~routing.assigned.gather(1, order), NONE)
    used = max(1, int((index != NONE).any(dim=0).sum()))
    used = used if top_k is None else min(used, top_k)
    return index[:, :used].cpu().numpy(), weight[:, :used].cpu().numpy()


def assignments(view: LayerView) -> np.ndarray:
    """The experts (T, K) that each token of a layer goes to, all of them; see :func:`ranked`."""
    assert view.routing is not None
    return ranked(view.routing)[0]


def domain_arrays(text: ProbeText) -> dict[str, np.ndarray]:
    """What is stored once of the text: ``domain (B,)`` and ``domain_names``."""
    return {"domain": text.domain.cpu().numpy(), "domain_names": np.array(text.domains, dtype=np.str_)}


def sequence_of(text: ProbeText) -> np.ndarray:
    """(T,) which sequence each token belongs to."""
    return text.sequence.cpu().numpy()


def counts_by_sequence(chosen: np.ndarray, sequence: np.ndarray, sequences: int, experts: int) -> np.ndarray:
    """How often each sequence went to each expert: (B, E) int32.

    Args:
        chosen: (T, K') experts, -1 for none.
        sequence: (T,) the sequence of each token.
        sequences: B.
        experts: E.
    """
    cell = torch.from_numpy((chosen + sequence[:, None] * experts)[chosen != NONE])
    return torch.bincount(cell, minlength=sequences * experts).view(sequences, experts).int().numpy()


def chosen_mask(index: np.ndarray, experts: int) -> np.ndarray:
    """(T, E) bool, whether a token chose an expert."""
    mask = np.zeros((len(index), experts + 1), dtype=bool)
    np.put_along_axis(mask, index, True, axis=1)  # of none, the last column
    return mask[:, :experts]


def overlap_by_chance(experts: int, chosen: int) -> float:
    """Probability that two random sets of K of E experts have one in common: 1 − C(E−K, K) / C(E, K)."""
    return 1 - math.comb(experts - chosen, chosen) / math.comb(experts, chosen)


def domain_keys(names: Sequence[str]) -> list[str]:
    """The last part of an array's key for each domain: no slash, none twice, none empty, none that is ``all``."""
    keys: list[str] = []
    for name in map(str, names):
        safe = re.sub(r"[/\\%\x00-\x1f]", lambda found: f"%{ord(found[0]):02X}", name) or "%"
        number = 2
        key = safe
        while key in keys or key == ALL:
            key, number = f"{safe}%{number}", number + 1
        keys.append(key)
    return keys


def names_by_key(arrays: Arrays) -> dict[str, str]:
    """What each domain of the arrays is called, by its key."""
    names = [str(name) for name in arrays.get("domain_names", ())]
    keys = domain_keys(names)
    told = (name if names.count(name) == 1 else key for key, name in zip(keys, names, strict=True))
    return dict(zip(keys, told, strict=True)) | {ALL: "all text"}


def first_middle_last(layers: Sequence[int]) -> list[int]:
    """Three layers, or as many as there are: of 0 to 31, they are 0, 15 and 31 as in the Mixtral paper."""
    layers = list(layers)
    return sorted({layers[0], layers[(len(layers) - 1) // 2], layers[-1]}) if layers else []
