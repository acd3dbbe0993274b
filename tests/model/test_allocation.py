"""Allocations of experts over layers: what they come to, what stays equal, and what is refused."""

import json
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebed.errors import ConfigError
from moebed.model.allocation import deal
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters, flops_per_token
from tests.conftest import tiny_config


def _config(allocation, **changes) -> ModelConfig:
    return tiny_config(**{"num_hidden_layers": 6, "num_experts": 8, "allocation": allocation, **changes})


@pytest.mark.parametrize(
    ("allocation", "counts"),
    [
        ("uniform", [8, 8, 8, 8, 8, 8]),
        ("ascending", [4, 6, 7, 9, 10, 12]),
        ("ascending_small_last", [4, 7, 9, 11, 13, 4]),
        ("descending", [12, 10, 9, 7, 6, 4]),
        ([1, 2, 2, 3, 3, 1], [4, 8, 8, 12, 12, 4]),
        ({"dense_at": 0}, [0, 9, 10, 9, 9, 9]),
        ({"dense_at": 5}, [9, 9, 10, 9, 9, 0]),
        ([0, 1, 1, 1, 1, 0.5], [0, 10, 11, 10, 10, 5]),
    ],
)
def test_counts(allocation, counts):
    assert _config(allocation).num_experts == counts


@pytest.mark.parametrize("allocation", ["ascending", "ascending_small_last", "descending", [5, 1, 1, 1, 1, 3]])
@pytest.mark.parametrize("shared", [0, 2])
def test_shapes_keep_parameters_and_flops_exactly(allocation, shared):
    one, other = _config(None, num_shared_experts=shared), _config(allocation, num_shared_experts=shared)
    assert count_parameters(one) == count_parameters(other)
    assert flops_per_token(one, 128) == flops_per_token(other, 128)


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("shared", [0, 2])
def test_a_dense_layer_leaves_the_router_rows_of_the_active_experts(layer, shared):
    """Its width is that of the experts a token passes, so all that is missing is K router rows of H."""
    one, other = _config(None, num_shared_experts=shared), _config({"dense_at": layer}, num_shared_experts=shared)
    assert other.num_experts[layer] == 0
    assert other.intermediate_size == (2 + shared) * 48
    missing = 2 * 32
    assert [a - b for a, b in zip(count_parameters(one), count_parameters(other), strict=True)] == [missing, missing]
    assert flops_per_token(one, 128) - flops_per_token(other, 128) == 2 * missing


def test_a_wider_dense_layer_takes_more_experts_from_the_others():
    config = _config({"dense_at": 2}, intermediate_size=8 * 48)
    assert config.num_experts == [8, 8, 0, 8, 8, 8]
    assert count_parameters(config)[0] == count_parameters(_config(None))[0] - 8 * 32


def test_the_lists_are_what_is_kept():
    """A config written as plain data is read back without its allocation, and once more with it is an error."""
    config = _config("ascending")
    data = json.loads(json.dumps(config.to_dict()))
    assert "allocation" not in data
    assert ModelConfig.from_dict(data) == config
    with pytest.raises(ConfigError, match="spreads one number over the layers, but num_experts is"):
        ModelConfig.from_dict({**data, "allocation": "ascending"})


def test_from_plain_data_with_an_allocation():
    plain = _config(None).to_dict()
    assert ModelConfig.from_dict({**plain, "allocation": "descending"}) == _config("descending")


@pytest.mark.parametrize("allocation", ["ascending", {"dense_at": 1}])
def test_the_model_has_what_the_config_counts(allocation):
    config = _config(allocation)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count_parameters(config)[0]


@pytest.mark.parametrize(
    ("allocation", "changes", "words"),
    [
        ("rising", {}, "allocation is 'rising'; choose one of uniform"),
        ({"dense_at": 6}, {}, "dense_at is 6; the layers are 0 to 5"),
        ({"moe_at": 1}, {}, "choose one of uniform"),
        ([1, 2], {}, "allocation lists 2 sizes for 6 layers"),
        ([1, 2, 3, 4, 5, -1], {}, "must not be negative"),
        ("ascending", {"num_experts": 2}, "num_experts_per_tok is 2 but layer 0 has 1 experts"),
        ("ascending", {"num_experts": 0, "intermediate_size": 8}, "needs experts; num_experts is 0"),
        ({"dense_at": 0}, {"intermediate_size": 48 * 47}, "leaves no expert for layer"),
        ([0, 0, 0, 0, 0, 1], {"intermediate_size": 48 * 20}, "leaves no expert for layer 5"),
    ],
)
def test_what_does_not_fit_is_one_line(allocation, changes, words):
    with pytest.raises(ConfigError, match=r"^model config: ") as caught:
        _config(allocation, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 500))
def test_dealing_keeps_the_sum_and_the_order(weights, budget):
    counts = deal([Fraction(weight) for weight in weights], budget)
    assert sum(counts) == budget
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight * budget / sum(weights)) < 1
    pairs = sorted(zip(weights, counts, strict=True))
    for (lighter, fewer), (heavier, more) in pairwise(pairs):
        assert lighter == heavier or fewer <= more
