"""Balancing losses against hand-made cases and against transformers' formula."""

import dataclasses
import math

import pytest
import torch

from moebed.model.losses import load_balancing_loss, router_stats, sequence_balancing_loss, token_losses
from moebed.model.routers import Routing


def _routing(logits: torch.Tensor, top_k: int) -> Routing:
    probs = logits.softmax(-1)
    weight, index = probs.topk(top_k)
    return Routing(logits, probs, index, weight)


def _all(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def test_balanced_is_one():
    logits = torch.eye(4).repeat(3, 1) * 2  # every expert is first choice equally often
    stats = router_stats(_routing(logits, 1), _all(12))
    assert stats.counts.tolist() == [3, 3, 3, 3]
    assert load_balancing_loss(stats.mean_probs, stats.counts).item() == pytest.approx(1.0)


def test_all_on_one_is_the_number_of_experts():
    logits = torch.tensor([[100.0, 0, 0, 0]]).repeat(5, 1)
    stats = router_stats(_routing(logits, 1), _all(5))
    assert load_balancing_loss(stats.mean_probs, stats.counts).item() == pytest.approx(4.0)


def test_gradient_reaches_the_router_and_pushes_to_balance():
    logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1).requires_grad_()
    stats = router_stats(_routing(logits, 1), _all(4))
    load_balancing_loss(stats.mean_probs, stats.counts).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1] < 0).all()


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert router_stats(_routing(logits, 1), _all(2)).z_loss.item() == pytest.approx(expected)


def test_padding_counts_nowhere():
    logits = torch.randn(10, 4)
    mask = torch.arange(10) < 6
    padded, short = router_stats(_routing(logits, 2), mask), router_stats(_routing(logits[:6], 2), _all(6))
    for one, other in zip(padded, short, strict=True):
        torch.testing.assert_close(one, other)


def test_two_sequences_that_specialise():
    """Each all to an expert of its own: even together, as uneven as can be one by one; the covariance is the rest."""
    routing = _routing(torch.tensor([[50.0, 0.0]] * 3 + [[0.0, 50.0]] * 3), 1)
    stats = router_stats(routing, _all(6))
    assert load_balancing_loss(stats.mean_probs, stats.counts).item() == pytest.approx(1.0)
    assert sequence_balancing_loss(routing, _all(6), 2).item() == pytest.approx(2.0)
    f = routing.router_probs.view(2, 3, 2).mean(1)  # the same as P here
    assert 2 * (f * f - f.mean(0).square()).mean(0).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("chosen", [1, 3])
def test_sequence_scope_exceeds_the_whole_by_the_covariance(chosen):
    """Whatever the routing: L_sequence − L = E · Σ_i Cov(f_i, P_i) over sequences of equal length."""
    routing = _routing(torch.randn(5 * 12, 6) + torch.randn(5, 6).repeat_interleave(12, 0), chosen)
    stats = router_stats(routing, _all(60))
    f = torch.stack([torch.bincount(i.flatten(), minlength=6) / (12 * chosen) for i in routing.topk_index.split(12)])
    p = torch.stack([one.mean(0) for one in routing.router_probs.split(12)])
    covariance = (f * p).mean(0) - f.mean(0) * p.mean(0)
    found = sequence_balancing_loss(routing, _all(60), 5) - load_balancing_loss(stats.mean_probs, stats.counts)
    torch.testing.assert_close(found, 6 * covariance.sum())
    assert found > 0.1


def test_sequence_scope_is_deepseek_s():
    """DeepSeekMoE's released MoEGate with seq_aux on, its default, of texts of equal length."""
    routing = _routing(torch.randn(4 * 10, 8), 3)
    rows = routing.topk_index.view(4, -1)
    ce = torch.zeros(4, 8).scatter_add_(1, rows, torch.ones(4, 30)).div_(10 * 3 / 8)
    theirs = (ce * routing.router_probs.view(4, 10, 8).mean(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(sequence_balancing_loss(routing, _all(40), 4), theirs)


def test_padding_leaves_a_sequence_shorter():
    """A sequence weighs as many tokens as it has, and one of padding alone weighs nothing."""
    logits = torch.randn(3 * 8, 4)
    mask = (torch.arange(8) < torch.tensor([8, 4, 0]).unsqueeze(1)).flatten()
    found = sequence_balancing_loss(_routing(logits, 2), mask, 3)
    whole, half = (sequence_balancing_loss(_routing(logits[at], 2), mask[at], 1) for at in (slice(8), slice(8, 12)))
    torch.testing.assert_close(found, (8 * whole + 4 * half) / 12)
    assert sequence_balancing_loss(_routing(logits, 2), torch.zeros(24, dtype=torch.bool), 3) == 0


def test_the_gradient_of_the_sequence_scope_flows_through_probabilities_alone():
    logits = torch.randn(2 * 6, 4, requires_grad=True)
    routing = _routing(logits, 2)
    (found,) = torch.autograd.grad(sequence_balancing_loss(routing, _all(12), 2), logits, retain_graph=True)
    counts = torch.stack([torch.bincount(i.flatten(), minlength=4) / 12 for i in routing.topk_index.split(6)])
    plain = 4 * (counts.repeat_interleave(6, 0) * routing.router_probs / 12).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, logits)[0])


# The balancing losses of others, for one layer: logits (T, E), K.


def _switch(probs, index):
    """Switch Transformer (2101.03961, eq. 4 to 6), K = 1: N · Σ f_i P_i, f the share of tokens."""
    experts = probs.shape[1]
    return experts * (torch.bincount(index[:, 0], minlength=experts) / len(probs) * probs.mean(0)).sum()


def _megatron(probs, index):
    """Megatron-LM's switch_load_balancing_loss_func, without its coefficient: by sums over tokens."""
    (tokens, experts), chosen = probs.shape, index.shape[1]
    count = torch.bincount(index.flatten(), minlength=experts)
    return (probs.sum(0) * count).sum() * experts / (chosen * tokens * tokens)


def _megablocks(probs, index):
    """megablocks' batched_load_balancing_loss of one layer, which trained OLMoE (2409.02060), loss weight 1."""
    (tokens, experts), chosen = probs.shape, index.shape[1]
    scale = experts / (1 * tokens * chosen)
    return scale * torch.dot(torch.bincount(index.flatten(), minlength=experts).float(), probs.mean(0))


def _deepseek(probs, index):
    """DeepSeekMoE's released MoEGate with seq_aux off (2401.06066, eq. 12 to 14): f_i = N / (K T) · count."""
    experts = probs.shape[1]
    mask = torch.nn.functional.one_hot(index.flatten(), experts).float().mean(0)
    return (probs.mean(0) * mask * experts).sum()


@pytest.mark.parametrize(
    ("formula", "chosen"), [(_switch, 1), (_megatron, 1), (_megatron, 3), (_megablocks, 3), (_deepseek, 3)]
)
def test_whose_formula_is_ours(formula, chosen):
    """The table of moebed/model/routers/README.md: these four have our normalisation, whatever K is."""
    routing = _routing(torch.randn(60, 8), chosen)
    stats = router_stats(routing, _all(60))
    ours = load_balancing_loss(stats.mean_probs, stats.counts)
    torch.testing.assert_close(formula(routing.router_probs, routing.topk_index), ours)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_an_exported_coefficient_pulls_in_transformers_as_it_did_here(chosen):
    """The gradient on the router, by transformers' own loss and the coefficient in the exported config."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from moebed.checkpoints.families.registry import family_of
    from tests.conftest import tiny_config

    config = tiny_config(num_experts=8, num_experts_per_tok=chosen, router_aux_loss_coef=0.04)
    logits = torch.randn(40, 8, requires_grad=True)
    stats = router_stats(_routing(logits, chosen), _all(40))
    ours = config.router_aux_loss_coef * load_balancing_loss(stats.mean_probs, stats.counts)
    exported = family_of("mixtral", "family").balancing(config)["router_aux_loss_coef"]
    theirs = exported * load_balancing_loss_func((logits,), 8, chosen)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    deepseek = family_of("deepseek", "family").balancing(config)
    assert deepseek == {"aux_loss_alpha": 0.04, "seq_aux": False}
    by_sequence = dataclasses.replace(config, router_aux_loss_scope="sequence")
    assert family_of("deepseek", "family").balancing(by_sequence) == {"aux_loss_alpha": 0.04, "seq_aux": True}


def test_equals_transformers_formula():
    """transformers pools all layers and does not divide the assignments by K: K times ours when the layer is one."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 8)
    stats = router_stats(_routing(logits, 2), _all(50))
    theirs = load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(2 * load_balancing_loss(stats.mean_probs, stats.counts), theirs)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_equal_cross_entropy(dtype, compiled, monkeypatch):
    """In rows enough for several chunks, with the gradient that autograd finds by itself."""
    if not compiled:  # as on a GPU
        monkeypatch.setattr("moebed.model.native.rowwise.fits", lambda *_: False)
    logits = (torch.randn(3, 70, 2000) * 4).to(dtype).requires_grad_()
    labels = torch.randint(0, 2000, (3, 70)).masked_fill(torch.rand(3, 70) < 0.2, -100)
    expected = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    weight = torch.rand(3, 70)
    (expected_grad,) = torch.autograd.grad((expected.view(3, 70) * weight).sum(), logits)
    losses = token_losses(logits, labels)
    (grad,) = torch.autograd.grad((losses * weight).sum(), logits)
    torch.testing.assert_close(losses, expected.view(3, 70), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [5, 80_000], ids=["PyTorch's", "compiled in C++"])
@pytest.mark.parametrize("label", [-1, -99, "V"])
def test_a_label_that_is_no_token_is_refused(vocabulary, label):
    """It was taken for that of token 0; -1 marks padding elsewhere."""
    labels = torch.tensor([[3, vocabulary if label == "V" else label]])
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_losses(torch.randn(1, 2, vocabulary), labels)


def test_token_losses_leave_out_ignored():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [0, -100, 4]])
    losses = token_losses(logits, labels)
    assert losses[0, 2] == losses[1, 1] == 0
    assert losses[1, 2].item() == pytest.approx(-logits[1, 2].log_softmax(-1)[4].item(), rel=1e-5)
