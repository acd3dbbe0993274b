"""norm_vs_score against a float64 reference that goes token by token."""

import numpy as np
import pytest
import torch
from probe_cases import probe
from scipy.stats import spearmanr

from moebed.views.layer import Need
from moebed.views.live import walk
from probes.measures.ranks import correlation, ranks
from probes.norm_vs_score import NormVsScore


def reference(decoder, text, layer):
    """Norms, counts, mean rho and overlap of one layer, one token and one expert at a time in float64."""
    view = next(v for v in walk(decoder, text, frozenset({Need.ROUTING})) if v.index == layer)
    up, gate, down = (view.matrix(name).double() for name in ("up", "gate", "down"))
    experts, chosen = view.num_experts, view.num_experts_per_tok
    norms, counts, rhos, hits = [], np.zeros((experts, experts), int), [], 0
    for x, score in zip(view.moe_input.double(), view.routing.router_probs.double(), strict=True):
        norm = [(down[e] @ (torch.nn.functional.silu(gate[e] @ x) * (up[e] @ x))).norm().item() for e in range(experts)]
        by_norm, by_score = sorted(range(experts), key=norm.__getitem__), sorted(range(experts), key=score.__getitem__)
        for expert in range(experts):
            counts[by_score.index(expert), by_norm.index(expert)] += 1
        hits += len(set(by_norm[-chosen:]) & set(by_score[-chosen:]))
        rhos.append(spearmanr(score.numpy(), norm).statistic)
        norms.append(norm)
    return np.array(norms), counts, np.mean(rhos), hits / len(norms) / chosen


def test_agrees_with_the_reference(make_decoder, text):
    decoder = make_decoder(num_experts=[0, 4, 6], num_experts_per_tok=[0, 2, 3], num_shared_experts=1)
    result = probe(walk(decoder, text, NormVsScore.needs), "norm_vs_score")["norm_vs_score"]
    for layer in (1, 2):
        norms, counts, rho, overlap = reference(decoder, text, layer)
        np.testing.assert_allclose(result.arrays[f"output_norm/{layer}"], norms, rtol=1e-4)
        np.testing.assert_array_equal(result.arrays[f"rank_count_score_by_norm/{layer}"], counts)
        assert result.arrays[f"spearman/{layer}"] == pytest.approx(rho, abs=1e-6)
        assert result.arrays[f"topk_overlap/{layer}"] == pytest.approx(overlap)
        assert result.arrays[f"topk_overlap_random/{layer}"] == pytest.approx(0.5)


def test_counts_of_equally_wide_layers_are_summed(make_decoder, text):
    decoder = make_decoder(num_experts=[4, 6, 4])
    arrays = probe(walk(decoder, text, NormVsScore.needs), "norm_vs_score")["norm_vs_score"].arrays
    one, two, three = (arrays[f"rank_count_score_by_norm/{layer}"] for layer in range(3))
    np.testing.assert_array_equal(arrays["rank_count_all_layers/4"], one + three)
    np.testing.assert_array_equal(arrays["rank_count_all_layers/6"], two)


def test_a_router_that_follows_the_norm(make_decoder, text):
    """Experts scaled so that expert 3 is loudest, then 2, and a router that scores them in that order."""
    decoder = make_decoder(num_hidden_layers=1)
    mlp = decoder.layers[0].mlp
    with torch.no_grad():
        mlp.experts.gate_up_proj[:] = mlp.experts.gate_up_proj[0]
        mlp.experts.down_proj[:] = mlp.experts.down_proj[0] * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
        mlp.router.forward = lambda x, experts, ids: forward(x, experts, torch.tensor([0.0, 1, 2, 3]))
    from moebed.model.routers import Routing

    def forward(x, experts, logits):
        logits = logits.expand(len(x), 4)
        weight, index = logits.softmax(-1).topk(2)
        return Routing(logits, logits.softmax(-1), index, weight)

    result = probe(walk(decoder, text, NormVsScore.needs), "norm_vs_score")["norm_vs_score"]
    np.testing.assert_array_equal(result.arrays["rank_count_score_by_norm/0"], 25 * np.eye(4, dtype=int))
    assert result.headlines["spearman"].value == pytest.approx(1)
    assert result.headlines["topk_overlap"].value == pytest.approx(1)
    assert "prefer" in result.headlines["spearman"].sentence


def test_rank_correlation_with_ties_is_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.integers(4, size=(2, 40, 6)).astype(np.float32)
    want = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(correlation(ranks(a), ranks(b)), want, atol=1e-12)


def test_rank_correlation_of_a_constant_is_zero():
    """Experts just copied from one dense FFN all have the same norm."""
    assert correlation(ranks(np.ones((1, 4))), ranks(np.arange(4.0)[None])).tolist() == [0.0]


def test_layers_of_one_expert_have_no_ranks_and_say_nothing(make_decoder, text):
    few = make_decoder(num_experts=[1, 1, 4], num_experts_per_tok=[1, 1, 2])
    result = probe(walk(few, text, NormVsScore.needs), "norm_vs_score")["norm_vs_score"]
    assert {name for name in result.scalars if "layer" in name} == {"spearman/layer_02", "topk_overlap/layer_02"}
    one = make_decoder(num_experts=1, num_experts_per_tok=1)
    result = probe(walk(one, text, NormVsScore.needs), "norm_vs_score")["norm_vs_score"]
    assert not result.headlines
    assert result.notes == ["no layer has two routed experts to rank"]
