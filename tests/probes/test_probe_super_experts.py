"""super_experts: a planted one, a model without, and what the percentile does by itself."""

import numpy as np
import pytest
import torch
from probe_cases import make_text

from moebed.views.interventions import chosen_experts
from moebed.views.layer import LayerView
from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.running.driver import run_probes
from probes.super_experts import SuperExperts, stand_out


def run(decoder, text):
    return run_probes(walk(decoder, text, SuperExperts.needs), [SuperExperts()])["super_experts"]


@pytest.fixture
def texts():
    return make_text([10, 9, 8, 10], width=10)


def test_a_planted_one_is_found_with_its_place(make_decoder, texts):
    """Channel 5 of expert 2 in layer 1, on the one word that goes there with a large input."""
    decoder = make_decoder(num_experts_per_tok=1).eval()
    word = int(texts.input_ids[2, 0])
    with torch.no_grad():
        for block in decoder.layers:
            block.self_attn.o_proj.weight.zero_()
        decoder.embed_tokens.weight[:, 0] = 0
        decoder.embed_tokens.weight[word, 0] = 8
        for block in decoder.layers:
            block.mlp.router.weight.zero_()
            block.mlp.router.weight[2, 0] = 9.0
            block.mlp.router.weight[0, 1], block.mlp.router.weight[1, 1] = 0.1, -0.1  # the other words: one of these
            block.mlp.experts.down_proj[:, 0] = 0
        decoder.layers[1].mlp.experts.down_proj[2, 5] *= 1e3
    result = run(decoder, texts)
    assert result.arrays["super"].tolist() == [[1, 2]]
    token, position, channel = result.arrays["max_at/1"][2]
    assert int(texts.token_ids[token]) == word
    assert (position, channel) == (int(texts.position[token]), 5)
    assert "massive activations in the residual stream from layer 2 on" in result.headlines["found"].sentence
    assert result.scalars["rise"] != 0
    own, every = result.arrays["max_abs/1"], result.arrays["max_abs_all/1"]
    assert (every >= own).all()
    for build in result.figures.values():
        to_rgb(build())


def test_a_model_without_one_has_one_by_the_rule_and_none_by_the_residual(make_decoder, texts):
    result = run(make_decoder(), texts)
    assert len(result.arrays["super"]) == 1
    assert "no massive activations" in result.headlines["found"].sentence
    assert any("always leaves one" in note for note in result.notes)
    (layer, expert) = result.arrays["super"][0]
    assert result.arrays[f"max_abs/{layer}"][expert] == max(result.arrays[f"max_abs/{n}"].max() for n in range(3))
    assert result.arrays["other_rise"].shape == (1, 20, 4)
    assert np.isfinite(result.arrays["other_rise"][0, :3]).all()  # the three others of its layer
    assert np.isnan(result.arrays["other_rise"][0, 3:]).all()


def test_it_is_the_largest_of_all_of_an_expert_s_own_tokens(make_decoder, texts):
    decoder = make_decoder().requires_grad_(False)
    arrays = run(decoder, texts).arrays
    for view in walk(decoder, texts, SuperExperts.needs):
        if isinstance(view, LayerView):
            outputs, chosen = list(view.experts()), chosen_experts(view.routing)
            every, own = arrays[f"max_abs_all/{view.index}"], arrays[f"max_abs/{view.index}"]
            for one in outputs:
                size = one.output.abs().amax(dim=1)
                assert every[one.index] == pytest.approx(float(size.max()))
                assert own[one.index] == pytest.approx(float(size[chosen[:, one.index]].max()))


@pytest.mark.parametrize(("most", "median", "massive"), [(90, 0.01, False), (150, 0.2, False), (150, 0.1, True)])
def test_massive_is_large_and_far_above_the_median(most, median, massive):
    arrays = {"max_abs/1": np.array([1.0, 2]), "max_at/1": np.zeros((2, 3), int)}
    arrays |= {"residual_max/1": np.array(float(most)), "residual_median/1": np.array(median)}
    said = SuperExperts.describe(arrays).headlines["found"].sentence
    assert ("no massive" not in said) == massive


def test_the_rule_by_hand():
    sizes = {0: np.ones(200), 3: np.ones(200)}
    sizes[3][7] = 50
    sizes[0][1] = 4.9
    assert stand_out(sizes).tolist() == [[3, 7]]
    sizes[0][1] = 5.1
    assert stand_out(sizes).tolist() == [[3, 7], [0, 1]]
    assert len(stand_out({})) == 0


def test_layers_without_text_or_experts_are_left_out(make_decoder, texts):
    assert "no layer" in run(make_decoder(num_experts=0), texts).notes[0]
    ragged = run(make_decoder(num_experts=[0, 4, 2]), texts)
    assert set(ragged.arrays) >= {"max_abs/1", "max_abs/2"}


def test_where_none_stands_out_none_is_named(make_decoder, texts):
    result = run(make_decoder(num_experts=1, num_experts_per_tok=1, num_hidden_layers=1), texts)
    assert result.headlines["found"].sentence.startswith("0 of 1 experts stand out, ")
    assert not any("always leaves one" in note for note in result.notes)
