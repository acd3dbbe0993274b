"""Log-likelihoods of continuations, against a forward pass of each sequence by itself."""

import pytest
import torch

from moebed.errors import UserError
from moebed.tasks.scoring import Pair, log_likelihoods

PAIRS = [Pair([1, 2, 3], [4]), Pair([5], [6, 7, 8, 9]), Pair([9] * 12, [3, 3]), Pair([2, 2], [2, 2, 2])]


def directly(decoder, pair):
    """Sum of ln p, one id after another."""
    total, greedy = 0.0, True
    for place, wanted in enumerate(pair.continuation):
        ids = torch.tensor([[*pair.context, *pair.continuation[:place]]])
        with torch.no_grad():
            logits = decoder.eval()(ids).logits[0, -1].double()
        total += float(logits.log_softmax(0)[wanted])
        greedy &= int(logits.argmax()) == wanted
    return total, greedy


@pytest.mark.parametrize("batch_tokens", [1, 12, 4096])
@pytest.mark.parametrize("router", ["softmax_topk", "expert_norm", "relu"])
def test_they_are_those_of_each_sequence_by_itself(make_decoder, router, batch_tokens):
    decoder = make_decoder(router=router).train()
    told = []
    found = log_likelihoods(decoder, PAIRS, batch_tokens, told.append)
    assert decoder.training
    assert told[-1] == len(PAIRS)
    assert len(told) == (1 if batch_tokens == 4096 else len(PAIRS) if batch_tokens == 1 else len(told))
    for pair, score in zip(PAIRS, found, strict=True):
        assert score.log_likelihood == pytest.approx(directly(decoder, pair)[0], rel=1e-5)


def test_the_greedy_one_is_called_greedy(make_decoder):
    decoder = make_decoder()
    ids = [3, 5]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(decoder.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[2:4], (ids[4] + 1) % decoder.config.vocab_size]
    first, second = log_likelihoods(decoder, [Pair(ids[:2], ids[2:]), Pair(ids[:2], other)])
    assert first.is_greedy
    assert not second.is_greedy


def test_what_is_too_long_loses_its_front(make_decoder):
    decoder = make_decoder(max_position_embeddings=8)
    long, cut = Pair(list(range(1, 20)), [4, 5]), Pair(list(range(13, 20)), [4, 5])
    assert len(cut.context) + len(cut.continuation) - 1 == 8
    (one,), (other,) = log_likelihoods(decoder, [long]), log_likelihoods(decoder, [cut])
    assert one == other


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (Pair([], [1]), "without any token before it"),
        (Pair([1], [2] * 9), "9 tokens but the model has 8 positions"),
        (Pair([1], [10_000]), "token id 10000 is not among the"),
    ],
)
def test_what_cannot_be_scored_is_refused(make_decoder, pair, said):
    with pytest.raises(UserError, match=said):
        log_likelihoods(make_decoder(max_position_embeddings=8), [pair])
