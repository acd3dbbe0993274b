"""Experts of a document: who shares them, when there are none, and that the draw is of no layout."""

import pytest
import torch

from moebed.data.loader import documents_of_tokens
from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.generate import generate
from moebed.model.routers import TokenContext, cautions
from tests.model.routers.router_cases import config_of, router_of

END, SHAPE = 7, (40, 12)
IDS = torch.randint(0, 30, SHAPE, generator=torch.Generator().manual_seed(1))
DOCUMENT = documents_of_tokens(IDS, END)


def pooled(least=None, most=None, rows=slice(None), **changes):
    """The decision of the router alone, and the router."""
    router = router_of("document_pool", router_options={"least_pool": least, "most_pool": most}, num_experts=8)
    for name, value in changes.items():
        setattr(router, name, value)
    router.begin_step(int(router.optimizer_step))
    hidden = torch.randn(*SHAPE, 32, generator=torch.Generator().manual_seed(2))[rows]
    document = documents_of_tokens(IDS[rows], END)
    context = TokenContext.of_batch(IDS[rows], document=document).changed(torch.flatten)
    return router(hidden.flatten(0, 1), None, context)


def test_documents_end_where_the_text_says():
    ids = torch.tensor([[5, END, 5, 5], [END, END, 5, END]])
    assert documents_of_tokens(ids, END).tolist() == [[0, 0, 1, 1], [4, 5, 6, 6]]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_pool_of_all_experts_is_plain_top_k_bit_for_bit():
    found = pooled(8, 8)
    torch.manual_seed(0)
    plain = router_of("softmax_topk", num_experts=8)
    hidden = torch.randn(*SHAPE, 32, generator=torch.Generator().manual_seed(2))
    for one, other in zip(found[:4], plain(hidden.flatten(0, 1), None)[:4], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [2, 5])
def test_tokens_of_a_document_keep_to_its_pool(size):
    """With K experts in it, one set for each document; with more, each token chooses."""
    routing, document = pooled(size, size), DOCUMENT.flatten()
    sets = [set(routing.topk_index[document == number].flatten().tolist()) for number in document.unique().tolist()]
    assert all(2 <= len(found) <= size for found in sets)
    assert (max(map(len, sets)) > 2) == (size > 2)
    assert len(set(map(frozenset, sets))) > 1
    inside = (routing.router_probs > 0).sum(dim=-1)
    assert bool((inside == size).all())
    torch.testing.assert_close(routing.router_probs.sum(dim=-1), torch.ones(IDS.numel()))


def test_the_pool_is_of_the_largest_sums_and_its_size_is_drawn_evenly():
    router = router_of("document_pool", num_experts=8)
    probs, document = torch.rand(IDS.numel(), 8), DOCUMENT.flatten()
    pool, sizes = router.pools(probs, document), router.drawn_sizes(IDS.numel(), probs.device)
    for number in document.unique().tolist():
        of_it = document == number
        best = probs[of_it].sum(dim=0).topk(int(sizes[number])).indices
        assert pool[of_it][0].nonzero().flatten().tolist() == sorted(best.tolist())
    many = router.drawn_sizes(70_000, probs.device)
    assert torch.bincount(many, minlength=9).tolist()[:2] == [0, 0]
    assert bool(((torch.bincount(many)[2:] - 10_000).abs() < 500).all())


def test_any_layout_draws_the_same_and_each_step_and_layer_anew():
    whole = pooled().topk_index.view(*SHAPE, 2)
    for changes in ({"micro_batch": 1}, {"rank": 1, "ranks": 2}):
        torch.manual_seed(0)
        half = pooled(rows=slice(20, 40), **changes).topk_index.view(20, 12, 2)
        assert torch.equal(half, whole[20:])
    for micro, rank, part in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)):  # of two micro-batches on two ranks
        torch.manual_seed(0)
        rows = slice(10 * part, 10 * part + 10)
        quarter = pooled(rows=rows, micro_batch=micro, rank=rank, ranks=2).topk_index.view(10, 12, 2)
        assert torch.equal(quarter, whole[rows])
    for changes in ({"optimizer_step": 1}, {"layer": 1}):
        torch.manual_seed(0)
        assert not torch.equal(pooled(**changes).topk_index.view_as(whole), whole)


def test_evaluation_and_generation_know_no_document():
    decoder = Decoder(config_of("document_pool", num_experts_per_tok=1)).eval()
    with torch.no_grad():
        logits = decoder(IDS).logits
        assert torch.equal(decoder(IDS, document=DOCUMENT).logits, logits)
        assert generate(decoder, IDS[:2, :4], 3, temperature=0).shape == (2, 7)
        decoder.train()
        assert torch.equal(decoder(IDS).logits, logits)
        assert not torch.equal(decoder(IDS, document=DOCUMENT).logits, logits)


def test_what_does_not_fit_is_said():
    with pytest.raises(ConfigError, match=r"pools of 1 to 4 experts .* must lie between num_experts_per_tok 2 and"):
        config_of("document_pool", router_options={"least_pool": 1})
    (said,) = [text for text in cautions(config_of("document_pool", router_aux_loss_coef=0.1)) if "document" in text]
    assert "router_aux_loss_scope micro works against" in said
    assert not any("scope" in text for text in cautions(config_of("document_pool", router_aux_loss_scope="window")))
