"""The bound on an expert's capacity (LocMoE 2401.13920): against scipy, random directions and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from moebed.model.routers import Routing
from moebed.views.layer import LayerView
from probes.capacity import capacity_bounds, sphere_share
from probes.registry import make_probes
from probes.running.driver import run_probes

DELTAS = np.array([0.01, 0.03, 0.1, 0.15, 0.2, 0.3])


def test_3_7_5_a_third_of_random_directions_is_nearer_than_one_over_root_h():
    for hidden in (64, 384):
        x = torch.randn(40_000, hidden, generator=torch.Generator().manual_seed(0))
        near = (x[:, 0] / x.norm(dim=1)).abs()
        assert float((near >= hidden**-0.5).float().mean()) == pytest.approx(0.317, abs=0.01)
        assert float(sphere_share(hidden**-0.5, hidden)) == pytest.approx(0.317, abs=0.01)
        for delta in (0.02, 0.1, 0.15):
            assert float((near >= delta).float().mean()) == pytest.approx(float(sphere_share(delta, hidden)), abs=0.01)


@pytest.mark.parametrize("hidden", [64, 384, 5120])
def test_3_7_6_bounds_are_in_order_and_scipys(hidden):
    found = capacity_bounds(DELTAS, hidden, 8)
    share = 1 - special.betainc(0.5, (hidden - 1) / 2, DELTAS**2)
    q = DELTAS**2 * hidden / (2 - DELTAS**2)
    known = share > 1e-10  # below, 1 − I has no digits left
    np.testing.assert_allclose(found["exact"][known], 1 / (8 * share[known]), rtol=1e-5)
    np.testing.assert_allclose(found["erfc"], 1 / (8 * special.erfc(np.sqrt(q))), rtol=1e-12)
    np.testing.assert_allclose(found["exp"], np.exp(q) / 8, rtol=1e-12)
    # The cosine squared of a direction is a Beta variable.
    np.testing.assert_allclose(sphere_share(DELTAS, hidden), stats.beta.sf(DELTAS**2, 0.5, (hidden - 1) / 2), rtol=1e-9)
    assert bool((found["erfc"] > found["exp"]).all())
    assert bool((found["exact"] > found["exp"]).all())
    near = DELTAS * math.sqrt(hidden) < 4
    np.testing.assert_allclose(found["exact"][near], found["erfc"][near], rtol=20 / hidden)


def test_bounds_at_sizes_that_were_worked_out():
    """H 5120, E 16, δ .03: .63 and 1.97; H 384, E 8: .15, .86, 9.9, 316."""
    large = capacity_bounds(np.array([0.03]), 5120, 16)
    assert [float(large[which][0]) for which in ("exp", "erfc")] == pytest.approx([0.63, 1.97], abs=0.005)
    small = capacity_bounds(np.array([0.03, 0.1, 0.15, 0.2]), 384, 8)["exp"]
    assert small.tolist() == pytest.approx([0.15, 0.86, 9.9, 316], rel=0.01)
    assert math.isinf(capacity_bounds(np.array([1.0]), 384, 8)["exact"][0])


def _view(tokens=200, hidden=24, experts=4, top_k=2):
    torch.manual_seed(3)
    x, gate = torch.randn(tokens, hidden), torch.randn(experts, hidden)
    logits = x @ gate.T
    logits[:, 3] = -50.0  # nobody chooses the last one
    weight, index = logits.softmax(-1).topk(top_k)
    routing = Routing(logits, logits.softmax(-1), index, weight)
    return LayerView(0, 1, experts, top_k, gate, routing=routing, moe_input=x)


def test_it_measures_what_each_expert_was_given():
    view = _view()
    arrays = run_probes([view], make_probes(["capacity"]))["capacity"].arrays
    near = torch.nn.functional.cosine_similarity(view.moe_input[:, None], view.gate[None], dim=-1).abs()
    for expert in range(3):
        mine = (view.routing.topk_index == expert).any(-1)
        assert arrays["load/0"][expert] == mine.sum()
        mean = near[mine, expert].mean()
        assert arrays["delta_chosen/0"][expert] == pytest.approx(float(mean), rel=1e-5)
        assert arrays["delta_max/0"][expert] == pytest.approx(float(near[mine, expert].max()), rel=1e-5)
        share = float((near[:, expert] >= mean).float().mean())
        assert arrays["share_measured/0"][expert] == pytest.approx(share, abs=1e-6)
        bounds = capacity_bounds(np.array([float(mean)]), 24, 4)
        for which, bound in bounds.items():
            assert arrays[f"log10_bound_{which}/0/chosen"][expert] == pytest.approx(math.log10(bound[0]), rel=1e-4)
    assert arrays["load/0"][3] == 0
    assert np.isnan([arrays[key][3] for key in ("delta_chosen/0", "delta_max/0", "share_measured/0")]).all()


def test_its_sentences_and_picture():
    result = run_probes([_view()], make_probes(["capacity"]))["capacity"]
    assert "it is given 100 of this text" in result.headlines["bound"].sentence
    assert all(figure() for figure in result.figures.values())
    bare = LayerView(0, 1, 4, 2, None)
    assert run_probes([bare], make_probes(["capacity"]))["capacity"].notes == ["no layer has gate embeddings and text"]
