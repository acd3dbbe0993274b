"""What a new MoE makes of a text before it is trained, and with which scale of its experts' output.

T valid tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.checkpoints.families.keys import KeyMap
from moebed.machine.float32 import exact_products
from moebed.model.decoder import Block, MoE
from moebed.model.routers import TokenContext
from moebed.upcycling.scales import SCALES, calibrated, output_scale
from moebed.upcycling.text import FFN, Content, TextWalk, filled_block

AS_MADE = "as made"


class FirstLosses(NamedTuple):
    """Mean cross entropies in nats, before any training.

    Args:
        dense: Of the dense model.
        moe: Of the MoE, by the name of the output's scale; of one without a choice of scales under ``as made``.
        scales: Factor of each channel (H,) of the layers that have experts, as ``calibrate`` finds it.
        tokens: How many tokens were predicted.
    """

    dense: float
    moe: dict[str, float]
    scales: dict[int, Tensor]
    tokens: int


@torch.no_grad()
def first_losses(
    walk: TextWalk,
    keys: KeyMap,
    content: Content,
    asked: float | str | None,
    scaled: bool,
    on_layer: Callable[[], None] = lambda: None,
) -> FirstLosses:
    """Run a text through the dense model and through the MoE that it becomes, with every scale, a layer at a time.

    Both have the same attention, so that they differ in the FFN alone. ``calibrate`` takes the layers in order: each is
    scaled by what the dense FFN makes of the inputs that it itself gets, less what shared experts make of them. Every
    router is as in evaluation: a noisy gate has no noise.

    Args:
        walk: The text, and the dense model.
        keys: The MoE.
        content: Its parameters, the experts' output not scaled.
        asked: The scale that was asked for; a number is one more.
        scaled: Whether the output has a scale.
        on_layer: Called for each layer that the text has passed.
    """
    numbers = {name: asked if name == _named(asked) else name for name in (*SCALES, _named(asked))} if scaled else {}
    names = list(numbers) or [AS_MADE]
    dense = walk.embed()
    streams = {name: dense for name in names}
    scales: dict[int, Tensor] = {}
    for index in range(walk.config.num_hidden_layers):
        was, layer = walk.block(index), keys.config.layer(index)
        block = filled_block(keys, index, content) if layer.num_experts else was
        for name in names:
            attended = walk.attend(block, streams[name])
            ffn: FFN | None = None
            if scaled and layer.num_experts:
                factor = output_scale(numbers[name], layer.num_experts, layer.num_experts_per_tok)
                if factor is None:
                    scales[index] = _calibrate(walk, block, was, attended)
                ffn = _scaled(block, scales[index] if factor is None else factor)
            streams[name] = walk.feed_forward(block, attended, ffn)
        dense = walk.feed_forward(was, walk.attend(was, dense))
        on_layer()
    moe = {name: walk.loss(hidden) for name, hidden in streams.items()}
    return FirstLosses(walk.loss(dense), moe, scales, walk.num_predicted)


def _named(scale: float | str | None) -> str:
    return f"{scale:g}" if isinstance(scale, (int, float)) else scale or "published"


def _parts(block: Block, x: Tensor, context: TokenContext) -> tuple[Tensor, Tensor]:
    """What routed and shared experts make of tokens x (t, H) of a context (t,): (t, H) each."""
    mlp = block.mlp
    assert isinstance(mlp, MoE)
    shared = mlp.shared_output(x) if mlp.shared_expert is not None else torch.zeros_like(x)
    return mlp.experts(x, mlp.router(x, mlp.experts, context)), shared


def _scaled(block: Block, factor: Tensor | float) -> FFN:
    """The layer's MoE with its routed experts' output multiplied by a factor, or by one a channel (H,)."""

    def ffn(x: Tensor, context: TokenContext) -> Tensor:
        routed, shared = _parts(block, x, context)
        return routed * factor + shared

    return ffn


def _calibrate(walk: TextWalk, block: Block, dense: Block, attended: Tensor) -> Tensor:
    """Factor of each channel (H,) with which routed experts' output varies as their part of the dense FFN's does."""
    ids, wanted, found = walk.text.token_ids, torch.empty_like(attended), torch.empty_like(attended)
    with exact_products():
        for rows in torch.arange(len(attended)).split(walk.tokens_at_a_time):
            x = block.pre_ffn_norm(attended[rows])
            found[rows], shared = _parts(block, x, TokenContext(ids[rows]))
            wanted[rows] = dense.mlp(x) - shared
    return calibrated(wanted, found)
