"""Our model beside transformers' of the same weights, which may choose other experts where two score alike.

A router's choice is discrete. Where the K-th score and the next differ by less than two implementations round, they may
send a token to different experts, and all that follows in its sequence differs by far more than rounding. So
transformers' model runs twice: as it chooses, and with our choices, weighted by its own scores.

B sequences, S positions, V vocabulary, T = B·S tokens, E experts, K of them a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebed.model.decoder import Decoder, evaluating
from moebed.model.routing import Routing


class Chosen(NamedTuple):
    """What a router of transformers made of T tokens."""

    router_logits: Tensor  # (T, E)
    topk_index: Tensor  # (T, K), what it chose, even where it was given another choice


def off(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How far logits (B, S, V) are off, a token's largest difference over the largest logit: of the median token, of
    the worst, and the share of tokens that are off by a thousandth."""
    each = _each_off(found, wanted)
    return {"median": float(each.median()), "worst": float(each.max()), "share": float((each > 1e-3).float().mean())}


def _each_off(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each token, (B, S)."""
    return (found - wanted).abs().amax(dim=-1) / wanted.abs().max()


@torch.no_grad()
def compared(decoder: Decoder, theirs: torch.nn.Module, ids: Tensor) -> dict[str, Any]:
    """Logits and choices of both on ``ids`` (B, S).

    Returns:
        ``free``, ``same_choices``: see :func:`off`, as transformers' model chooses and with our choices.
        ``before``: as it chooses, the worst of the tokens for which, and before which in their sequence, all choices
            are ours.
        ``router_logits``: with our choices, the largest difference of a router's logits from ours, over its largest.
        ``decisions``, ``otherwise``: how many choices there are, a token and layer each, and how many of them its
            routers make otherwise although all choices before were the same.
        ``margin``: by how much of its largest logit we prefer, at most, an expert that such a choice leaves out to one
            that it takes.
    """
    with evaluating(decoder):
        wanted, routings = decoder(ids)
    free, chosen = _run(theirs.eval(), ids, None)
    same, seen = _run(theirs, ids, routings)
    differs = torch.stack([_differs(*pair) for pair in zip(chosen, routings, strict=True)]).any(dim=0)
    after = differs.view(ids.shape).cummax(dim=1).values
    pairs = list(zip(seen, routings, strict=True))
    return {
        "free": off(free, wanted),
        "same_choices": off(same, wanted),
        "before": float(_each_off(free, wanted)[~after].max()),
        "router_logits": max(float(_scaled(one.router_logits - ours.router_logits, ours)) for one, ours in pairs),
        "decisions": len(pairs) * ids.numel(),
        "otherwise": sum(int(_differs(*pair).sum()) for pair in pairs),
        "margin": max(float(_scaled(_margins(*pair), pair[1])) for pair in pairs),
    }


def _differs(theirs: Chosen, ours: Routing) -> Tensor:
    """Which tokens go to other experts, (T,)."""
    return (theirs.topk_index.sort(dim=-1).values != ours.topk_index.sort(dim=-1).values).any(dim=-1)


def _scaled(values: Tensor, ours: Routing) -> Tensor:
    """The largest of them, over the router's largest logit."""
    return values.abs().max() / ours.router_logits.abs().max()


def _margins(theirs: Chosen, ours: Routing) -> Tensor:
    """Our lowest score of what we chose, less our lowest of what they chose, (T,): 0 where that is the same."""
    scores = ours.router_logits
    least = [scores.gather(1, index).amin(dim=1) for index in (ours.topk_index, theirs.topk_index)]
    return least[0] - least[1]


def _run(model: torch.nn.Module, ids: Tensor, routings: list[Routing] | None) -> tuple[Tensor, list[Chosen]]:
    """Logits (B, S, V), and what each router made of it."""
    with _watched(model, routings) as chosen:
        logits = model(ids).logits
    return logits, chosen


@contextmanager
def _watched(model: torch.nn.Module, routings: list[Routing] | None) -> Iterator[list[Chosen]]:
    """Note what the routers of transformers' model choose; it goes on with other choices, where some are given."""
    chosen: list[Chosen] = []

    def note(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, index = output
        chosen.append(Chosen(logits, index))
        if routings is None:
            return output
        index = routings[len(chosen) - 1].topk_index
        probs = logits.float().softmax(dim=-1).gather(1, index)
        if getattr(module, "norm_topk_prob", True):  # Mixtral's always does
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return logits, probs.to(weights.dtype), index

    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    assert routers
    hooks = [router.register_forward_hook(note) for router in routers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
