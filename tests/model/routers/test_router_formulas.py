"""Each router against its formula, on cases worked out by hand or written out plainly."""

import math

import pytest
import torch
import torch.nn.functional as F

from moebed.errors import ConfigError
from moebed.model.routers import Load, TokenContext
from moebed.model.routers.autonomy import matched_width
from moebed.model.routers.competition import coin, mean_cosine
from moebed.model.routers.norms import norms
from tests.model.routers.router_cases import GivenOutputs, config_of, router_of

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-3.0, 0.5, 0.25, 0.0]])


def test_sigmoid_weighs_by_the_score_and_chooses_by_score_and_bias():
    router = router_of("sigmoid_topk")
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    routing = router.choose(LOGITS)
    scores = LOGITS.sigmoid()
    # Expert 3 is the first choice by s + b in both rows, and the last by weight.
    assert routing.topk_index.tolist() == [[0, 3], [1, 3]]
    expected = torch.stack([scores[0, [0, 3]], scores[1, [1, 3]]])
    torch.testing.assert_close(routing.topk_weight, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.router_probs, scores / scores.sum(-1, keepdim=True))
    assert bool((routing.topk_weight.diff(dim=1) <= 0).all())
    raw = router_of("sigmoid_topk", norm_topk_prob=False).choose(LOGITS)
    torch.testing.assert_close(raw.topk_weight, scores.topk(2).values)


def test_softmax_with_a_bias_weighs_by_the_probability_and_chooses_by_it_and_the_bias():
    router = router_of("softmax_bias_topk", router_options={"routed_scaling_factor": 2.0})
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    routing, probs = router.choose(LOGITS), LOGITS.softmax(-1)
    assert routing.topk_index.tolist() == [[0, 3], [1, 3]]
    expected = torch.stack([probs[0, [0, 3]], probs[1, [1, 3]]])
    torch.testing.assert_close(routing.topk_weight, 2 * expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.router_probs, probs)


def test_softmax_may_have_a_bias_that_chooses_and_weighs():
    router = router_of("softmax_topk", router_options={"router_bias": True})
    x = torch.randn(5, router.weight.shape[1])
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))
        routing = router(x, None)
        plain = router_of("softmax_topk")
        plain.weight.copy_(router.weight)
        expected = plain(x, None).router_logits + router.bias
    torch.testing.assert_close(routing.router_logits, expected)
    assert routing.topk_index[:, 0].tolist() == [2] * 5


def test_sparsemixer_weighs_each_among_those_near_it():
    """By hand, and against transformers' function on logits of which many are near each other."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    router = router_of("sparsemixer", router_options={"router_jitter_noise": 0.05})
    routing = router.choose(torch.tensor([[2.0, 1.9, 1.0, 0.95], [3.0, 1.0, -5.0, 0.0]]))
    assert routing.topk_index.tolist() == [[1, 0], [0, 1]]
    # Of the first row 1.9 is near 2, and is alone once that is chosen.
    torch.testing.assert_close(routing.topk_weight, torch.tensor([[1.0, 1 / (1 + math.exp(-0.1))], [1.0, 1.0]]))
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = router.choose(logits)
    weight, index = sparsemixer(logits, 0.05, training=False)
    assert 20 < (weight < 1).sum() < 700
    for row in range(400):
        assert dict(zip(found.topk_index[row].tolist(), found.topk_weight[row].tolist(), strict=True)) == pytest.approx(
            dict(zip(index[row].tolist(), weight[row].tolist(), strict=True))
        )
    gradients = [torch.autograd.grad(one.square().sum(), logits)[0] for one in (found.topk_weight, weight)]
    torch.testing.assert_close(*gradients)


# By the sum of its two best the first group wins, by its best one the second.
GROUPED = torch.tensor([[0.5, 0.4, -5.0, 0.6, -6.0, -7.0]])
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 3.0}


def test_sigmoid_chooses_within_the_groups_whose_two_best_sum_to_most():
    router = router_of("sigmoid_topk", num_experts=6, router_options=GROUPS, norm_topk_prob=False)
    routing = router.choose(GROUPED)
    assert routing.topk_index.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.topk_weight, 3 * GROUPED[:, :2].sigmoid())
    router.expert_bias[4] = 2.0
    assert router.choose(GROUPED).topk_index.tolist() == [[3, 4]]


@pytest.mark.parametrize("normed", [False, True])
def test_group_limited_chooses_within_the_groups_whose_best_is_most(normed):
    router = router_of("group_limited_topk", num_experts=6, router_options=GROUPS, norm_topk_prob=normed)
    routing, probs = router.choose(GROUPED), GROUPED.softmax(-1)
    assert routing.topk_index.tolist() == [[3, 4]]
    weight = probs[:, [3, 4]]
    torch.testing.assert_close(routing.topk_weight, 3 * (weight / weight.sum() if normed else weight))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sigmoid_topk", {"n_group": 3}, "n_group is 3"),
        ("group_limited_topk", {"n_group": 2, "topk_group": 3}, "topk_group is 3"),
        ("group_limited_topk", {"n_group": 4, "topk_group": 1}, "4 experts, 2 of them a token"),
    ],
)
def test_groups_that_do_not_fit_are_refused(name, options, said):
    with pytest.raises(ConfigError, match=said):
        config_of(name, router_options=options)


def test_sigmoid_never_chooses_a_masked_expert_whatever_its_bias():
    router = router_of("sigmoid_topk")
    router.expert_bias[1] = 100.0
    assert 1 not in router.choose(LOGITS.index_fill(1, torch.tensor(1), -torch.inf)).topk_index


def test_sigmoid_bias_moves_by_the_sign_of_what_is_missing():
    router = router_of("sigmoid_topk", router_options={"bias_update_rate": 0.5})
    router.end_step(Load(torch.tensor([10.0, 2.0, 4.0, 0.0]), torch.tensor(1.0)))
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.5]
    router.end_step(Load(torch.tensor([10.0, 0.0, 10.0, 0.0]), torch.tensor(1.0)))
    assert router.expert_bias.tolist() == [-1.0, 1.0, -0.5, 1.0]


def _outputs(tokens=6, experts=4, hidden=5):
    return torch.randn(tokens, experts, hidden, requires_grad=True)


def test_expert_norm_is_a_softmax_over_the_chosen_norms():
    outputs = _outputs()
    routing = router_of("expert_norm")(torch.randn(6, 32), GivenOutputs(outputs))
    norms = outputs.norm(dim=-1)
    value, index = norms.topk(2)
    assert torch.equal(routing.topk_index, index)
    torch.testing.assert_close(routing.topk_weight, value.softmax(-1))
    torch.testing.assert_close(routing.router_probs, norms.softmax(-1))
    for token in range(6):
        assert torch.equal(routing.precomputed[token], outputs[token, index[token]])


def test_norms_have_the_gradient_of_norms():
    """x / ‖x‖, of whatever the values are in; 0 where the norm is, at which PyTorch's is not a number."""
    values = (torch.randn(5, 3, 16) * torch.logspace(-2, 2, 5).view(5, 1, 1)).requires_grad_()
    grad = torch.randn(5, 3)
    found, expected = norms(values), torch.linalg.vector_norm(values, dim=-1)
    torch.testing.assert_close(found, expected)
    (wanted,) = torch.autograd.grad(expected, values, grad)
    torch.testing.assert_close(torch.autograd.grad(found, values, grad)[0], wanted)
    nothing = torch.zeros(2, 4, requires_grad=True)
    assert torch.equal(torch.autograd.grad(norms(nothing).sum(), nothing)[0], torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["competesmoe", "competesmoe_v2"])
def test_competition_teaches_the_gate_and_leaves_the_experts_to_the_task(name):
    router, x, outputs = router_of(name), torch.randn(6, 32), _outputs()
    routing = router(x, GivenOutputs(outputs))
    gate = F.linear(x, router.weight).softmax(-1)
    response = outputs.norm(dim=-1) if name == "competesmoe" else F.softplus(outputs).mean(-1)
    value, index = response.topk(2)
    assert torch.equal(routing.topk_index, index)
    weight = value.softmax(-1) if name == "competesmoe" else value / value.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.topk_weight, weight)
    taught = response.softmax(-1)
    torch.testing.assert_close(routing.losses["router_competition"], (gate - taught).square().mean(-1))
    lesson = routing.losses["router_competition"].sum() + sum(
        value.sum() for key, value in routing.losses.items() if key == "router_winners"
    )
    of_gate, of_experts = torch.autograd.grad(lesson, [router.weight, outputs], allow_unused=True, retain_graph=True)
    assert of_gate.abs().sum() > 0
    assert of_experts is None
    assert torch.autograd.grad(routing.topk_weight[:, 0].sum(), outputs)[0].abs().sum() > 0


def test_version_two_counts_winners_again_and_keeps_them_apart():
    router, x, outputs = (
        router_of("competesmoe_v2", router_options={"winners_weight": 0.2}),
        torch.randn(6, 32),
        _outputs(),
    )
    routing = router(x, GivenOutputs(outputs))
    gate, taught = F.linear(x, router.weight).softmax(-1), F.softplus(outputs).mean(-1).softmax(-1)
    for token in range(6):
        a, b = routing.topk_index[token].tolist()
        winners = ((gate - taught)[token, [a, b]] ** 2).mean()
        torch.testing.assert_close(routing.losses["router_winners"][token], winners)
        cosine = F.cosine_similarity(outputs[token, a], outputs[token, b], dim=0)
        torch.testing.assert_close(routing.losses["winner_similarity"][token], cosine)
    coefficients = router.loss_coefficients()
    assert coefficients["router_winners"] == pytest.approx(0.2 * coefficients["router_competition"])


def test_mean_cosine_leaves_out_the_diagonal():
    vectors = torch.randn(3, 4, 7)
    cosines = F.cosine_similarity(vectors.unsqueeze(1), vectors.unsqueeze(2), dim=-1)
    expected = (cosines.sum((1, 2)) - 4) / 12
    torch.testing.assert_close(mean_cosine(vectors), expected)
    assert mean_cosine(vectors[:, :1]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["competesmoe", "competesmoe_v2"])
def test_weights_and_experts_of_a_competition_are_in_the_same_order(name):
    """Weight k belongs to expert k: with one expert's output known by its size, the sum shows it."""
    outputs = torch.eye(4).expand(1, 4, 4) * torch.tensor([1.0, 3.0, 2.0, 4.0]).view(1, 4, 1)
    routing = router_of(name)(torch.randn(1, 32), GivenOutputs(outputs))
    assert routing.topk_index.tolist() == [[3, 1]]  # not in the order of their numbers
    assert routing.topk_weight[0, 0] > routing.topk_weight[0, 1]
    assert routing.precomputed[0].argmax(-1).tolist() == [3, 1]


def test_evaluation_and_other_steps_run_no_experts():
    router, x = router_of("competesmoe"), torch.randn(5, 32)
    router.eval()
    expected = F.linear(x, router.weight).softmax(-1).topk(2).indices
    assert torch.equal(router(x, None).topk_index, expected)
    router.train()
    router.competes = False
    assert router(x, None).losses is None


def test_the_coin_is_a_function_of_seed_step_and_layer():
    drawn = [[coin(0, step, layer, 0.07) for step in range(4000)] for layer in range(2)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != [coin(1, step, 0, 0.07) for step in range(4000)]
    for flips in drawn:  # within four standard deviations of r
        assert abs(sum(flips) / 4000 - 0.07) < 4 * math.sqrt(0.07 * 0.93 / 4000)
    assert not any(coin(0, step, 0, 0.0) for step in range(50))
    assert all(coin(0, step, 0, 1.0) for step in range(50))


def test_autonomy_chooses_by_the_norms_of_the_experts_own_projections():
    router, x = router_of("autonomy"), torch.randn(6, 32)
    routing = router(x, None)
    low = torch.stack([x @ router.low_proj[e].T for e in range(4)], dim=1)  # (T, E, C)
    probs = low.norm(dim=-1).softmax(-1)
    value, index = probs.topk(2)
    assert torch.equal(routing.topk_index, index)
    torch.testing.assert_close(routing.topk_weight, value)  # not renormalised
    for token in range(6):
        torch.testing.assert_close(routing.precomputed[token], low[token, index[token]])


def test_autonomy_computes_the_papers_expert():
    from moebed.model.decoder import MoE

    config = config_of("autonomy")
    moe = MoE(config, config.layer(0))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 32)
    out, routing = moe(x)
    gate, up, down = (moe.experts.matrix(name) for name in ("gate", "up", "down"))
    expected = torch.zeros_like(x)
    for token in range(7):
        for weight, e in zip(routing.topk_weight[token], routing.topk_index[token], strict=True):
            c = moe.router.low_proj[e] @ x[token]
            expected[token] += weight * (down[e] @ (F.silu(gate[e] @ c) * (up[e] @ x[token])))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moe.experts.expert_matrix("gate", 2), gate[2] @ moe.router.low_proj[2])
    torch.testing.assert_close(moe.experts.mean_neurons()["gate"][2], (gate[2] @ moe.router.low_proj[2]).mean(dim=0))
    assert routing.precomputed is None  # what is kept of a forward pass holds no memory of their size
    torch.testing.assert_close(moe.combine(x, routing), out)  # and what it lacks is computed once more


def test_matched_width_keeps_the_parameters():
    hidden, width, low = 96, 128, 32
    wide = matched_width(hidden, width, low)
    plain, factorised = 3 * hidden * width, low * hidden + wide * (low + 2 * hidden)
    assert abs(factorised - plain) <= low + 2 * hidden


def test_relu_weighs_by_the_positive_logits_and_takes_as_many():
    router = router_of("relu")
    routing = router.choose(LOGITS)
    assert routing.topk_weight.tolist() == [[2.0, 1.0], [0.5, 0.25]]  # the third column is empty
    assert routing.topk_index.tolist() == [[0, 1], [1, 2]]
    assert routing.losses["relu_l1"].tolist() == [3.0, 0.75]
    torch.testing.assert_close(routing.router_probs[0], torch.tensor([2 / 3, 1 / 3, 0, 0]))
    none = router.choose(torch.full((2, 4), -1.0))
    assert none.topk_weight.tolist() == [[0.0], [0.0]]
    assert not none.assigned.any()
    assert bool(none.router_probs.isfinite().all())
    evaluated = router.eval().choose(LOGITS)
    assert evaluated.topk_weight.tolist() == [[2.0, 1.0, 0, 0], [0.5, 0.25, 0, 0]]
    assert evaluated.losses is None


def test_relu_coefficient_follows_the_sparsity():
    router = router_of("relu", router_options={"l1_coef": 1e-8})
    for density, expected in ((2.0, 1.2e-8), (1.5, 1.44e-8), (0.5, 1.2e-8), (1.0, 1.2e-8)):
        router.end_step(Load(torch.zeros(4), torch.tensor(density)))
        assert router.loss_coefficients()["relu_l1"].item() == pytest.approx(expected, rel=1e-5)


def test_factorised_gate_is_its_product():
    router, x = router_of("factorised_gate"), torch.randn(6, 32)
    assert router.low_proj.numel() == router_of("autonomy").low_proj.numel()
    torch.testing.assert_close(router(x, None).router_logits, x @ router.gate().T, rtol=1e-4, atol=1e-4)


def test_hash_depends_on_the_id_and_the_layer_alone():
    config = config_of("hash", num_experts=8)
    first, second = (type(router_of("hash"))(config, config.layer(layer)) for layer in range(2))
    ids = TokenContext(torch.arange(3000))
    routing = first(torch.randn(3000, 32), None, ids)
    assert torch.equal(routing.topk_index, first(torch.randn(3000, 32), None, ids).topk_index)
    assert not torch.equal(routing.topk_index, second(torch.randn(3000, 32), None, ids).topk_index)
    turned = first(torch.randn(3000, 32), None, TokenContext(ids.ids.flip(0)))  # the place is not the id
    assert torch.equal(turned.topk_index, routing.topk_index.flip(0))
    other = type(first)(config_of("hash", num_experts=8, router_options={"seed": 1}), config.layer(0))
    assert not torch.equal(routing.topk_index, other(torch.randn(3000, 32), None, ids).topk_index)
    assert bool((routing.topk_index[:, 0] != routing.topk_index[:, 1]).all())
    assert bool((routing.topk_weight == 0.5).all())
    # Every expert and every pair of experts is about as frequent: χ² below its .9999 quantile of 27 and of 7 degrees.
    counts = torch.bincount(routing.topk_index.flatten(), minlength=8).double()
    assert ((counts - 750) ** 2 / 750).sum() < 29.9
    pairs = routing.topk_index.sort(-1).values
    counts = torch.bincount(pairs[:, 0] * 8 + pairs[:, 1]).double()
    counts = counts[counts > 0]
    assert len(counts) == 28
    assert ((counts - 3000 / 28) ** 2 / (3000 / 28)).sum() < 64


def test_balanced_gives_every_expert_the_same():
    routing = router_of("balanced", num_experts=6)(torch.randn(9, 32), None)
    assert torch.bincount(routing.topk_index.flatten(), minlength=6).tolist() == [3] * 6
    assert routing.topk_index[:3].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_random_is_a_gate_that_does_not_learn():
    router, x = router_of("random"), torch.randn(6, 32)
    assert not router.weight.requires_grad
    assert torch.equal(router(x, None).topk_index, F.linear(x, router.weight).topk(2).indices)
