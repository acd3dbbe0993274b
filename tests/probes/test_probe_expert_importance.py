"""expert_importance by hand, with a stand-in for the forward pass that masks an expert out."""

import numpy as np
import pytest
import torch
from output_cases import dense_view, output_view

from probes.expert_importance import NO_ABLATION, ExpertImportance
from probes.figures.drawing import to_rgb
from probes.measures.resampling import LARGEST
from probes.running.driver import run_probes


def run(*views):
    return run_probes(views, [ExpertImportance()])["expert_importance"]


def view(index=0, **more):
    """Three experts with outputs of norm 5, 10 and 1; tokens choose 0 and 1, 1 and 0, 1 and 0."""
    outputs = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]]).unsqueeze(1).repeat(1, 3, 1)
    weight = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]])
    return output_view(outputs, [[0, 1], [1, 0], [1, 0]], index, weight=weight, **more)


def with_loss(view, rises):
    asked = []

    def ablate(expert):
        asked.append(expert)
        rise = 0.0 if expert < 0 else rises[expert]
        return torch.tensor([2.0, 4.0, float("nan")]) + rise * torch.tensor([0.5, 1.5, 1.0])

    view.ablate = ablate
    return asked


def test_reap_by_hand():
    arrays = run(view()).arrays
    np.testing.assert_allclose(arrays["reap/0"], [5 * (0.6 + 0.1 + 0.2) / 3, 10 * (0.4 + 0.9 + 0.8) / 3, 0], rtol=1e-6)
    assert arrays["count/0"].tolist() == [3, 3, 0]


def test_experts_without_tokens_are_named_and_left_out_of_the_mean():
    result = run(view())
    assert result.notes[:2] == ["layer 0: no token went to 1 of 3 experts (2)", NO_ABLATION]
    assert result.notes[2:] == [f"reap_max_to_mean: {LARGEST}"]
    assert result.headlines["reap_max_to_mean"].value == pytest.approx(7 / 4.25)
    assert result.scalars["unused"] == pytest.approx(1 / 3)


def test_shared_expert_and_reference_have_no_part():
    others = {"SE": torch.full((3, 2), 100.0), "F": torch.full((3, 2), 100.0)}
    np.testing.assert_array_equal(run(view(others=others)).arrays["reap/0"], run(view()).arrays["reap/0"])


def test_without_a_whole_model_only_reap():
    assert not any(key.startswith("ablation") for key in run(view()).arrays)


def test_ablation_is_the_mean_rise_without_the_sequences_ends():
    layer = view()
    asked = with_loss(layer, [0.25, 0.5, -0.125])
    result = run(layer)
    assert asked == [-1, 0, 1, 2]
    np.testing.assert_allclose(result.arrays["ablation_loss/0"], [0.25, 0.5, -0.125])
    # Rises of 0.5 r and 1.5 r: standard deviation r / √2, over √2 tokens.
    np.testing.assert_allclose(result.arrays["ablation_error/0"], [0.125, 0.25, 0.0625])
    assert result.headlines["ablation_loss_max"].value == pytest.approx(0.5)
    assert "expert 1 of layer 0" in result.headlines["ablation_loss_max"].sentence
    assert result.headlines["reap_vs_ablation"].value == pytest.approx(1)
    assert NO_ABLATION not in result.notes


def test_no_expert_is_masked_where_all_are_chosen():
    layer = output_view(torch.ones(2, 3, 2), [[0, 1]] * 3)
    asked = with_loss(layer, [1.0, 1.0])
    assert "ablation_loss/0" not in run(layer).arrays
    assert asked == []


def test_ragged_layers_are_drawn():
    layers = [view(0), dense_view(1), output_view(torch.ones(1, 3, 2), [[0]] * 3, 2), view(3)]
    with_loss(layers[0], [0.25, 0.5, -0.125])
    result = run(*layers)
    assert set(result.figures) == {"reap", "ablation", "reap_vs_ablation"}
    for build in result.figures.values():
        to_rgb(build())
    assert all(np.isfinite(value) for value in result.scalars.values())


def test_zero_outputs_and_no_experts():
    result = run(output_view(torch.zeros(2, 3, 2), [[0]] * 3))
    assert result.headlines["reap_max_to_mean"].value == 1
    for build in result.figures.values():
        to_rgb(build())
    assert not run(dense_view()).figures
