"""Log-likelihoods of continuations, many at a time.

B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.model.decoder import Decoder, evaluating

BATCH_TOKENS = 4096  # of one forward pass, padding included


class Pair(NamedTuple):
    """Ids that are given, at least one, and ids that are scored after them."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """What a continuation came to."""

    log_likelihood: float  # sum of ln p of its ids, in nats, below 0
    is_greedy: bool  # whether each of its ids is the most likely one at its place


@torch.no_grad()
def log_likelihoods(
    decoder: Decoder,
    pairs: Sequence[Pair],
    batch_tokens: int = BATCH_TOKENS,
    done: Callable[[int], object] = lambda number: None,
) -> list[Score]:
    """Score continuations; what is beyond the model's positions is cut off at the front.

    Sequences of like length go together, padded at the end, where causal attention does not see it.

    Args:
        decoder: The model; its training flag is left as it was.
        pairs: What to score.
        batch_tokens: Of one forward pass, padding included; a longer sequence goes alone.
        done: Told after each pass how many pairs are scored.

    Raises:
        UserError: A continuation is longer than the model has positions, or a pair has no context or an id that the
            model does not know.
    """
    windows = [_window(decoder, pair) for pair in pairs]
    scores: list[Score | None] = [None] * len(pairs)
    with evaluating(decoder):
        for batch in _batches([len(window) for window in windows], batch_tokens):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(windows[at]) for at in batch], batch_first=True)
            logits = decoder(ids.to(decoder.embed_tokens.weight.device)).logits  # (B, S, V)
            for row, at in enumerate(batch):
                last, scored = len(windows[at]), len(pairs[at].continuation)
                scores[at] = _score(logits[row, last - scored : last], pairs[at].continuation)
            done(sum(score is not None for score in scores))
    return [score for score in scores if score is not None]


def _window(decoder: Decoder, pair: Pair) -> list[int]:
    """The ids that the model is shown: all but the last, as many as it has positions for."""
    positions, vocabulary = decoder.config.max_position_embeddings, decoder.config.vocab_size
    if not pair.context:
        raise UserError("a continuation without any token before it cannot be scored; give the id that begins a text")
    if len(pair.continuation) > positions:
        raise UserError(
            f"a continuation has {len(pair.continuation)} tokens but the model has {positions} positions; "
            "leave that task out"
        )
    ids = [*pair.context, *pair.continuation]
    if wrong := [number for number in ids if not 0 <= number < vocabulary]:
        raise UserError(
            f"token id {wrong[0]} is not among the {vocabulary} of the model; the tokenizer does not belong to it"
        )
    return ids[:-1][-positions:] if pair.continuation else ids[-positions:]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of sequences that go together, the longest first."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _score(logits: Tensor, wanted: Sequence[int]) -> Score:
    """Of logits (S, V) at the places before ``wanted`` (S)."""
    logits, ids = logits.float(), torch.tensor(wanted, dtype=torch.int64, device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, ids.unsqueeze(1))
    return Score(float(chosen.sum()), bool((logits.argmax(dim=-1) == ids).all()))
