"""observed_vs_needed and random_routes: planted causes and routes that are alike, and a live model by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from probe_cases import make_text, routed_view
from torch import nn

from moebed.errors import ConfigError
from moebed.views import interventions as iv
from moebed.views.attribution import Attribution, Following
from moebed.views.layer import ExpertView, HeadView
from moebed.views.live import intervene, walk
from probes.figures.drawing import to_rgb
from probes.measures.row_effects import DrawnTokens, smallest_seen, standardised
from probes.observed_vs_needed import METRICS, ObservedVsNeeded, _of_experts, adjusted, high_less_low
from probes.random_routes import RandomRoutes, percentiles
from probes.registry import make_probes
from probes.running.driver import needs_of, run_probes

TEXTS, LENGTH = 24, 61


@pytest.fixture(scope="module")
def long_text():
    return make_text([LENGTH] * TEXTS, width=LENGTH)


def head_of(text, loss, rises):
    """A head whose text has these losses (T,), and these rises (T,) by name; of nothing at all, 0."""
    loss = torch.where(text.targets < 0, torch.nan, loss)

    def under(interventions):
        found = {one.name: rises[one.name] for one in interventions if not one.everywhere}
        found |= {one.name: torch.zeros_like(loss) for one in interventions if one.everywhere}
        return {name: torch.where(loss.isnan(), torch.nan, rise) for name, rise in found.items()}

    return HeadView(text, torch.zeros_like(text.targets), loss, under=under)


def observed(text, rise_of, seed=0, attribution=None):
    """The probe on a layer of four experts, two of them chosen, whose removal costs what ``rise_of`` a place says."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(text.targets)
    view = replace(routed_view(torch.randn(tokens, 4, generator=generator), 2, text=text), attribution=attribution)
    probe = ObservedVsNeeded()
    probe.begin_layer(view)
    outputs = [torch.randn(tokens, 3, generator=generator) * (1 + expert) for expert in range(4)]
    for expert, output in enumerate(outputs):
        probe.update_expert(view, ExpertView(expert, output))
    probe.update(view)
    norm = torch.stack(outputs).norm(dim=2).T.gather(1, view.routing.topk_index)
    if attribution is not None:  # what g·E(x) adds to the logit of the token that follows
        rows = attribution.following.rows[attribution.following.of_token.clamp_min(0)]
        every = torch.stack([(output * rows).sum(dim=1) for output in outputs], dim=1)
        norm = every.gather(1, view.routing.topk_index) * view.routing.topk_weight
    rises = {
        f"drop_top {place + 1} zero @ layer 0 alone at 2000 tokens": rise_of(place, view.routing, norm)
        + 0.5 * torch.randn(tokens, generator=generator)
        for place in range(2)
    }
    probe.update_head(head_of(text, torch.rand(tokens, generator=generator), rises))
    return probe.compute()


def test_what_a_metric_tells_is_found_and_what_it_does_not_is_not(long_text):
    """The loss rises by the weight of what is silenced: the control is called; norms mean nothing here."""
    result = observed(long_text, lambda place, routing, norm: routing.topk_weight[:, place])
    names, cells = list(METRICS), adjusted(result.arrays)[0]
    d = dict(zip(names, result.arrays["high_low_d/0"], strict=True))
    assert d["weight"] > 0.3
    assert cells[names.index("weight")] < 0.01
    assert all(abs(d[name]) < 0.15 and cells[names.index(name)] > 0.05 for name in ("use", "mean_norm", "norm"))
    assert "called in 1 of 1 layers" in result.headlines["d_weight"].sentence
    assert "called in 0 of 1 layers" in result.headlines["d_norm"].sentence
    low, high = result.headlines["d_weight"].interval
    assert low < d["weight"] < high
    pairs = dict(zip(names, result.arrays["pairs/0"].tolist(), strict=True))
    assert pairs.pop("dla") == 0  # nothing was told of logits
    assert set(pairs.values()) == {TEXTS * (LENGTH - 1)}
    for build in result.figures.values():
        to_rgb(build())


def test_a_loss_that_falls_with_the_norm_has_the_other_sign(long_text):
    result = observed(long_text, lambda place, routing, norm: -0.2 * norm[:, place])
    assert result.headlines["d_norm"].value < -0.2
    assert result.headlines["d_mean_norm"].value < -0.1


def test_what_an_expert_adds_to_the_logit_tells_where_it_is_what_the_loss_is_of(long_text):
    """The loss rises by what is taken from the logit of the token that follows: called, and as it is by hand."""
    ids, of_token = long_text.targets.unique(return_inverse=True)
    rows = torch.randn(len(ids) - 1, 3, generator=torch.Generator().manual_seed(4))
    attribution = Attribution(Following(rows, of_token - 1), 1.0, nn.Identity())
    kept = {}

    def rise(place, routing, added):
        kept[place] = added[:, place]
        return added[:, place]

    result = observed(long_text, rise, attribution=attribution)
    at, names = list(METRICS).index("dla"), list(METRICS)
    found = result.arrays["observed/0"][:, :, at]
    for place, added in kept.items():
        np.testing.assert_allclose(found[:, place], added[result.arrays["token"]], rtol=1e-4, atol=1e-6)
    assert result.headlines["d_dla"].value > 0.5
    assert result.headlines["d_dla"].value == max(result.headlines[f"d_{name}"].value for name in names)
    assert "called in 1 of 1 layers" in result.headlines["d_dla"].sentence


def test_highest_less_lowest_by_hand():
    values = np.array([[3.0, 1, 2], [1, 1, 1], [5, np.nan, np.nan], [1, np.nan, 4]])
    rise = np.array([[0.5, 0.1, 9], [1, 2, 3], [1, 0, 0], [0.25, np.nan, 1]])
    np.testing.assert_allclose(high_less_low(values, rise), [0.4, np.nan, np.nan, 0.75])


def test_what_is_observed_of_an_expert_is_of_the_tokens_that_chose_it(long_text):
    """Use counts them; neither the weights nor the norms of other tokens enter a mean, and d knows no unit."""
    weight = torch.tensor([[0.9, 0.1, 0], [0, 0.2, 0.8], [0.6, 0.4, 0]])
    norm = torch.tensor([[1.0, 2, 50], [70, 4, 3], [5, 6, 90]])
    wanted = {
        "use": [2, 3, 1],
        "mean_weight": [0.75, 0.7 / 3, 0.8],
        "mean_norm": [3, 4, 3],
        "std_norm": [2, (8 / 3) ** 0.5, 0],
    }
    for key, values in _of_experts(weight, norm).items():
        np.testing.assert_allclose(values, wanted[key], rtol=1e-6, err_msg=key)
    tokens = DrawnTokens.of(long_text, 10_000)
    values = np.random.default_rng(0).normal(0.5, 4.0, len(tokens.token))
    found = standardised(values, tokens)
    assert found.d == pytest.approx(values.mean() / values.std())
    assert np.abs(found.without / found.d - 1).max() < 0.2
    np.testing.assert_allclose(standardised(10 * values, tokens).without, found.without, rtol=1e-5)


def test_the_smallest_effect_seen_is_seen_in_four_of_five(long_text):
    """By drawing texts again and again that differ by so much on average, each with a mean of its own."""
    tokens, generator = DrawnTokens.of(long_text, 10_000), np.random.default_rng(0)

    def drawn(shift):
        own = 0.3 * generator.standard_normal(TEXTS)[tokens.sequence]
        return standardised(generator.standard_normal(len(tokens.token)) + own + shift, tokens)

    d = float(np.mean([smallest_seen(drawn(0).without, tokens.units.stratum) for _ in range(15)]))
    assert 0.1 < d < 0.3  # a token alone would be seen from .07 on: texts are not alike
    assert 0.7 < np.mean([drawn(d * 1.09**0.5).p < 0.05 for _ in range(100)]) < 0.9
    assert np.mean([drawn(0).p < 0.05 for _ in range(100)]) < 0.1


def routes(text, losses, options=None):
    """The probe where the executed route and S random ones of a layer have these losses (T, S + 1)."""
    probe = RandomRoutes()
    probe.options = options or probe.Options(routes=losses.shape[1] - 1)
    probe.update(routed_view(torch.randn(len(losses), 4), 2, text=text))
    rises = {
        f"random_set {s} @ layer 0 alone at 2000 tokens": losses[:, s + 1] - losses[:, 0]
        for s in range(losses.shape[1] - 1)
    }
    probe.update_head(head_of(text, losses[:, 0], rises))
    return probe.compute()


def test_routes_that_are_alike_give_one_half_whatever_the_model_is_sure_of(long_text):
    """Tokens that differ much, routes skewed and wider at hard tokens: binned by the executed loss they would not."""
    generator = torch.Generator().manual_seed(3)
    hard = torch.rand(len(long_text.targets), 1, generator=generator)
    losses = hard + (0.2 + hard) * torch.empty(len(hard), 9).exponential_(generator=generator)
    result = routes(long_text, losses)
    arrays = result.arrays
    assert float(arrays["percentile/0"]) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(arrays["by_mean_loss/0"], 0.5, atol=0.06)
    low, high = arrays["by_mean_loss_interval/0"]
    assert ((low < 0.5) & (high > 0.5)).sum() >= 4
    assert arrays["by_loss/0"][0] < 0.4
    assert arrays["by_loss/0"][-1] > 0.6
    assert "called in 0 of 1" in result.headlines["percentile"].sentence
    assert float(arrays["gap/0"]) > 0.3  # picked by the answer
    assert float(arrays["gap/0"]) == pytest.approx(float(arrays["gap_random/0"]), abs=0.08)
    for build in result.figures.values():
        to_rgb(build())


def test_a_router_that_is_right_is_found(long_text):
    losses = torch.randn(len(long_text.targets), 9, generator=torch.Generator().manual_seed(5))
    losses[:, 0] -= 0.3
    result = routes(long_text, losses)
    assert result.headlines["percentile"].value < 0.45
    assert result.headlines["percentile"].interval[1] < 0.5
    assert "called in 1 of 1" in result.headlines["percentile"].sentence
    assert result.scalars["gap"] < result.scalars["gap_random"] - 0.2


def test_gaps_and_fifths_by_hand(long_text):
    """The best is sought among the executed route and the random ones; fifths are of the mean loss over them all."""
    losses = torch.rand(len(long_text.targets), 4, generator=torch.Generator().manual_seed(6)).double()
    losses[:, 0] -= 0.4  # often the best of all
    arrays = routes(long_text, losses).arrays
    every = losses[long_text.targets >= 0].numpy()
    best, better = every.min(axis=1), (every[:, 1:] < every[:, :1]).mean(axis=1)
    assert float(arrays["gap/0"]) == pytest.approx((every[:, 0] - best).mean(), rel=1e-5)
    assert float(arrays["gap_random/0"]) == pytest.approx((every[:, 1:].mean(axis=1) - best).mean(), rel=1e-5)
    fifths = np.array_split(better[every.mean(axis=1).argsort()], 5)
    np.testing.assert_allclose(arrays["by_mean_loss/0"], [fifth.mean() for fifth in fifths], atol=2e-3)


def test_equal_routes_count_by_half():
    rise = np.array([[0.0, 0, 0, 0], [-1, 1, 0, 0], [-1, -1, -1, -1], [np.nan, 1, 1, 1]])
    np.testing.assert_allclose(percentiles(rise), [0.5, 0.5, 1, np.nan])


def test_a_live_model_is_asked_for_single_tokens(make_decoder):
    """Both probes in one pass: what they stored are the effects of the interventions that they name."""
    decoder, text = make_decoder(num_experts=[4, 0, 4]), make_text([12, 7, 9, 11], width=12)
    probes = [ObservedVsNeeded(), RandomRoutes()]
    probes[0].options = probes[0].Options(tokens=30)
    probes[1].options = probes[1].Options(tokens=20, routes=2, layers="2")
    results = run_probes(walk(decoder, text, needs_of(probes)), probes)
    for one, layer, key, most in (
        (iv.drop_top(2, "zero", [2]), 2, "rise", 30),
        (iv.drop_top(1, "zero", [0]), 0, "rise", 30),
        (iv.random_set(1, layers=[2]), 2, "route_rise", 20),
    ):
        arrays = results["observed_vs_needed" if key == "rise" else "random_routes"].arrays
        column = {"drop_top 2": 1, "drop_top 1": 0, "random_set": 1}[one.name[:10].strip()]
        wanted = intervene(decoder, text, [iv.alone(one)])[f"{one.name} alone"]
        drawn = DrawnTokens.of(text, most).token
        assert arrays["token"].tolist() == drawn.tolist()
        np.testing.assert_allclose(arrays[f"{key}/{layer}"][:, column], wanted[drawn], atol=1e-5)
        assert np.abs(arrays[f"{key}/{layer}"]).max() > 1e-3
    assert "percentile/0" not in results["random_routes"].arrays
    assert {*results["observed_vs_needed"].headlines} == {f"d_{name}" for name in METRICS}
    for result in results.values():
        assert result.scalars["noise"] < 1e-5
        assert all(np.isfinite(value) for value in result.scalars.values())


def test_where_there_is_nothing_to_compare_it_says_so(make_decoder, text):
    decoder = make_decoder(num_experts=2, num_experts_per_tok=2)
    probes = [RandomRoutes()]
    assert not probes[0].interventions(decoder.config)
    assert run_probes(walk(decoder, text, needs_of(probes)), probes)["random_routes"].notes
    probes = [ObservedVsNeeded()]
    decoder = make_decoder(num_experts_per_tok=1)
    assert not probes[0].interventions(decoder.config)
    assert run_probes(walk(decoder, text, needs_of(probes)), probes)["observed_vs_needed"].notes
    with pytest.raises(ConfigError, match="layers is '1,x'"):
        RandomRoutes.Options(layers="1,x")
    (one,) = make_probes(["random_routes"], {"random_routes": {"layers": 3}})  # as a command line has it
    assert one.options.layers == "3"
    with pytest.raises(ConfigError, match="at least 1"):
        RandomRoutes.Options(routes=0)
