"""Rotary embeddings against transformers' own, and against what they are to mean."""

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moebed.errors import ConfigError
from moebed.model.attention import Attention, turned
from moebed.model.rope import RotaryEmbedding
from moebed.views.attending import attention_groups
from tests.conftest import tiny_config

ORIGINAL = {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LONG = {"rope_type": "longrope", "factor": 4.0, **ORIGINAL}
LISTS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0, **ORIGINAL},
    "yarn": YARN,
    "yarn-truncated": {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.25},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-mscale-alone": {**YARN, "mscale": 0.707},
    "yarn-attention": {**YARN, "attention_factor": 1.7},
    "yarn-shorter": {**YARN, "factor": 0.5},
    "yarn-one-dimension": {**YARN, "beta_fast": 1e-3, "beta_slow": 1e-3},
    "longrope": {**LONG, **LISTS},
    "longrope-attention": {**LONG, **LISTS, "attention_factor": 0.9},
}
CPU = torch.device("cpu")


def config_of(scaling, **changes):
    changes = {"head_dim": 16, "rope_theta": 300.0, "max_position_embeddings": 64} | changes
    return tiny_config(rope_scaling=scaling, **changes)


def test_longrope_may_have_a_magnitude_for_short_texts_and_one_for_long():
    """Phi-3.5-MoE's, in place of the one that follows from the factor."""
    scaling = LONG | LISTS | {"short_mscale": 1.2, "long_mscale": 1.4}
    theirs = transformers.PhimoeConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={**scaling, "rope_theta": 300.0},
    )  # fmt: skip
    for length, magnitude in ((16, 1.2), (17, 1.4)):
        frequency, _ = ROPE_INIT_FUNCTIONS["longrope"](theirs, CPU, seq_len=length)
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
        cos, sin = RotaryEmbedding(config_of(scaling))(0, length, CPU)
        torch.testing.assert_close(cos, angle.cos() * magnitude, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sin, angle.sin() * magnitude, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="short_mscale and long_mscale go together"):
        config_of({name: value for name, value in scaling.items() if name != "long_mscale"})


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_those_of_transformers(name, share, length):
    scaling = dict(SCALINGS[name])
    if share < 1:
        scaling |= {key: value[:4] for key, value in scaling.items() if isinstance(value, list)}
    config = config_of(scaling, partial_rotary_factor=share)
    theirs = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=64,
        rope_parameters={**scaling, "rope_theta": 300.0, "partial_rotary_factor": share},
    )  # fmt: skip
    frequency, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, CPU, seq_len=length)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    cos, sin = RotaryEmbedding(config)(0, length, CPU)
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_every_kind_stretches_or_says_why_not(name):
    """None of the cases above is the plain embedding by another name, but for the one that is."""
    plain = RotaryEmbedding(config_of(None))(0, 40, CPU)[0]
    found = RotaryEmbedding(config_of(SCALINGS[name]))(0, 40, CPU)[0]
    assert torch.equal(plain, found) == (name == "dynamic")


def test_sequences_of_a_table_are_turned_as_if_each_were_alone():
    rotary = RotaryEmbedding(config_of(SCALINGS["longrope"]))
    table = rotary.table(40, CPU)
    for length in (3, 16, 17, 40):
        for found, wanted in zip(table(length), rotary(0, length, CPU), strict=True):
            assert torch.equal(found, wanted)
    assert not torch.equal(table(16)[0], table(17)[0][:16])


def test_short_and_long_sequences_attend_apart():
    lengths = torch.tensor([18, 16, 15, 17, 16])
    assert len(attention_groups(lengths)) == 1
    groups = attention_groups(lengths, boundary=16)
    assert sorted(int((group >= 0).sum(dim=1).max()) for group in groups) == [16, 18]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_does_not_turn_does_not_know_its_position(share):
    config = config_of(None, partial_rotary_factor=share)
    x = torch.randn(1, 2, 5, 16)
    moved = turned(x, RotaryEmbedding(config)(7, 5, CPU))
    width = int(16 * share)
    assert torch.equal(moved[..., width:], x[..., width:])
    assert not torch.isclose(moved[..., :width], x[..., :width]).all(dim=-1).any()


def test_partly_turned_attention_has_one_gradient_on_every_backend():
    found = []
    for backend in ("math", "sdpa", "native"):
        torch.manual_seed(1)
        config = config_of(SCALINGS["yarn"], partial_rotary_factor=0.5, attention_backend=backend)
        layer = Attention(config)
        x = torch.randn(2, 9, config.hidden_size, requires_grad=True)
        layer(x, RotaryEmbedding(config)(0, 9, CPU)).square().sum().backward()
        found.append(torch.cat([x.grad.flatten(), layer.q_proj.weight.grad.flatten()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "proportional", "factor": 2.0}, "its rope_type must be one of linear, dynamic"),
        ({"rope_type": "linear"}, "linear has factor"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "linear has factor"),
        ({"rope_type": "linear", "factor": 0.0}, "rope_scaling.factor is 0.0"),
        ({"rope_type": "linear", "factor": math.inf}, "rope_scaling.factor is inf"),
        ({**YARN, "truncate": 3}, "rope_scaling.truncate is 3"),
        ({**LONG, **LISTS, "short_factor": [1.0]}, "a list of 8 numbers"),
        ({"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 2.0, **ORIGINAL}, "low_freq_factor must be below"),
    ],
)
def test_what_cannot_be_is_refused_by_name(scaling, said):
    with pytest.raises(ConfigError, match=said):
        config_of(scaling)


@pytest.mark.parametrize("share", [0.0, 1.5, 0.19])
def test_a_share_that_leaves_no_pairs_is_refused(share):
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        config_of(None, partial_rotary_factor=share)


def test_a_config_without_a_kind_is_llama_3_s():
    """As configs of moebed had it before there were others."""
    old = {key: value for key, value in SCALINGS["llama3"].items() if key != "rope_type"}
    assert config_of(old).rope_scaling == SCALINGS["llama3"]
