"""Sampling from a decoder with a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moebed.model.attention import KVCache
from moebed.model.decoder import Decoder, evaluating


@torch.no_grad()
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continue prompts of equal length.

    Args:
        decoder: The model; its training flag is left as it was.
        input_ids: (B, S) int64 prompts.
        max_new_tokens: Tokens to add at most; fewer when max_position_embeddings is reached.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among this many most likely tokens; among all if None.
        generator: Source of randomness, so that a training run's own is not touched.
        eos_id: Stop when every sequence has produced this token.

    Returns:
        (B, S + new) int64.

    Raises:
        UserError: A router needs more than the tokens.
    """
    room = decoder.config.max_position_embeddings - input_ids.shape[1]
    total = input_ids.shape[1] + max(0, min(max_new_tokens, room))
    caches = [KVCache(total) for _ in decoder.layers]
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    fresh = input_ids
    with evaluating(decoder):
        while input_ids.shape[1] < total and not ended.all():
            logits = decoder(fresh, caches).logits[:, -1].float()  # (B, V)
            fresh = _choose(logits, temperature, top_k, generator)
            input_ids = torch.cat([input_ids, fresh], dim=1)
            if eos_id is not None:
                ended |= fresh.squeeze(1) == eos_id
    return input_ids


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (B, V): (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
