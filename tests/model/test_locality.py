"""Where experts lie, and the locality loss (LocMoE 2401.13920): values, gradient, parts of a batch, refusals."""

import math

import pytest
import torch

from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.locality import Placement, locality_loss
from moebed.model.losses import load_balancing_loss, router_stats
from moebed.model.routers import cautions
from moebed.parallel.config import ParallelConfig
from moebed.training.module import MoEModule
from tests.conftest import tiny_config
from tests.model.routers.router_cases import config_of

EVERY = torch.ones(32, dtype=torch.bool)


def _even(experts=8):
    return torch.full((32, experts), 1 / experts)


def test_3_7_7_an_even_load_costs_the_coefficient():
    """L_aux = α·E·Σ f_i P_i."""
    alpha = 0.01
    found = alpha * load_balancing_loss(torch.full((8,), 1 / 8), torch.full((8,), 5.0))
    assert found.item() == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize(("nodes", "expected"), [(1, 0.0), (2, 0.5108), (4, 1.1909)])
@pytest.mark.parametrize("on_node", [1, 2])
def test_3_7_8_divergence_where_tokens_go_everywhere(nodes, expected, on_node):
    ranks = nodes * on_node
    for first in range(ranks):
        found = locality_loss(_even(), EVERY, Placement(ranks, on_node, first, 1), 0.1)
        assert found.item() == pytest.approx(expected, abs=5e-5)
    assert locality_loss(_even(), EVERY, Placement(ranks, on_node, 0, ranks), 0.1).item() == pytest.approx(
        expected, abs=5e-5
    )


def test_it_is_zero_where_tokens_go_as_they_were_to():
    probs = torch.tensor([[0.45, 0.45, 0.05, 0.05], [0.05, 0.05, 0.45, 0.45]]).repeat_interleave(16, dim=0)
    assert locality_loss(probs, EVERY, Placement(4, 2, 1, 1)._replace(first=0), 0.1) > 0.5  # half of them are far
    for parts in ((2, 1), (4, 2)):
        placement = Placement(*parts, 0, parts[0])
        assert locality_loss(probs, EVERY, placement, 0.1).item() == pytest.approx(0, abs=1e-6)


def test_3_7_9_a_step_raises_the_mass_that_stays():
    torch.manual_seed(0)
    x, gate, place = torch.randn(32, 16), torch.zeros(8, 16, requires_grad=True), Placement(4, 2, 0, 4)

    def local(gate):
        probs = (x @ gate.T).softmax(-1).view(4, 8, 8)  # rank, token, expert
        return torch.stack([probs[:2, :, :4].sum(-1), probs[2:, :, 4:].sum(-1)]).mean()

    before = local(gate)
    locality_loss((x @ gate.T).softmax(-1), EVERY, place, 0.1).backward()
    with torch.no_grad():
        gate -= 0.5 * gate.grad
    assert local(gate) > before + 0.01


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "relu", "grap", "locmoe_plus", "autonomy"])
def test_every_router_can_be_kept_local(router):
    config = config_of(router, locality_loss_coef=1.0, expert_ranks=2)
    module = MoEModule(config).train()
    ids = torch.randint(0, 96, (4, 10))
    terms = module.losses.terms(ids, ids)
    assert all(0 < layer["locality"] < 5 for layer in terms.router_losses)
    assert all(layer["locality"].dtype == torch.float32 for layer in terms.router_losses)
    sum(layer["locality"] for layer in terms.router_losses).backward()
    grads = [p.grad for p in module.decoder.parameters() if p.grad is not None]
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    assert all(bool(grad.isfinite().all()) for grad in grads)
    module.eval()
    assert all("locality" not in layer for layer in module.losses.terms(ids, ids).router_losses)


def test_one_process_computes_what_ranks_compute():
    """Loss and gradient of a batch in four parts are the mean over four ranks, each with its part."""
    probs = torch.rand(32, 8).softmax(-1)
    mask = torch.rand(32) > 0.2
    config = tiny_config(num_experts=8, expert_ranks=4, ranks_per_node=2)
    whole = probs.clone().requires_grad_()
    found = locality_loss(whole, mask, Placement.of(config), 0.1)
    found.backward()
    parts = [part.clone().requires_grad_() for part in probs.chunk(4)]
    losses = [
        locality_loss(part, some, Placement.of(config, rank, 4), 0.1)
        for rank, (part, some) in enumerate(zip(parts, mask.chunk(4), strict=True))
    ]
    (sum(losses) / 4).backward()
    torch.testing.assert_close(found, sum(losses) / 4)
    torch.testing.assert_close(whole.grad, torch.cat([part.grad for part in parts]))
    by_hand = []
    for rank, (part, some) in enumerate(zip(probs.chunk(4), mask.chunk(4), strict=True)):
        current = part[some].mean(0).view(2, 4).sum(-1).tolist()
        wanted = [0.9, 0.1] if rank < 2 else [0.1, 0.9]
        by_hand.append(sum(p * math.log(p / q) for p, q in zip(current, wanted, strict=True)))
    assert found.item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_ranks_without_a_token_do_not_count():
    probs, mask = torch.rand(32, 4).softmax(-1), EVERY.clone()
    mask[16:] = False
    place = Placement(2, 1, 0, 2)
    alone = locality_loss(probs[:16], EVERY[:16], Placement(2, 1, 0, 1), 0.1)
    torch.testing.assert_close(locality_loss(probs, mask, place, 0.1), alone)
    assert locality_loss(probs, ~EVERY, place, 0.1) == 0


def test_it_stays_float32_under_autocast():
    config = tiny_config(locality_loss_coef=1.0, expert_ranks=2)
    module, ids = MoEModule(config).train(), torch.randint(0, 96, (4, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = module.losses.terms(ids, ids)
    assert all(layer["locality"].dtype == torch.float32 for layer in terms.router_losses)
    assert not bool(router_stats(module.decoder(ids).routings[0], (ids > -1).flatten()).losses)


@pytest.mark.parametrize(
    ("process", "processes", "expected"),
    [(0, 1, (0, 4)), (1, 2, (2, 2)), (3, 4, (3, 1)), (6, 8, (2, 1)), (5, 8, (1, 1))],
)
def test_a_process_stands_for_ranks(process, processes, expected):
    """One for all, for a share, for itself; of more processes than ranks every fourth holds the same experts."""
    config = tiny_config(expert_ranks=4, ranks_per_node=2)
    place = Placement.of(config, process, processes)
    assert (place.first, place.parts, place.nodes) == (*expected, 2)
    decoder = Decoder(config)
    assert [router.token_parts for router in decoder.routers] == [4, 4]
    decoder.stand_for(process, processes)
    assert decoder.placement == place
    assert [router.token_parts for router in decoder.routers] == [expected[1]] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_ranks": 8}, "layer 0 has 4 experts for 8 nodes"),
        ({"expert_ranks": 8, "ranks_per_node": 2}, "expert_ranks is 8; it must divide the 4 experts of layer 0"),
        ({"expert_ranks": 0}, "expert_ranks is 0; it must be at least 1"),
        ({"expert_ranks": 4, "ranks_per_node": 3}, "ranks_per_node is 3; it must divide expert_ranks 4"),
        ({"locality_epsilon": 0.0}, "locality_epsilon is 0.0; it must be above 0, where the loss is infinite"),
        ({"locality_loss_coef": -1.0}, "locality_loss_coef is -1.0; it must not be negative"),
    ],
)
def test_what_cannot_be_local_is_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        tiny_config(**changes)
    assert words in str(caught.value)


def test_layouts_that_do_not_agree_are_refused_and_one_node_is_said():
    config = tiny_config(locality_loss_coef=0.1, expert_ranks=4)
    with pytest.raises(ConfigError, match=r"parallel.expert is 2 but model.config.expert_ranks is 4"):
        ParallelConfig(expert=2).check(2, config)
    ParallelConfig(expert=4).check(4, config)
    ParallelConfig(data=2).check(2, config)
    with pytest.raises(ConfigError, match="expert_ranks is 4, but there are 3 processes"):
        Placement.of(config, 0, 3)
    with pytest.raises(ConfigError, match=r"data.batch_size is 6, and a process stands for 4 of the 4 ranks"):
        Placement.of(config).check_batch(6)
    Placement.of(config, 0, 2).check_batch(6)
    (said,) = cautions(tiny_config(locality_loss_coef=0.1))
    assert "are one node, on which the loss is 0" in said
    assert not cautions(config)
