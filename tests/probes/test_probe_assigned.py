"""What probes count is what is assigned: routers that give a token fewer than K experts, or choose by a bias."""

import numpy as np
import pytest
import torch
from probe_cases import make_text, probe

from moebed.model.routers import Routing
from moebed.views.layer import ExpertView, LayerView
from moebed.views.live import walk
from probes.coactivation import expected_pairs
from probes.measures.choices import NONE, assignments, chosen_mask, ranked
from probes.measures.output_pairs import chosen_means
from probes.registry import PROBES
from probes.running.driver import needs_of, run_probes


def ragged_view(weights, text=None, num_experts_per_tok=2):
    """A view of a router whose tokens go to the experts of positive weight (T, E), as many as there are."""
    weights = torch.tensor(weights, dtype=torch.float32)
    weight, index = weights.sort(dim=-1, descending=True, stable=True)
    probs = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    routing = Routing(weights, probs, index, weight, ragged=True)
    return LayerView(0, 1, weights.shape[1], num_experts_per_tok, None, routing=routing, text=text)


# Of four experts: the first is idle, the second has every token, one token has three experts, and one has none.
WEIGHTS = [[0, 2.0, 1.0, 0.5], [0, 1.0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 0], [0, 1.0, 0, 2.0]]
COUNT = [0, 4, 1, 2]


def test_assignments_are_those_of_a_weight():
    found = assignments(ragged_view(WEIGHTS))
    assert found.tolist() == [[1, 2, 3], [1, NONE, NONE], [1, NONE, NONE], [NONE] * 3, [3, 1, NONE]]
    assert chosen_mask(found, 4).sum(axis=0).tolist() == COUNT
    index, weight = ranked(ragged_view(WEIGHTS).routing, 2)
    assert index.tolist() == [[1, 2], [1, NONE], [1, NONE], [NONE, NONE], [3, 1]]
    assert (weight[index == NONE] == 0).all()


def test_counting_probes_leave_out_what_has_no_weight():
    """An idle expert has no load; it took half of it where an assignment of weight 0 was one."""
    text = make_text([5], width=5)
    found = probe([ragged_view(WEIGHTS, text)], "balance", "coactivation", "domain_share", "repeats", "routing")
    arrays = {name: result.arrays for name, result in found.items()}
    assert arrays["balance"]["load/0"] == pytest.approx(np.array(COUNT) / 7)
    assert int(arrays["balance"]["dead/0"]) == 1
    share = arrays["coactivation"]["coactivation/0"]
    assert np.isnan(share[0]).all()
    assert share[1] == pytest.approx([0, 1, 1 / 4, 2 / 4])
    assert arrays["domain_share"]["share_first/0/books"] == pytest.approx([0, 3 / 4, 0, 1 / 4])
    assert arrays["domain_share"]["share_tokens_any/0/books"] == pytest.approx(np.array(COUNT) / 5)
    # Of four pairs the first two keep their first choice; no token goes on from one without an expert, or to it.
    assert float(arrays["repeats"]["repeat_first/0/all"]) == pytest.approx(2 / 4)
    assert float(arrays["repeats"]["repeat_any/0/all"]) == pytest.approx(2 / 4)
    assert float(arrays["routing"]["topk_mass/0"]) == pytest.approx((3 / 3.5 + 1 + 1 + 0 + 1) / 5)


def test_saturation_and_vocabulary_leave_it_out_too():
    text = make_text([5], width=5)
    probes = [PROBES[name]() for name in ("saturation", "vocabulary")]
    earlier = {
        "topk_index/0": np.array([[[NONE, 1, 2, 3]] + [[NONE, NONE, NONE, 1]] * 4], np.int16),
        "steps": np.array([0]),
        "token_ids": text.token_ids.numpy(),
    }
    probes[0].begin(10, earlier)
    found = run_probes([ragged_view(WEIGHTS, text)], probes)
    assert found["saturation"].arrays["saturation/0"] == pytest.approx([6 / 7, 1])
    assert found["vocabulary"].notes  # too short a text, and no error


def test_importance_counts_tokens_of_a_weight():
    class Weights:
        def run_experts(self, x, watch=None, beside=None):
            for expert in range(4):
                yield ExpertView(expert, torch.full((5, 2), float(expert + 1)))

        def adapted(self, x, routing):
            return None

    view = ragged_view(WEIGHTS, make_text([5], width=5))
    view.weights, view.moe_input = Weights(), torch.zeros(5, 2)
    arrays = probe([view], "expert_importance")["expert_importance"].arrays
    assert arrays["count/0"].tolist() == COUNT
    size = np.sqrt(2)
    assert arrays["reap/0"] == pytest.approx([0, 2 * size * 7 / 4, 3 * size * 1.0, 4 * size * 2.5 / 2], rel=1e-5)


def test_means_over_pairs_of_the_chosen_by_hand():
    """Three of four experts are chosen, or one, or none: of which there is no pair."""
    cosine = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]).expand(3, -1)  # pairs 10, 20, 21, 30, 31, 32
    found = chosen_means(cosine, torch.tensor([[1, 2, 3], [1, NONE, NONE], [NONE, NONE, NONE]]), 4)
    assert found.chosen.tolist() == pytest.approx([(0.3 + 0.5 + 0.6) / 3, np.nan, np.nan], nan_ok=True)
    assert found.other.tolist() == pytest.approx([np.nan, (0.2 + 0.4 + 0.6) / 3, 0.35], nan_ok=True)
    assert found.mixed.tolist() == pytest.approx([(0.1 + 0.2 + 0.4) / 3, (0.1 + 0.3 + 0.5) / 3, np.nan], nan_ok=True)


def test_every_probe_runs_on_a_router_of_its_own_number_of_experts(make_decoder):
    text = make_text([30] * 4, width=30)
    probes = [kind() for kind in PROBES.values()]
    decoder = make_decoder(router="relu", num_experts=6)
    found = run_probes(walk(decoder, text, needs_of(probes)), probes)
    for name, result in found.items():
        for draw in result.figures.values():
            draw()
        for key, headline in result.headlines.items():
            assert np.isfinite(headline.value), (name, key)
    load = found["balance"].arrays["load/0"]
    reap = found["expert_importance"].arrays["count/0"]
    assert load == pytest.approx(reap / reap.sum())


def test_a_margin_is_that_of_the_choice_and_not_of_the_order():
    """A bias chose the third expert over the second: the margin is negative."""
    probs = torch.tensor([[0.5, 0.26, 0.24], [0.6, 0.3, 0.1]])
    routing = Routing(probs.log(), probs, torch.tensor([[0, 2], [0, 1]]), torch.tensor([[0.7, 0.3], [0.7, 0.3]]))
    found = probe([LayerView(0, 1, 3, 2, None, routing=routing)], "router_state")["router_state"]
    assert found.arrays["margin/0"] == pytest.approx([-0.02, 0.2])
    every = Routing(probs.log(), probs, torch.tensor([[0, 1, 2]] * 2), probs)
    found = probe([LayerView(0, 1, 3, 3, None, routing=every)], "router_state")["router_state"]
    assert found.arrays["margin/0"] == pytest.approx([0.24, 0.1])


def test_ties_of_the_choice_are_told():
    logits = torch.zeros(6, 4)
    routing = Routing(logits, logits.softmax(-1), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5))
    found = probe([LayerView(0, 1, 4, 2, None, routing=routing)], "router_state")["router_state"]
    assert "at 100% of the tokens the last expert chosen and the first one left out score the same" in found.notes[0]


@pytest.mark.parametrize(
    ("count", "together"),
    [
        # Two of two: always together. Two of three with equal loads: a half each.
        ([10, 10], [[0, 10], [10, 0]]),
        ([20, 20, 20], [[0, 10, 10], [10, 0, 10], [10, 10, 0]]),
        # The first is in every token, so that it is every partner there is.
        ([12, 6, 6], [[0, 6, 6], [6, 0, 0], [6, 0, 0]]),
        # K = 3 of 4, each left out in a quarter of the tokens: two of three others.
        ([30] * 4, [[0 if i == j else 20 for j in range(4)] for i in range(4)]),
    ],
)
def test_expected_pairs_by_hand(count, together):
    """By load alone, all experts of a token different; with repetition the first would be drawn twice."""
    joint = np.array(together, float)
    np.fill_diagonal(joint, count)
    chosen = round((sum(map(sum, together)) + sum(count)) / sum(count))
    found = expected_pairs(joint, sum(count) // chosen)
    np.fill_diagonal(joint, 0)
    assert found == pytest.approx(joint, abs=0.1)


def test_expected_pairs_are_those_of_random_choices_of_the_same_loads():
    """Experts drawn one after another without replacement by uneven weights: no pair means anything."""
    rng, experts, chosen, tokens = np.random.default_rng(0), 12, 4, 40_000
    scores = rng.gumbel(size=(tokens, experts)) + np.linspace(0, 2.5, experts)
    mask = np.zeros((tokens, experts))
    np.put_along_axis(mask, scores.argsort(axis=1)[:, -chosen:], 1.0, axis=1)
    together = mask.T @ mask
    found = expected_pairs(together, tokens)
    off = ~np.eye(experts, dtype=bool)
    away = np.abs(found[off] / together[off] - 1)
    assert away.max() < 0.12
    assert away.mean() < 0.035  # some of which is the draw's
    count = together.diagonal()
    linear = (chosen - 1) * count[:, None] * count / (count.sum() - count)[:, None]
    assert np.abs(linear[off] / together[off] - 1).mean() > 2 * away.mean()
    assert (found <= np.minimum.outer(together.diagonal(), together.diagonal()) + 1e-9).all()
    assert found.sum(axis=1) == pytest.approx((chosen - 1) * together.diagonal(), rel=1e-6)


@pytest.mark.parametrize("tied", ["norms", "scores"])
def test_where_nothing_can_be_ranked_it_says_so(tied):
    """Exact copies of one expert, or equal rows of the gate: neither a correlation nor a share of the largest."""

    class Weights:
        def run_experts(self, x, watch=None, beside=None):
            for expert in range(4):
                yield ExpertView(expert, x * (1.0 if tied == "norms" else expert + 1.0))

        def adapted(self, x, routing):
            return None

    logits = torch.randn(9, 4) if tied == "norms" else torch.zeros(9, 4)
    probs = logits.softmax(-1)
    weight, index = probs.topk(2)
    view = LayerView(0, 1, 4, 2, None, routing=Routing(logits, probs, index, weight))
    view.weights, view.moe_input = Weights(), torch.randn(9, 8)
    found = probe([view], "norm_vs_score", "norm_origin")["norm_vs_score"]
    assert not found.headlines
    assert "there is nothing to rank" in found.notes[0]


def test_importance_without_targets_says_so(make_decoder):
    """Texts of one token each: there is no loss that could rise."""
    found = run_probes(
        walk(make_decoder(), make_text([1, 1, 1], width=1), needs_of([PROBES["expert_importance"]()])),
        [PROBES["expert_importance"]()],
    )["expert_importance"]
    assert "ablation_loss_max" not in found.headlines
    assert any("no token is followed by another" in note for note in found.notes)
    assert all(np.isfinite(headline.value) for headline in found.headlines.values())
