"""Importance of neurons from text: streamed gradients are those of autograd on the whole model."""

import numpy as np
import pytest
import torch
from dense_sources import SOURCES, write_dense

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints.whole import write_checkpoint
from moebed.upcycling import text as text_module
from moebed.upcycling.importance import importance_of
from moebed.upcycling.text import TextWalk
from moebed.views.layer import ProbeText

LENGTHS = (9, 4, 12, 7)


def _text(lengths=LENGTHS, domain=None, vocabulary=64):
    """Sequences padded with a token that would change everything."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(vocabulary, mask.shape, generator=torch.Generator().manual_seed(4))
    domain = torch.zeros(len(lengths), dtype=torch.int64) if domain is None else torch.tensor(domain)
    names = tuple(f"d{i}" for i in range(int(domain.max()) + 1))
    return ProbeText(ids, mask, domain, names)


def _by_autograd(decoder, text, clusters):
    """Mean of |h · ∂L/∂h| over the tokens of each domain that predict one: (L, E, D), one sequence after another."""
    caught = []

    def catch(_, given):
        given[0].retain_grad()
        caught.append(given[0])

    for block in decoder.blocks:
        block.mlp.down_proj.register_forward_pre_hook(catch)
    total, spans = 0, []
    for row, length in enumerate(text.token_mask.sum(dim=1).tolist()):
        ids = text.input_ids[row : row + 1, :length]
        logits = decoder(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        spans.append((int(text.domain[row]), length - 1))
    (total / sum(length for _, length in spans)).backward()
    depth, width = len(decoder.blocks), caught[0].shape[-1]
    sums, counts = torch.zeros(depth, clusters, width), torch.zeros(clusters)
    for row, (domain, length) in enumerate(spans):
        counts[domain] += length
        for layer in range(depth):
            h = caught[row * depth + layer]
            sums[layer, domain] += (h * h.grad).abs()[0, :length].sum(dim=0)
    return sums / counts[:, None]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("lengths", [(2,), LENGTHS])
def test_1_8_4_importance_is_h_times_its_gradient(tmp_path, source, lengths):
    """Of a batch of two tokens, and of sequences with padding, which is left out."""
    dense = write_dense(tmp_path, source)
    domain = [0] * len(lengths) if len(lengths) == 1 else [0, 1, 1, 0]
    text = _text(lengths, domain)
    clusters = max(domain) + 1
    wanted = _by_autograd(load_decoder(dense).eval(), text, clusters)
    found = importance_of(TextWalk(Checkpoint.open(dense), text), (0, 1), clusters, by_domain=True, seed=0)
    for layer in (0, 1):
        torch.testing.assert_close(found[layer].importance, wanted[layer], rtol=1e-3, atol=1e-7)
        assert wanted[layer].max() > 1e-4
    other = ProbeText(text.input_ids.where(text.token_mask, 63), text.token_mask, text.domain, text.domains)
    again = importance_of(TextWalk(Checkpoint.open(dense), other), (0, 1), clusters, by_domain=True, seed=0)
    assert torch.equal(again[1].importance, found[1].importance)


@pytest.mark.parametrize("limit", [1, 300])
def test_1_8_4_it_does_not_matter_how_many_tokens_are_worked_on_at_a_time(tmp_path, monkeypatch, limit):
    source, text = Checkpoint.open(write_dense(tmp_path)), _text(domain=[0, 1, 0, 1])
    whole = importance_of(TextWalk(source, text), (0, 1), 2, by_domain=True, seed=0)
    monkeypatch.setattr(text_module, "_ACTIVATIONS", limit)
    monkeypatch.setattr(text_module, "_LOGITS", limit)
    parts = importance_of(TextWalk(source, text), (0, 1), 2, by_domain=True, seed=0)
    for layer in (0, 1):
        torch.testing.assert_close(parts[layer].importance, whole[layer].importance, rtol=1e-4, atol=1e-8)


def test_1_8_4_a_neuron_that_carries_the_label_is_the_most_important(tmp_path):
    """Every next token is 7; one neuron of the last layer writes the head's row of 7, and no other does."""
    decoder = load_decoder(write_dense(tmp_path, "llama", tie_word_embeddings=False))
    planted = 19
    with torch.no_grad():
        row = torch.nn.functional.normalize(decoder.lm_head.weight[7], dim=0)
        down = decoder.blocks[-1].mlp.down_proj.weight
        down -= torch.outer(row, row @ down)
        down[:, planted] = 3 * row
    folder = write_checkpoint(decoder, "llama", tmp_path / "planted", torch.float32)
    ids = torch.randint(64, (6, 20), generator=torch.Generator().manual_seed(1))
    ids[:, 1:] = 7
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(6, dtype=torch.int64))
    found = importance_of(TextWalk(Checkpoint.open(folder), text), (1,), 1, by_domain=True, seed=0)
    assert set(found) == {1}
    assert found[1].importance[0].argmax() == planted


def test_tokens_are_told_apart_by_centroids_of_each_layer(tmp_path):
    source = Checkpoint.open(write_dense(tmp_path))
    text = _text((30,) * 8)
    found = importance_of(TextWalk(source, text), (0, 1), 3, by_domain=False, seed=0)
    walk = TextWalk(source, text)
    hidden, block = walk.embed(), walk.block(0)
    x = block.pre_ffn_norm(walk.attend(block, hidden))
    cluster = (x @ found[0].centroids.T).argmax(dim=1)
    assert found[0].importance.shape == (3, 48)
    assert not torch.equal(found[0].centroids, found[1].centroids)
    # As if the clusters were domains of single tokens: their weighted sum is that of all tokens in one.
    counted = cluster[walk.targets >= 0]
    share = torch.bincount(counted, minlength=3) / len(counted)
    together = importance_of(TextWalk(source, text), (0,), 1, by_domain=True, seed=0)[0].importance[0]
    torch.testing.assert_close((share[:, None] * found[0].importance).sum(dim=0), together, rtol=1e-3, atol=1e-7)


def test_centroids_of_domains_are_means_of_their_tokens(tmp_path):
    source, text = Checkpoint.open(write_dense(tmp_path)), _text(domain=[0, 1, 1, 0])
    walk = TextWalk(source, text)
    found = importance_of(walk, (0,), 2, by_domain=True, seed=0)
    block = walk.block(0)
    x = block.pre_ffn_norm(walk.attend(block, walk.embed()))
    domain = text.domain[text.sequence]
    for index in range(2):
        torch.testing.assert_close(found[0].centroids[index], x[domain == index].mean(dim=0))


def test_what_enters_the_layers_may_lie_in_a_file(tmp_path, monkeypatch):
    from moebed.machine import mapped

    source, text = Checkpoint.open(write_dense(tmp_path)), _text(domain=[0, 1, 0, 1])
    wanted = importance_of(TextWalk(source, text), (0, 1), 2, by_domain=True, seed=0)
    monkeypatch.setattr(mapped, "_SPILLED", 100)
    found = importance_of(TextWalk(source, text), (0, 1), 2, True, 0, scratch=tmp_path / "scratch")
    assert all(torch.equal(found[layer].importance, wanted[layer].importance) for layer in (0, 1))
    assert not list((tmp_path / "scratch").iterdir())
    assert np.isfinite(wanted[0].importance.numpy()).all()


def test_a_cluster_that_no_product_chooses_keeps_its_tokens(tmp_path, monkeypatch):
    """Of equal centroids the first one has every token."""
    from moebed.upcycling import importance

    source, text = Checkpoint.open(write_dense(tmp_path)), _text((30,) * 8)
    nearest = torch.arange(240) % 2
    monkeypatch.setattr(importance, "token_clusters", lambda x, groups, draws: (nearest, x[:1].repeat(2, 1)))
    found = importance_of(TextWalk(source, text), (0,), 2, by_domain=False, seed=0)
    assert found[0].note.startswith("layer 0: by products with the centroids some text cluster had no token")
    assert (found[0].importance.sum(dim=1) > 0).all()
    assert not torch.equal(*found[0].importance)
