"""Hand-made layers whose experts' outputs and activations are given, for the probes that look at them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moebed.model.routers import Routing
from moebed.views.attribution import Attribution, Following
from moebed.views.layer import ExpertKind, ExpertView, LayerView, ProbeText, Watch


class GivenOutputs:
    """Stands for a layer's weights: hands out what its experts made of the text; shared one and reference by label."""

    def __init__(self, outputs: Tensor, others: dict[str, Tensor] | None = None, acts: Tensor | None = None) -> None:
        self.outputs, self.others, self.acts = outputs, others or {}, acts

    def run_experts(self, x: Tensor, watch: Watch | None = None, beside: None = None) -> Iterator[ExpertView]:
        for index, output in enumerate(self.outputs):
            for start in range(0, len(x), 2) if watch is not None else ():  # two tokens at a time
                acts = self.acts[index] if self.acts is not None else torch.ones(len(x), 4)
                watch(index, slice(start, start + 2), acts[start : start + 2])
            yield ExpertView(index, output)
        for shift, (label, output) in enumerate(self.others.items()):
            yield ExpertView(len(self.outputs) + shift, output, ExpertKind(label))

    def adapted(self, x: Tensor, routing: Routing) -> None:
        return None


def plain_text(lengths: list[int], words: tuple[str, ...] = ()) -> ProbeText:
    """Sequences of these lengths, padded on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.arange(mask.numel()).view(mask.shape)
    return ProbeText(ids, mask, torch.zeros(len(lengths), dtype=torch.int64), token_text=words)


def output_view(
    outputs: Tensor,
    chosen: list[list[int]],
    index: int = 0,
    others: dict[str, Tensor] | None = None,
    acts: Tensor | None = None,
    weight: Tensor | None = None,
    text: ProbeText | None = None,
    probs: Tensor | None = None,
) -> LayerView:
    """A layer whose E experts made outputs (E, T, H) and whose router chose these experts (T, K)."""
    experts, tokens, hidden = outputs.shape
    text = plain_text([tokens]) if text is None else text
    following = Following.of(lambda ids: torch.ones(len(ids), hidden), text.targets)
    choice = torch.tensor(chosen)
    probs = torch.full((tokens, experts), 1 / experts) if probs is None else probs
    weight = torch.full(choice.shape, 1 / choice.shape[1]) if weight is None else weight
    return LayerView(
        index=index,
        num_hidden_layers=index + 1,
        num_experts=experts,
        num_experts_per_tok=choice.shape[1],
        gate=None,
        routing=Routing(probs.log(), probs, choice, weight),
        moe_input=torch.zeros(tokens, outputs.shape[2]),
        residual=torch.ones(tokens, outputs.shape[2]),
        text=text,
        attribution=Attribution(following, 1.0, nn.Identity()),
        leave=lambda output: 1 + output,
        weights=GivenOutputs(outputs, others, acts),  # type: ignore[arg-type]
    )


def dense_view(index: int = 0) -> LayerView:
    """A layer without experts."""
    return LayerView(index, index + 1, 0, 0, None, moe_input=torch.zeros(3, 2), text=plain_text([3]))
