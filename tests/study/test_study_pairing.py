"""Arms of one seed begin alike: equal initial weights wherever a parameter's name and shape are equal."""

import dataclasses

import pytest
import torch

from moebed.model.decoder import Decoder
from tests.conftest import tiny_config


def _weights(seed, **changes):
    torch.manual_seed(seed)
    return dict(Decoder(tiny_config(**changes)).named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": [4, 6]},
        {"num_experts": [0, 4], "intermediate_size": 64},
        {"moe_intermediate_size": 40},
        {"num_shared_experts": 1},
        {"qk_norm": "head", "post_norms": True},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_equal_names_and_shapes_begin_equal(changes):
    ours, theirs = _weights(3), _weights(3, **changes)
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert "layers.1.self_attn.o_proj.weight" in shared
    for name in shared:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def test_seeds_and_models_of_one_seed_differ():
    torch.manual_seed(3)
    first, second = (dict(Decoder(tiny_config()).named_parameters()) for _ in range(2))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert not torch.equal(first["lm_head.weight"], _weights(4)["lm_head.weight"])
    names = [name for name, value in first.items() if value.ndim == 3 and value.shape == first[name].shape]
    layers = [first[name] for name in names if name.endswith("down_proj")]
    assert not torch.equal(layers[0], layers[1])


def test_weights_have_the_configured_deviation():
    config = dataclasses.replace(tiny_config(), initializer_range=0.05)
    decoder = Decoder(config)
    matrices = torch.cat([p.flatten() for p in decoder.parameters() if p.ndim > 1])
    assert matrices.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(matrices.mean().item()) < 0.001
