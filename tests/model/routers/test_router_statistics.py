"""Routers that adapt to sums over a step's tokens: by hand, by simulation, and cut into any parts."""

import math

import pytest
import torch
import torch.nn.functional as F

from moebed.model.losses import router_stats
from moebed.model.routers import Load, RouterSteps, build_router
from moebed.model.routers.quantiles import FINEST, NUM_BINS, WIDEST, histogram, upper_quantile
from tests.model.routers.router_cases import config_of, router_of

SUMMED = ("quantile", "threshold", "expert_choice", "kmeans")


def _all(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def _count(router, routing, mask=None):
    mask = _all(len(routing.router_logits)) if mask is None else mask
    stats = router_stats(routing, mask)
    steps = RouterSteps([router])
    steps.add([stats.counts], mask.sum(), [router.statistics(routing, mask)])
    return steps


# Quantiles of counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_quantiles_of_counts_are_within_a_bin_of_the_exact_ones(scale):
    values = torch.randn(4000, 3) * scale
    found = upper_quantile(histogram(values, _all(4000)), 0.25)
    ordered = values.sort(dim=0, descending=True).values
    exact = (ordered[999] + ordered[1000]) / 2
    width = 2 * torch.asinh(torch.tensor(WIDEST / FINEST)) / NUM_BINS
    bin_width = width * (exact.square() + FINEST**2).sqrt()  # the slope of τ sinh
    assert bool(((found - exact).abs() < bin_width).all())
    assert bin_width.max() < max(0.01 * exact.abs().max(), 1e-3 * FINEST * 15)


def test_a_quantile_parts_what_it_should():
    """Few values, far apart: so many lie above, whatever the share."""
    values = torch.tensor([[3.0, -50.0], [1.0, -2.0], [-0.5, 7.0], [0.25, 1e6], [-4.0, 0.0]])
    counts = histogram(values, _all(5))
    for above in (1, 2, 3, 4):
        quantile = upper_quantile(counts, above / 5)
        assert (values > quantile).sum(dim=0).tolist() == [above, above]


def test_counts_leave_padding_out_and_add_up():
    values, mask = torch.randn(60, 4), torch.rand(60) < 0.7
    whole = histogram(values, mask)
    assert torch.equal(whole, histogram(values[mask], _all(int(mask.sum()))))
    parts = sum(histogram(values[at], mask[at]) for at in (slice(0, 7), slice(7, 41), slice(41, 60)))
    assert torch.equal(whole, parts)
    assert upper_quantile(torch.zeros(4, NUM_BINS), 0.5).tolist() == [0] * 4  # a step without a token


def test_the_number_above_a_quantile_is_rounded_and_those_of_one_bin_lie_evenly():
    five = histogram(torch.arange(1.0, 6.0).view(5, 1), _all(5))
    for share, wanted in ((0.05, 4.5), (0.25, 4.5), (0.35, 3.5), (0.5, 3.5), (1.0, 1.0)):
        assert upper_quantile(five, share).item() == pytest.approx(wanted, rel=0.01)
    four = torch.zeros(1, NUM_BINS)
    four[0, 1500] = 4
    middle = FINEST * math.sinh((2 * 1500.5 / NUM_BINS - 1) * math.asinh(WIDEST / FINEST))
    assert upper_quantile(four, 0.5).item() == pytest.approx(middle, rel=2e-4)


# Quantile balancing --------------------------------------------------------------------------------------------------

RISING = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])


def test_quantile_balances_four_tokens_in_one_step():
    """Margins (1, 2, 3, 4) and 0: the two that are most the first expert's own lie above 2.5, so b = (−2.5, 0) less its
    mean."""
    router = router_of("quantile", num_experts=2, num_experts_per_tok=1)
    routing = router.choose(RISING)
    assert torch.bincount(routing.topk_index[:, 0], minlength=2).tolist() == [4, 0]
    _count(router, routing).end()
    torch.testing.assert_close(router.expert_bias, torch.tensor([-1.25, 1.25]), rtol=0.01, atol=1e-3)
    again = router.choose(RISING)
    assert torch.bincount(again.topk_index[:, 0], minlength=2).tolist() == [2, 2]
    torch.testing.assert_close(again.router_probs, RISING.softmax(-1))  # which no bias enters


def test_quantile_goes_part_of_the_way():
    router = router_of("quantile", num_experts=2, num_experts_per_tok=1, router_options={"bias_rate": 0.5})
    _count(router, router.choose(RISING)).end()
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.625, 0.625]), rtol=0.01, atol=1e-3)


def test_quantile_weighs_by_the_score_alone():
    router = router_of("quantile", norm_topk_prob=False)
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 100.0]))
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = router.choose(logits)
    assert routing.topk_index.tolist() == [[0, 3]]
    torch.testing.assert_close(routing.topk_weight, logits.softmax(-1)[:, [0, 3]])


@pytest.mark.parametrize(("rate", "most"), [(1.0, 3), (0.5, 8), (0.25, 16)])
@pytest.mark.parametrize(("experts", "chosen"), [(4, 1), (8, 1), (8, 2), (64, 8)])
def test_quantile_evens_out_what_a_gate_makes_uneven_at_any_rate(rate, most, experts, chosen):
    """On fresh tokens each time, of experts of which some are far more likely; the smaller the rate, the later."""
    options = {"num_experts": experts, "num_experts_per_tok": chosen, "router_options": {"bias_rate": rate}}
    router = router_of("quantile", **options)
    torch.manual_seed(0)
    lean, violations = torch.linspace(-2, 2, experts), []
    for _ in range(20):
        routing = router.choose(torch.randn(8192, experts) + lean)
        counts = router_stats(routing, _all(8192)).counts
        violations.append(float(counts.max() / counts.mean() - 1))
        _count(router, routing).end()
    assert violations[0] > 1.5
    even = next(step for step, violation in enumerate(violations) if violation < 0.2)
    print(f"rate {rate:g}, {experts} experts, top-{chosen}: below .2 after {even} steps")
    assert even <= most


def test_quantile_has_nothing_to_do_where_every_expert_is_chosen():
    router = router_of("quantile", num_experts_per_tok=4)
    routing = router.choose(torch.randn(9, 4))
    assert router.statistics(routing, _all(9)) == {}
    _count(router, routing).end()
    assert router.expert_bias.tolist() == [0] * 4


# Thresholds ----------------------------------------------------------------------------------------------------------


def test_threshold_on_uniform_scores_has_its_load():
    """K/E within 1 %, of tokens that were not seen before."""
    router = router_of("threshold", num_experts=4, num_experts_per_tok=1)
    torch.manual_seed(0)
    spread = torch.tensor([1.0, 2.0, 0.5, 5.0])
    for _ in range(5):
        _count(router, router.choose(torch.rand(20_000, 4) * spread)).end()
    torch.testing.assert_close(router.threshold, 0.75 * spread, rtol=0.01, atol=0)
    assert router.steps.tolist() == [5]
    router.eval()
    load = router_stats(router.choose(torch.rand(200_000, 4) * spread), _all(200_000)).counts / 200_000
    torch.testing.assert_close(load, torch.full((4,), 0.25), rtol=0, atol=0.01)


def test_threshold_is_a_plain_mean_first_and_a_running_one_then():
    router = router_of("threshold", num_experts=2, num_experts_per_tok=1, router_options={"threshold_decay": 0.7})
    expected = None
    for step, centre in enumerate((0.0, 1.0, -1.0, 3.0)):
        logits = centre + torch.linspace(-1, 1, 1000).view(-1, 1).expand(-1, 2)
        _count(router, router.choose(logits)).end()
        rate = max(0.3, 1 / (step + 1))
        expected = centre if expected is None else expected + rate * (centre - expected)
        torch.testing.assert_close(router.threshold, torch.full((2,), float(expected)), rtol=0.01, atol=1e-3)


def test_threshold_serves_whom_it_may():
    """By hand; a token may have none, and says so in the log, but for padding; at a threshold is not above it."""
    router = router_of("threshold")
    router.threshold.copy_(torch.tensor([0.0, 0.5, 0.0, -5.0]))
    logits = torch.tensor([[1.0, 0.5, 2.0, -6.0], [-1.0, -1.0, -1.0, -6.0]])
    routing = router.choose(logits)
    assert routing.topk_index[0].tolist() == [2, 0]
    torch.testing.assert_close(routing.topk_weight, torch.tensor([[2.0, 1.0], [-99.0, -99.0]]).sigmoid())
    assert routing.assigned.tolist() == [[True, True], [False, False]]
    numbers = _count(router, routing).end()
    assert numbers["unserved_share"] == 0.5
    assert numbers["experts_per_token"] == 1
    for mask, unserved in (([True, True], 1), ([True, False], 0)):
        assert router.statistics(routing, torch.tensor(mask))["unserved"] == unserved


def test_thresholds_begin_where_a_gate_as_drawn_has_them():
    torch.manual_seed(0)
    router = router_of("threshold", num_experts=16, num_experts_per_tok=2, hidden_size=256)
    torch.nn.init.normal_(router.weight, std=0.2)  # initializer_range here
    x = F.rms_norm(torch.randn(2000, 256), (256,))
    load = router_stats(router(x, None), _all(2000)).counts.sum() / 2000
    assert load == pytest.approx(2, rel=0.15)
    chooser = router_of("expert_choice", num_experts=16)
    assert chooser.scores(torch.zeros(1, 16)).unique().item() == pytest.approx(chooser.first_threshold())
    everyone = router_of("threshold", num_experts_per_tok=4)
    assert bool(everyone.choose(torch.randn(7, 4)).assigned.all())
    _count(everyone, everyone.choose(torch.randn(7, 4))).end()
    assert bool(everyone.choose(torch.randn(7, 4)).assigned.all())


@pytest.mark.parametrize("name", ["threshold", "quantile", "kmeans"])
def test_no_token_depends_on_those_after_it(name):
    router = router_of(name)
    x = torch.randn(20, 32)
    whole, short = router(x, None), router(x[:8], None)
    torch.testing.assert_close(whole.router_probs[:8], short.router_probs)
    dense = [torch.zeros(8, 4).scatter(1, r.topk_index[:8], r.topk_weight[:8]) for r in (whole, short)]
    torch.testing.assert_close(*dense)


def test_experts_choose_as_many_tokens_each_and_evaluation_is_causal():
    router = router_of("expert_choice", num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    lean = torch.tensor([2.0, 0.0, 0.0, -2.0])
    for _ in range(3):
        routing = router.choose(torch.randn(4000, 4) + lean)
        assert router_stats(routing, _all(4000)).counts.tolist() == [2000] * 4
        probs = routing.router_probs
        served = torch.zeros(4000, 4, dtype=torch.bool).scatter(1, routing.topk_index, routing.assigned)
        for expert in range(4):  # the largest probabilities, and no others
            mine = served[:, expert]
            assert probs[mine, expert].min() >= probs[~mine, expert].max()
        _count(router, routing).end()
    router.eval()
    logits = torch.randn(20_000, 4) + lean
    counts = router_stats(router.choose(logits), _all(20_000)).counts
    torch.testing.assert_close(counts / 20_000, torch.full((4,), 0.5), rtol=0, atol=0.02)
    ones = torch.cat([router.choose(one).router_probs for one in logits[:5].split(1)])
    torch.testing.assert_close(ones, router.choose(logits[:5]).router_probs)


def test_experts_choose_among_the_tokens_of_a_rank():
    router = router_of("expert_choice", num_experts=4, num_experts_per_tok=1)
    logits = torch.randn(16, 4)
    alone = [router.choose(part) for part in logits.chunk(2)]
    router.token_parts = 2
    both = router.choose(logits)
    dense = torch.zeros(16, 4).scatter(1, both.topk_index, both.topk_weight)
    parts = [torch.zeros(8, 4).scatter(1, one.topk_index, one.topk_weight) for one in alone]
    assert torch.equal(dense, torch.cat(parts))


# k-means -------------------------------------------------------------------------------------------------------------


def _clusters(tokens: int, hidden: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    means = F.normalize(torch.randn(2, hidden), dim=-1) * 6
    which = torch.randint(2, (tokens,))
    return means, means[which] + torch.randn(tokens, hidden) * 0.3


def test_kmeans_finds_two_planted_clusters():
    for seed in range(5):
        torch.manual_seed(seed)
        options = {"centroid_rate": 0.3, "seed": seed}
        router = router_of("kmeans", num_experts=2, num_experts_per_tok=1, router_options=options)
        means, x = _clusters(400)
        started = None
        for step in range(25):
            router.begin_step(step)
            routing = router(x, None)
            _count(router, routing).end()
            started = router.centroids.clone() if started is None else started
        assert all(any(torch.allclose(row, token) for token in x) for row in started)  # of tokens, as they are
        distance = torch.cdist(router.centroids, means)
        if distance.argmin(dim=1).unique().numel() == 2:  # both of one cluster at the start can stay so
            assert distance.min(dim=1).values.max() < 0.2
            break
    else:
        pytest.fail("no start had a token of each cluster")


def test_centroids_begin_anew_in_each_layer_with_tokens_of_the_first_micro_batch():
    config = config_of("kmeans")
    one, other = (build_router(config, config.layer(index)) for index in (0, 1))
    assert not torch.equal(one.centroids, other.centroids)
    for micro_batch, tokens in ((0, 4), (1, 0)):
        one.micro_batch = micro_batch
        one.begin_step(0)
        counted = one.tokens_of(torch.randn(50, 32), torch.zeros(50, 2, dtype=torch.long))
        assert counted[one.TOKENS].sum() == tokens


def test_centroids_have_no_gradient_and_move_by_their_rate():
    router = router_of("kmeans", router_options={"centroid_rate": 0.25})
    x = torch.randn(50, 32, requires_grad=True)
    router.started.fill_(1)
    before = router.centroids.clone()
    routing = router(x, None)
    cosine = F.cosine_similarity(x.unsqueeze(1), before, dim=-1)
    torch.testing.assert_close(routing.router_logits, cosine / 0.1, rtol=1e-4, atol=1e-4)
    routing.topk_weight[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not list(router.parameters())
    assert not router.centroids.requires_grad
    _count(router, routing).end()
    for expert in range(4):
        mine = (routing.topk_index == expert).any(dim=1)
        expected = 0.75 * before[expert] + 0.25 * x[mine].mean(0)
        torch.testing.assert_close(router.centroids[expert], expected, rtol=1e-4, atol=1e-5)


def test_an_idle_centroid_stays_and_is_counted():
    router = router_of("kmeans", num_experts=3, num_experts_per_tok=1)
    router.started.fill_(1)
    router.centroids.copy_(torch.eye(3, 32) * torch.tensor([1.0, 1.0, -1.0]).view(3, 1))
    x = torch.eye(3, 32)[[0, 1, 0, 1]]
    numbers = _count(router, router(x, None)).end()
    assert numbers["idle_centroids"] == 1
    assert torch.equal(router.centroids[2], -torch.eye(3, 32)[2])


# Any layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUMMED)
def test_a_step_in_parts_is_the_step_as_a_whole(name):
    """Ranks, and micro-batches: bit for bit, but for k-means, whose sums are of floating point."""
    x = torch.randn(48, 32)
    found = []
    for parts in (1, 2, 4):
        router = router_of(name)
        torch.manual_seed(3)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        for _ in range(3):
            steps = RouterSteps([router])
            for rank, part in enumerate(x.chunk(parts)):
                steps.begin(0, rank, parts)
                router.is_first = torch.tensor(True)  # of its rank
                router.token_parts = 4 // parts
                routing = router(part, None)
                mask = _all(len(part))
                steps.add([router_stats(routing, mask).counts], mask.sum(), [router.statistics(routing, mask)])
            steps.end()
        found.append({key: value.clone() for key, value in router.named_buffers()})
    for other in found[1:]:
        for key, value in found[0].items():
            if name == "kmeans":
                torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", SUMMED)
def test_what_is_not_taken_or_not_training_changes_nothing(name):
    router = router_of(name)
    before = {key: value.clone() for key, value in router.named_buffers()}
    steps = _count(router, router(torch.randn(30, 32), None))
    steps.forget()
    assert steps.end() == {}
    router.eval()(torch.randn(30, 32), None)
    for key, value in router.named_buffers():
        assert torch.equal(value, before[key])


def test_a_load_without_statistics_is_one():
    assert dict(Load(torch.zeros(4), torch.tensor(1.0)).statistics) == {}


def test_statistics_of_layers_of_other_sizes_stay_apart():
    """Each layer's own, in the one message of a step."""
    config = config_of("quantile", num_experts=[4, 6])
    from moebed.model.decoder import Decoder

    decoder, told = Decoder(config), []
    for router in decoder.routers:
        router.end_step = told.append
    steps = RouterSteps(decoder.routers)
    for scale in (1.0, 2.0):
        found = [
            {"margins": torch.full((router.num_experts, 3), scale * i)} for i, router in enumerate(decoder.routers)
        ]
        steps.add([torch.ones(4), torch.ones(6)], torch.tensor(5), found)
    steps.end()
    assert [load.statistics["margins"].shape for load in told] == [(4, 3), (6, 3)]
    assert [load.statistics["margins"].unique().tolist() for load in told] == [[0.0], [3.0]]
