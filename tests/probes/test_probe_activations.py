"""activations: shares that can be counted by hand, ties with the thresholds, groups of neurons."""

import numpy as np
import pytest
import torch
from output_cases import dense_view, output_view, plain_text

from probes.activations import Activations
from probes.figures.drawing import to_rgb
from probes.running.driver import run_probes


def run(*views):
    return run_probes(views, [Activations()])["activations"]


def view(acts, index=0, **more):
    experts, tokens, _ = acts.shape
    return output_view(torch.ones(experts, tokens, 2), [[0]] * tokens, index, acts=acts, **more)


def test_shares_by_hand():
    """What lies on a threshold is not beyond it; the sign counts for one share and not for the other."""
    edge = np.float32(1e-3)
    first = [[0.5, -0.5, 0.0, float(edge)], [2.0, 2.0, 2.0, 2.0]]
    second = [[-1.0, -1.0, -1.0, -1.0], [1e-30, -1e-30, 0.0, float(np.nextafter(edge, np.float32(1)))]]
    arrays = run(view(torch.tensor([first, second]))).arrays
    assert arrays["act_gate_frac_above_1e-3/0"].tolist() == [[0.5, 1.0], [1.0, 0.25]]
    assert arrays["act_gate_frac_positive/0"].tolist() == [[0.5, 0.0], [1.0, 0.5]]
    want = [[(1 + 1e-3) / 4, 1.0], [2.0, 1e-3 / 4]]
    np.testing.assert_allclose(arrays["act_gate_absmean/0"], want, rtol=1e-5)


def test_blocks_of_tokens_change_nothing(monkeypatch):
    acts = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(0))
    whole = run(view(acts)).arrays
    monkeypatch.setattr("probes.activations._BLOCK_ELEMENTS", 24)  # 4 tokens
    for key, value in run(view(acts)).arrays.items():
        np.testing.assert_array_equal(value, whole[key])


def test_headlines_are_means_over_all_layers():
    low, high = torch.zeros(2, 3, 4), torch.ones(5, 3, 8)
    result = run(view(low, 0), dense_view(1), view(high, 2))
    assert result.headlines["frac_above_1e-3"].value == pytest.approx(0.5)
    assert result.scalars["frac_positive/layer_02"] == 1
    assert "frac_positive/layer_01" not in result.scalars


def test_groups_of_neurons_are_means_of_sizes():
    """256 neurons in 128 groups of two; 5 in 5; with 130, two groups have two."""
    acts = torch.arange(256.0).repeat(1, 2, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    found = run(view(acts)).arrays["act_gate_map/0"]
    assert found.shape == (2, 1, 128)
    np.testing.assert_array_equal(found[0, 0], np.arange(256).reshape(128, 2).mean(1))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(run(view(acts[..., :5])).arrays["act_gate_map/0"][1, 0], np.arange(5))
    uneven = run(view(torch.ones(1, 1, 130))).arrays["act_gate_map/0"]
    np.testing.assert_array_equal(uneven, np.ones((1, 1, 128)))


@pytest.mark.parametrize(("tokens", "drawn"), [(8, True), (9, False)])
def test_activations_themselves_only_of_short_texts(tokens, drawn):
    result = run(view(torch.randn(3, tokens, 4), text=plain_text([tokens])))
    assert ("act_gate_map/0" in result.arrays) == ("neurons" in result.figures) == drawn
    for build in result.figures.values():
        to_rgb(build())


def test_no_experts():
    result = run(dense_view())
    assert result.notes
    assert not result.figures
