"""LocMoE's router and LocMoE+'s expert choice (2401.13920, 2406.00023), against plain loops and worked cases."""

import math

import pytest
import torch

from moebed.errors import ConfigError, UserError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.routers import Load, TokenContext, cautions
from moebed.model.routers.grap import block_means, first_weight
from moebed.model.routers.locmoe_plus import choosing_tokens
from tests.conftest import tiny_config
from tests.model.routers.router_cases import config_of, router_of

TOKENS = 64


def _x(tokens=TOKENS, seed=0):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def _affinity(x, router):
    omega = router.gate()
    return (x @ omega.T) / (x.norm(dim=1, keepdim=True) * omega.norm(dim=1))


def _kept(routing, experts=4):
    """(T, E), which assignments stand."""
    return torch.zeros(len(routing.topk_index), experts).scatter(1, routing.topk_index, routing.assigned.float()).bool()


def test_3_7_1_rows_are_orthogonal():
    for experts, hidden in ((4, 32), (8, 384), (16, 5120)):
        omega = block_means(experts, hidden)
        torch.testing.assert_close(omega @ omega.T, torch.eye(experts) * experts / hidden)
    assert torch.equal(router_of("grap").gate(), block_means(4, 32))


def test_3_7_2_logits_are_block_means():
    x, router = _x(), router_of("grap", num_experts_per_tok=1)
    routing = router(x, None)
    for token in range(4):
        for expert in range(4):
            mean = x[token, 8 * expert : 8 * expert + 8].mean()
            torch.testing.assert_close(routing.router_logits[token, expert], mean)
    rectified = routing.router_logits.relu()
    torch.testing.assert_close(routing.router_probs, rectified.softmax(-1))
    torch.testing.assert_close(routing.topk_weight, routing.router_probs.amax(-1, keepdim=True))  # not 1
    assert torch.equal(routing.topk_index, routing.router_logits.argmax(-1, keepdim=True))
    warm = router_of("grap", router_options={"softmax_temperature": 0.25})(x, None)
    torch.testing.assert_close(warm.router_probs, (4 * rectified).softmax(-1))
    assert torch.equal(warm.router_logits, routing.router_logits)
    summed = router_of("grap", norm_topk_prob=True)(x, None).topk_weight.sum(-1)
    torch.testing.assert_close(summed, torch.ones(TOKENS))


def test_where_no_mean_is_positive_the_mean_before_relu_decides():
    """By argmax of ReLU it were always expert 0."""
    routing = router_of("grap").choose(torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-1.0, 0.5, -0.2, -0.1]]))
    assert routing.topk_index.tolist() == [[1, 2], [1, 3]]
    torch.testing.assert_close(routing.router_probs[0], torch.full((4,), 0.25))
    negative = -_x().abs()
    assert router_of("grap")(negative, None).topk_index[:, 0].bincount(minlength=4).min() > 0


def test_3_7_3_experts_that_do_not_divide_the_channels_are_refused():
    for name in ("grap", "locmoe_plus"):
        with pytest.raises(ConfigError, match="hidden_size 32 is not divisible by the 6 experts of layer 0"):
            tiny_config(router=name, num_experts=6)
    tiny_config(router="grap", num_experts=[0, 8], num_experts_per_tok=[0, 1], intermediate_size=8)


def test_3_7_4_squared_cosines_sum_to_one_at_most():
    x, router = _x(1000), router_of("grap")
    squares = _affinity(x, router).square().sum(-1)
    assert squares.min() > 0
    assert squares.max() <= 1
    flat = torch.ones(1, 32)  # lies in the span of the rows
    torch.testing.assert_close(_affinity(flat, router).square().sum(), torch.tensor(1.0))


def test_it_is_said_how_quiet_the_layer_begins():
    """1.16 / E at hidden 384 and 8 experts, which random inputs of RMS 1 show too; .05 off at most elsewhere."""
    assert first_weight(384, 8) * 8 == pytest.approx(1.16, abs=0.005)
    for hidden, experts, temperature in ((384, 8, 1.0), (5120, 16, 1.0), (128, 32, 1.0), (384, 8, 0.3)):
        means = torch.randn(4000, experts, hidden // experts).mean(-1)
        shown = (means.relu() / temperature).softmax(-1).amax(-1).mean() * experts
        assert first_weight(hidden, experts, temperature) * experts == pytest.approx(float(shown), rel=0.05)
    sizes = {"hidden_size": 384, "num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    (said,) = cautions(ModelConfig(router="grap", **sizes))
    assert "a weight of about 1.16 / E = 0.14" in said
    assert cautions(ModelConfig(router="grap", norm_topk_prob=True, **sizes)) == []


def test_jitter_is_of_training_alone_and_follows_from_step_layer_and_token():
    x, ids = _x(), torch.arange(TOKENS) % 40
    router = router_of("grap", router_options={"jitter": 0.5})
    plain = router_of("grap")(x, None).router_logits

    def noise(step, tokens=slice(None)):
        router.begin_step(step)
        return router(x[tokens], None, TokenContext(ids[tokens])).router_logits - plain[tokens]

    first = noise(3)
    assert -0.5 <= first.min() < -0.45
    assert 0.45 < first.max() <= 0.5
    assert abs(first.mean()) < 0.1
    assert not torch.equal(first, noise(4))
    torch.testing.assert_close(noise(3, slice(20, 40)), first[20:40])  # as another rank sees a part of the batch
    torch.testing.assert_close(first[:24], first[40:])  # of equal ids
    config = config_of("grap", router_options={"jitter": 0.5})
    other = type(router)(config, config.layer(1)).train()
    other.begin_step(3)
    assert not torch.allclose(other(x, None, TokenContext(ids)).router_logits - plain, first)
    assert torch.equal(router.eval()(x, None, TokenContext(ids)).router_logits, plain)
    assert not router.state_dict()  # the step says it all
    with pytest.raises(TypeError, match="needs a TokenContext"):
        router.train()(x, None)


@pytest.mark.parametrize("top_k", [1, 2])
def test_3_7_10_room_for_all_tokens_is_token_choice(top_k):
    x = _x()
    chosen = router_of("grap", num_experts_per_tok=top_k)(x, None)
    for factor in (4 / top_k, 100.0):  # C of all tokens, and more
        options = {"capacity_factor": factor}
        routing = router_of("locmoe_plus", num_experts_per_tok=top_k, router_options=options)(x, None)
        assert routing.ragged
        for name in ("router_logits", "router_probs", "topk_index", "topk_weight"):
            assert torch.equal(getattr(routing, name), getattr(chosen, name)), name


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.66, 1.1])
@pytest.mark.parametrize("ranks", [1, 4])
def test_3_7_11_no_expert_keeps_more_than_its_room_and_the_nearest(top_k, factor, ranks):
    options = {"capacity_factor": factor}
    sizes = {"num_experts_per_tok": top_k, "expert_ranks": ranks}
    router = router_of("locmoe_plus", router_options=options, **sizes)
    x = _x()
    x[:, :8] += 0.3  # more tokens choose the first expert than it has room for
    routing, chosen = router(x, None), router_of("grap", num_experts_per_tok=top_k)(x, None)
    kept, chose, affinity = _kept(routing), _kept(chosen), _affinity(x, router)
    room = math.ceil(factor * (TOKENS // ranks) * top_k / 4)
    assert bool((kept <= chose).all())
    assert bool((kept < chose).any())
    for part in torch.arange(TOKENS).chunk(ranks):
        for expert in range(4):
            stays = affinity[part][kept[part, expert], expert]
            goes = affinity[part][(chose & ~kept)[part, expert], expert]
            assert len(stays) == min(room, int(chose[part, expert].sum()))
            if len(goes) and len(stays):
                assert stays.min() >= goes.max()
    weights = torch.zeros(TOKENS, 4).scatter(1, chosen.topk_index, chosen.topk_weight)
    torch.testing.assert_close(
        torch.zeros(TOKENS, 4).scatter(1, routing.topk_index, routing.topk_weight), weights * kept
    )
    assert bool((routing.topk_weight.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_experts_keep_the_fewest_tokens_with_that_share_of_the_cosines(share):
    router, x = router_of("locmoe_plus", num_experts_per_tok=1, router_options={"affinity_share": share}), _x()
    kept, chose = _kept(router(x, None)), _kept(router_of("grap", num_experts_per_tok=1)(x, None))
    affinity = _affinity(x, router)
    for expert in range(4):
        values = affinity[chose[:, expert], expert].clamp_min(0).sort(descending=True).values.tolist()
        room, reached = 0, 0.0
        while reached < share * sum(values) - 1e-9:
            reached += values[room]
            room += 1
        assert int(kept[:, expert].sum()) == room


def test_evaluation_is_by_token_choice_and_causal():
    """What a token is sent to depends on no later token, as it does in training."""
    options = {"capacity_factor": 0.5}
    decoder = Decoder(config_of("locmoe_plus", router_options=options))
    ids = torch.randint(0, 96, (1, 24))
    other = torch.cat([ids[:, :12], torch.randint(0, 96, (1, 12))], dim=1)

    def first_half(tokens):
        return decoder(tokens).logits[:, :12]

    assert not torch.allclose(first_half(ids), first_half(other))  # training leaks
    decoder.eval()
    torch.testing.assert_close(first_half(ids), first_half(other))
    assert all(bool(routing.assigned.all()) for routing in decoder(ids).routings)
    with choosing_tokens(decoder.routers):
        assert not torch.allclose(first_half(ids), first_half(other))
        assert not all(bool(routing.assigned.all()) for routing in decoder(ids).routings)
    assert all(bool(routing.assigned.all()) for routing in decoder(ids).routings)


def test_a_token_that_nobody_keeps_passes_through_the_residual_alone():
    decoder = Decoder(config_of("locmoe_plus", num_experts_per_tok=1, router_options={"affinity_share": 0.3})).train()
    moe, x = decoder.layers[0].mlp, _x()
    out, routing = moe(x, torch.arange(TOKENS))
    alone = ~routing.assigned.any(dim=1)
    assert 0 < alone.sum() < TOKENS
    assert bool((out[alone] == 0).all())
    assert bool((out[~alone] != 0).any(dim=1).all())


def test_the_leak_is_said_and_what_was_dropped_is_logged():
    (said,) = cautions(config_of("locmoe_plus", norm_topk_prob=True))
    assert "depend on tokens after it" in said
    assert "val/loss_by_expert_choice" in said
    router = router_of("locmoe_plus")
    router.end_step(Load(torch.ones(4), torch.tensor(0.75)))
    assert router.numbers()["dropped_share"].item() == 0.25
    assert not router.state_dict()


def test_tokens_that_cannot_be_cut_into_parts_are_refused():
    router = router_of("locmoe_plus", expert_ranks=4)
    with pytest.raises(UserError, match="63 tokens cannot be cut into the parts of 4 ranks"):
        router(_x(63), None)
    router.eval()(_x(63), None)
