"""norm_origin: shares that can be told by hand, a reference by least squares, norm routers, layers without variance."""

import numpy as np
import pytest
import torch
from probe_cases import probe

from moebed.views.layer import Need
from moebed.views.live import walk
from probes.measures.resampling import Units
from probes.norm_origin import PARTS, NormOrigin, shares_by_unit


def by_least_squares(values, seen):
    """Sums of squares of nested linear models with dummies for tokens and experts, by numpy's lstsq."""
    tokens, experts = values.shape
    y = np.log(values).ravel()
    one = np.ones((tokens * experts, 1))
    token = np.repeat(np.eye(tokens), experts, axis=0)
    expert = np.tile(np.eye(experts), (tokens, 1))
    size = np.repeat(np.log(seen), experts)[:, None]

    def left(*columns):
        x = np.hstack([one, *columns])
        return np.sum((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2)

    steps = [left(), left(size), left(token), left(token, expert), 0.0]
    return -np.diff(steps) / steps[0]


def shares_of_log(values, seen):
    """The shares of a text that is one unit."""
    found = shares_by_unit(values, seen, Units(np.zeros(len(values), np.int64), np.zeros(1, np.int64)))
    return None if found is None else found[0]


def test_the_parts_are_those_of_least_squares():
    draw = np.random.default_rng(0)
    seen = np.exp(draw.normal(size=30))
    values = np.exp(np.log(seen)[:, None] + draw.normal(size=(30, 1)) + draw.normal(size=5) + draw.normal(size=(30, 5)))
    found = shares_of_log(values, seen)
    np.testing.assert_allclose(found, by_least_squares(values, seen), atol=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert (found > 0.02).all()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (lambda seen, token, expert: np.tile(seen[:, None] ** 2, (1, 4)), "input"),
        (lambda seen, token, expert: np.tile(token[:, None], (1, 4)), "token"),
        (lambda seen, token, expert: np.tile(expert, (8, 1)), "expert"),
        (lambda seen, token, expert: np.where((np.arange(8)[:, None] + np.arange(4)) % 2, 2.0, 3.0), "choice"),
    ],
)
def test_each_part_alone(values, part):
    seen = np.exp([1.0, -1, 1, -1, 2, -2, 2, -2])
    token = np.exp([1.0, 1, -1, -1, 1, 1, -1, -1])  # its logarithm is uncorrelated with that of seen
    found = shares_of_log(values(seen, token, np.array([1.0, 2, 3, 4])), seen)
    np.testing.assert_allclose(found, [name == part for name in PARTS], atol=1e-6)


def test_zero_norms_are_left_out_and_equal_ones_have_no_shares():
    draw = np.random.default_rng(1)
    seen, values = np.exp(draw.normal(size=9)), np.exp(draw.normal(size=(9, 3)))
    holed = values.copy()
    holed[4, 1] = 0
    np.testing.assert_allclose(
        shares_of_log(holed, seen), shares_of_log(np.delete(values, 4, axis=0), np.delete(seen, 4)), rtol=1e-6
    )
    assert shares_of_log(np.ones((5, 3)), seen[:5]) is None
    assert shares_of_log(np.zeros((5, 3)), seen[:5]) is None
    equal = shares_of_log(values, np.ones(9))  # behind a normalisation without weights
    assert equal[0] == 0


def run(decoder, text):
    return probe(walk(decoder, text, NormOrigin.needs | {Need.OUTPUTS}), "norm_vs_score", "norm_origin")


def test_of_a_model(make_decoder, text):
    decoder = make_decoder(num_experts=[0, 4, 6], num_shared_experts=1)
    with torch.no_grad():  # fresh ones are 1, and leave all hidden states of one norm
        for layer in decoder.layers:
            layer.pre_ffn_norm.weight.copy_(torch.linspace(0.1, 2, decoder.config.hidden_size))
    found = run(decoder, text)
    result, norms = found["norm_origin"], found["norm_vs_score"].arrays
    views = {v.index: v for v in walk(decoder, text, frozenset({Need.ROUTING}))}
    for layer in (1, 2):
        seen = views[layer].moe_input.norm(dim=-1).numpy()
        np.testing.assert_allclose(result.arrays[f"input_norm/{layer}"], seen, rtol=1e-6)
        want = by_least_squares(norms[f"output_norm/{layer}"].astype(float), seen.astype(float))
        np.testing.assert_allclose(result.arrays[f"norm_share/{layer}"], want, atol=1e-5)
    assert "norm_share/0" not in result.arrays
    assert not [key for key in result.arrays if key.startswith("score_share")]  # a softmax gate's logits have signs
    choice = result.headlines["norm_choice"]
    assert choice.value == pytest.approx(np.mean([result.arrays[f"norm_share/{n}"][3] for n in (1, 2)]))
    assert f"{choice.value:.0%} is which expert meets which token" in choice.sentence
    assert len(result.figures["over_depth"]().axes) == 1


def test_the_score_of_a_norm_router_is_its_outputs_norm(make_decoder, text):
    decoder = make_decoder(router="expert_norm")
    result = probe(walk(decoder, text, NormOrigin.needs | {Need.OUTPUTS}), "norm_vs_score", "norm_origin")[
        "norm_origin"
    ]
    layers = range(decoder.config.num_hidden_layers)
    for layer in layers:
        np.testing.assert_allclose(
            result.arrays[f"score_share/{layer}"], result.arrays[f"norm_share/{layer}"], atol=1e-4
        )
    assert set(result.headlines) == {"norm_choice", "score_choice"}
    assert len(result.figures["over_depth"]().axes) == 2


def test_a_model_whose_experts_answer_nothing(make_decoder, text):
    decoder = make_decoder()
    with torch.no_grad():
        for layer in decoder.layers:
            layer.mlp.experts.down_proj.zero_()
    result = probe(walk(decoder, text, NormOrigin.needs | {Need.OUTPUTS}), "norm_vs_score", "norm_origin")[
        "norm_origin"
    ]
    assert not result.headlines
    assert result.notes == ["no layer has seen text with experts whose norms differ"]


def test_norms_that_are_one_but_for_rounding_explain_nothing():
    """An RMSNorm's epsilon takes some of small tokens: too little to make the outputs what they are."""
    draw = np.random.default_rng(2)
    small = draw.uniform(size=40)
    values = np.exp(small)[:, None] * np.ones((40, 3))
    assert shares_of_log(values, 1 + 1e-4 * small)[0] == 0
    assert shares_of_log(values, 1 + 1e-2 * small)[0] > 0.99
