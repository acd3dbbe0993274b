"""Settings of HyperMoE (2402.12656) and of its controls: what each costs, and what cannot be."""

from dataclasses import replace

import pytest
import torch

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters, flops_per_token, generator_flops, scaling_sizes
from tests.conftest import tiny_config
from tests.model.test_hyper_experts import IDS, config_of


def test_4_5_and_4_7_the_constant_control_has_equal_parameters_and_flops():
    sizes = {count_parameters(config_of(kind)) for kind in ("unchosen", "constant")}
    assert len(sizes) == 1
    assert flops_per_token(config_of("unchosen"), 64) == flops_per_token(config_of("constant"), 64)
    # All but what generates: six sets of two in four experts, and one.
    assert generator_flops(config_of("unchosen"), 100) == 6 * generator_flops(config_of("constant"), 100)


def test_4_7_parameters_by_the_formula():
    """L·(128 E + 2·(128² + 128) + 10) + 139·128 + 129·(2·64·H + H + 64): 6.6 M at H 384, 6 layers, E 8."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_experts": 8, "moe_intermediate_size": 512}
    plain, hyper = ModelConfig(**sizes), ModelConfig(**sizes, hyper_experts={})
    formula = 6 * (128 * 8 + 2 * (128**2 + 128) + 10) + 139 * 128 + 129 * (2 * 64 * 384 + 384 + 64)
    assert formula == pytest.approx(6.6e6, rel=0.01)
    with torch.device("meta"):
        built = [sum(p.numel() for p in Decoder(config).parameters()) for config in (plain, hyper)]
    assert built[1] - built[0] == count_parameters(hyper)[0] - count_parameters(plain)[0] == formula
    one_set = 6 * (2 * 64 * 384 + 384 + 64)
    assert count_parameters(hyper)[1] - count_parameters(plain)[1] == one_set
    assert flops_per_token(hyper, 256) - flops_per_token(plain, 256) == 2 * one_set
    assert scaling_sizes(hyper)["dense_parameters"] == scaling_sizes(plain)["dense_parameters"]


@pytest.mark.parametrize("shared", [0, 2])
def test_shared_experts_of_equal_size(shared):
    """4·A·H FLOPs a token are a gated FFN of width 2A/3: 43 for 64; or as many parameters as generator and tables."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_experts": 8, "moe_intermediate_size": 100}
    plain = ModelConfig(**sizes, num_shared_experts=shared)
    models = {kind: replace(plain, hyper_experts={"adapters": kind}) for kind in
              ("unchosen", "shared_equal_flops", "shared_equal_parameters")}  # fmt: skip
    before = 100 * shared
    assert models["shared_equal_flops"].layer(0).shared_intermediate_size == before + 43
    assert all(models[kind].hyper_experts is None for kind in models if kind != "unchosen")
    flops = {kind: flops_per_token(model, 256) for kind, model in models.items()}
    assert flops["shared_equal_flops"] == pytest.approx(flops["unchosen"], rel=0.002)
    parameters = {kind: count_parameters(model)[0] for kind, model in models.items()}
    assert parameters["shared_equal_parameters"] == pytest.approx(parameters["unchosen"], rel=1e-3)
    again = ModelConfig.from_dict(models["shared_equal_flops"].to_dict())
    assert again == models["shared_equal_flops"]


def test_shared_experts_only_where_there_are_experts():
    config = config_of("shared_equal_flops", num_experts=[0, 4], intermediate_size=40, num_shared_experts=[0, 1])
    assert config.layer(1).shared_intermediate_size == 48 + round(2 * 8 / 3)
    Decoder(config)(IDS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hyper_experts": {"adapter": 4}}, "unknown key 'adapter' in hyper_experts; did you mean 'adapters'"),
        ({"hyper_experts": {"adapters": "unchoosen"}}, "did you mean 'unchosen'"),
        ({"hyper_experts": {"adapter_size": 0}}, "adapter_size is 0"),
        ({"hyper_experts": "unchosen"}, "it must be settings by name"),
        ({"hyper_experts": {}, "num_experts": 0, "intermediate_size": 8}, "num_experts is 0"),
        ({"hyper_experts": {"adapters": "free"}}, "num_experts_per_tok 1"),
        ({"hyper_experts": {"adapters": "free"}, "num_experts_per_tok": 1, "router": "relu"}, "fixed K"),
        (
            {"hyper_experts": {"adapters": "shared_equal_flops"}, "num_shared_experts": [1, 2]},
            "shared experts of different widths",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        tiny_config(**changes)
    assert "\n" not in str(error.value)
