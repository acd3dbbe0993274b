"""balance, router_state and routing on hand-made routings whose answers are known by arithmetic."""

import math

import numpy as np
import pytest
import torch
from probe_cases import all_needs, make_text, probe, routed_view

from moebed.views.layer import LayerView
from moebed.views.live import walk


def logits_choosing(choices: list[list[int]], experts: int) -> torch.Tensor:
    """Logits (T, E) under which each token's choices come in the order given."""
    logits = torch.zeros(len(choices), experts)
    for token, chosen in enumerate(choices):
        for place, expert in enumerate(chosen):
            logits[token, expert] = 5.0 - place
    return logits


def test_balance_of_a_collapsed_router():
    result = probe([routed_view(logits_choosing([[1, 3]] * 10, 8), 2)], "balance")["balance"]
    assert result.arrays["load/0"] == pytest.approx([0, 0.5, 0, 0.5, 0, 0, 0, 0])
    assert result.arrays["max_violation/0"] == pytest.approx(8 / 2 - 1)
    assert result.arrays["cv/0"] == pytest.approx(math.sqrt(3))
    assert result.arrays["entropy/0"] == pytest.approx(math.log(2) / math.log(8))
    assert result.arrays["dead/0"] == 6
    assert result.headlines["dead_share"].value == 6 / 8


def test_balance_of_an_even_router():
    choices = [[token % 8, (token + 1) % 8] for token in range(16)]
    arrays = probe([routed_view(logits_choosing(choices, 8), 2)], "balance")["balance"].arrays
    assert arrays["max_violation/0"] == pytest.approx(0)
    assert arrays["cv/0"] == pytest.approx(0)
    assert arrays["entropy/0"] == pytest.approx(1)
    assert arrays["dead/0"] == 0


def test_balance_with_one_expert_is_balanced():
    result = probe([routed_view(torch.randn(5, 1), 1)], "balance")["balance"]
    assert [float(result.arrays[f"{key}/0"]) for key in ("max_violation", "cv", "entropy", "dead")] == [0, 0, 1, 0]


def test_balance_scalars_are_means_over_layers():
    collapsed = routed_view(logits_choosing([[0]] * 4, 4), 1, index=2)
    even = routed_view(logits_choosing([[0], [1], [2], [3]], 4), 1, index=10)
    scalars = probe([collapsed, even], "balance")["balance"].scalars
    assert scalars["max_violation/layer_02"] == pytest.approx(3)
    assert scalars["max_violation/layer_10"] == pytest.approx(0)
    assert scalars["max_violation"] == pytest.approx(1.5)


def test_router_state_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    arrays = probe([routed_view(probs.log(), 2)], "router_state")["router_state"].arrays
    assert arrays["margin/0"] == pytest.approx([0.125, 0])
    assert arrays["router_entropy/0"] == pytest.approx([1.75 * math.log(2), math.log(4)])
    assert arrays["logit_norm/0"] == pytest.approx(probs.log().square().sum(1).sqrt().numpy())


def test_margin_where_every_expert_is_chosen_is_the_last_probability():
    probs = torch.tensor([[0.7, 0.2, 0.1]])
    arrays = probe([routed_view(probs.log(), 3)], "router_state")["router_state"].arrays
    assert arrays["margin/0"] == pytest.approx([0.1])


def test_entropy_of_a_certain_router_is_zero_not_nan():
    arrays = probe([routed_view(torch.tensor([[1000.0, 0, 0]]), 1)], "router_state")["router_state"].arrays
    assert arrays["router_entropy/0"] == pytest.approx([0])


def test_routing_orders_an_unsorted_choice():
    view = routed_view(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2, text=make_text([1], 1))
    view.routing = view.routing._replace(
        topk_index=view.routing.topk_index.flip(1), topk_weight=view.routing.topk_weight.flip(1)
    )
    arrays = probe([view], "routing")["routing"].arrays
    assert arrays["topk_index/0"].tolist() == [[1, 3]]
    assert arrays["topk_weight/0"][0, 0] > arrays["topk_weight/0"][0, 1]


def test_routing_joins_sequences(make_decoder, text):
    result = probe(walk(make_decoder(), text, all_needs()), "routing")["routing"]
    assert result.arrays["sequence_start"].tolist() == [0, 10, 16]
    assert result.arrays["token_ids"].tolist() == text.input_ids[text.token_mask].tolist()
    assert result.arrays["router_probs/2"].shape == (25, 4)
    mass = np.mean([result.scalars[f"topk_mass/layer_0{layer}"] for layer in range(3)])
    assert result.headlines["topk_mass"].value == pytest.approx(mass)
    assert 0.5 < mass < 1


@pytest.mark.parametrize("name", ["balance", "router_state", "routing", "norm_vs_score"])
def test_a_dense_model_gives_a_note_and_nothing_else(name):
    result = probe([LayerView(0, 1, 0, 0, None)], name)[name]
    assert result.notes
    assert not result.arrays
    assert not result.figures
