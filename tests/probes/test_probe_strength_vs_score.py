"""strength_vs_score: planted strengths, and scipy on the activations of a live model."""

import numpy as np
import pytest
import torch
from output_cases import dense_view, output_view, plain_text
from probe_cases import probe
from scipy.stats import rankdata, spearmanr

from moebed.views.layer import Need
from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.strength_vs_score import StrengthVsScore

TOKENS, EXPERTS = 400, 5


def layer(logits, strength, size=None, chosen=2):
    """A layer whose experts' four neurons are all as strongly activated (T, E), and whose inputs have these norms."""
    probs = logits.softmax(dim=1)
    choice = probs.topk(chosen, dim=1).indices.tolist()
    acts = strength.T.unsqueeze(2).expand(-1, -1, 4) * torch.tensor([1.0, -1, 1, -1])
    outputs = torch.zeros(logits.shape[1], len(logits), 1)
    view = output_view(outputs, choice, acts=acts, probs=probs, text=plain_text([len(logits) // 4] * 4))
    view.moe_input = torch.ones(len(logits), 1) if size is None else size.unsqueeze(1)
    return view


def found(*views):
    return probe(views, "strength_vs_score")["strength_vs_score"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_strength_that_follows_the_score():
    logits = normal(TOKENS, EXPERTS)
    result = found(layer(logits, logits.softmax(dim=1)))
    for key in ("score_strength_expert", "score_strength_own"):
        assert result.arrays[f"{key}/0"] == pytest.approx(np.ones(EXPERTS))
    assert result.headlines["score_strength_token"].value == pytest.approx(1)
    assert found(layer(logits, 1 - logits.softmax(dim=1))).headlines["score_strength_token"].value == pytest.approx(-1)
    for build in result.figures.values():
        to_rgb(build())


def test_strength_that_has_nothing_to_do_with_the_score():
    result = found(layer(normal(TOKENS, EXPERTS), normal(TOKENS, EXPERTS, seed=1).abs()))
    low, high = result.headlines["score_strength_token"].interval
    assert low < 0 < high
    assert all(abs(result.scalars[key]) < 0.1 for key in ("score_strength_expert", "score_strength_own"))


def test_what_both_owe_to_the_tokens_norm_is_taken_out():
    """The first expert's score and strength follow ‖x‖, and nothing else."""
    size = normal(TOKENS).abs() + 0.1
    logits = 0.1 * normal(TOKENS, EXPERTS)
    logits[:, 0] += 3 * size
    strength = size.unsqueeze(1) * (1 + 0.2 * normal(TOKENS, EXPERTS, seed=1).abs())
    arrays = found(layer(logits, strength, size)).arrays
    assert arrays["score_strength_expert/0"][0] > 0.9
    assert abs(arrays["score_strength_expert_partial/0"][0]) < 0.15


def test_norms_that_are_one_but_for_rounding_hold_nothing_constant():
    """An RMSNorm whose weights are all alike: the order of such norms is another on another device."""
    logits, jitter = normal(TOKENS, EXPERTS), normal(TOKENS, seed=2)
    strength = logits.softmax(dim=1) + normal(TOKENS, EXPERTS, seed=1).abs()
    alike, other = (found(layer(logits, strength, 5 + 1e-4 * sign * jitter)).arrays for sign in (1, -1))
    for key in ("score_strength_expert", "score_strength_own"):
        for arrays in (alike, other):
            np.testing.assert_array_equal(arrays[f"{key}_partial/0"], arrays[f"{key}/0"])


def test_it_is_scipys(make_decoder, text):
    decoder = make_decoder(num_experts=[4, 0, 6], num_experts_per_tok=[2, 0, 3])
    with torch.no_grad():
        for block in decoder.layers:
            block.pre_ffn_norm.weight.copy_(normal(16).abs())  # else all inputs have one norm
    result = found(*walk(decoder, text, StrengthVsScore.needs))
    for view in walk(decoder, text, frozenset({Need.ROUTING})):
        if not view.num_experts:
            continue
        x, gate = view.moe_input.double(), view.matrix("gate").double()
        act = torch.nn.functional.silu(torch.einsum("efh,th->tef", gate, x))
        strength = (act.square().mean(dim=2) ** 0.5).numpy()  # (T, E)
        score, size = view.routing.router_probs.double().numpy(), x.norm(dim=1).numpy()
        rho = np.mean([spearmanr(a, b).statistic for a, b in zip(score, strength, strict=True)])
        assert result.arrays[f"score_strength_token/{view.index}"] == pytest.approx(rho, abs=1e-5)
        chosen = [(view.routing.topk_index == e).any(dim=1).numpy() for e in range(view.num_experts)]
        for key, taken in (("expert", [np.ones(len(x), bool)] * view.num_experts), ("own", chosen)):
            for e, own in enumerate(taken):
                plain = result.arrays[f"score_strength_{key}/{view.index}"][e]
                given = result.arrays[f"score_strength_{key}_partial/{view.index}"][e]
                if own.sum() < 10:
                    assert np.isnan(plain)
                    assert np.isnan(given)
                    continue
                assert plain == pytest.approx(spearmanr(score[own, e], strength[own, e]).statistic, abs=1e-5)
                a, b, c = (rankdata(values[own]) for values in (score[:, e], strength[:, e], size))
                line = np.polynomial.Polynomial.fit
                left = [v - line(c, v, 1)(c) for v in (a, b)]  # what the norm's rank does not explain
                assert given == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-4)


def test_inputs_of_one_norm_are_not_told_apart_by_their_rounding():
    size = 4 + 1e-6 * normal(TOKENS)
    arrays = found(layer(normal(TOKENS, EXPERTS), normal(TOKENS, EXPERTS, seed=1).abs(), size)).arrays
    np.testing.assert_array_equal(arrays["score_strength_expert/0"], arrays["score_strength_expert_partial/0"])


def test_layers_without_anything_to_rank_say_so():
    same = layer(torch.zeros(8, EXPERTS), torch.ones(8, EXPERTS))
    for views in ([dense_view()], [same]):
        result = found(*views)
        assert result.notes
        assert not result.headlines
