"""ModelConfig: what it accepts, what it refuses, and in which words."""

import dataclasses

import numpy as np
import pytest

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5 but layer 0 has 4 experts"),
        ({"num_experts": [4, 1]}, "num_experts_per_tok is 2 but layer 1 has 1 experts"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_experts": [4, 4, 4]}, "num_experts lists 3 numbers for 2 layers"),
        ({"num_experts": [0, 4]}, "layer 0 has no experts: give intermediate_size"),
        ({"moe_intermediate_size": None}, "give moe_intermediate_size"),
        ({"num_experts": -1}, "num_experts is -1 in layer 0"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; choose one of silu"),
        (
            {"head_dim": 7},
            "of which 7 dimensions turn (partial_rotary_factor 1.0); rotary embeddings need an even number",
        ),
        ({"attention_backend": "sdpa", "attn_logit_softcapping": 30.0}, "sdpa cannot apply attn_logit_softcapping"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
        ({"output_diversity_loss_coef": -1.0}, "output_diversity_loss_coef is -1.0"),
        ({"router": "relu", "output_diversity_loss_coef": 0.1}, "router relu has no fixed K"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_refuses_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=r"^model config: ") as caught:
        tiny_config(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["4x", [["4"]]], ids=str)
def test_every_field_refuses_what_is_of_another_kind(wrong):
    """In files and in Python; a command line of the class sees to it by itself."""
    for one in dataclasses.fields(ModelConfig):
        with pytest.raises(ConfigError, match=rf"^model config: {one.name} is .*; (it must be|choose one of) "):
            tiny_config(**{one.name: wrong})


def test_numbers_are_taken_as_they_come():
    """Whole ones of numpy, and whole ones where others may stand; not true and false."""
    assert tiny_config(num_experts=np.int64(4), rope_theta=10000, num_experts_per_tok=(2, 1)).rope_theta == 10000
    with pytest.raises(ConfigError, match="num_experts is True; it must be a whole number or a list with a whole num"):
        tiny_config(num_experts=True)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown key 'num_expert'; did you mean 'num_experts'"):
        ModelConfig.from_dict({"num_expert": 8})


def test_per_layer_lists_and_round_trip():
    config = tiny_config(
        num_hidden_layers=3, num_experts=[0, 2, 4], num_experts_per_tok=[1, 1, 3], intermediate_size=64
    )
    assert config.moe_layers == [1, 2]
    assert config.layer(2).num_experts == 4
    assert config.layer(2).num_experts_per_tok == 3
    assert ModelConfig.from_dict(config.to_dict()) == config
