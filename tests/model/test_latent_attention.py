"""Latent attention: every backend and a cache give one result, and what it cannot be is refused."""

import pytest
import torch

from moebed.errors import ConfigError
from moebed.model.attention import KVCache
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters
from moebed.model.generate import generate
from moebed.model.latent_attention import LatentAttention, build_attention
from moebed.model.rope import RotaryEmbedding
from tests.conftest import tiny_config

LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4}
CASES = {
    "plain queries": LATENT,
    "queries of a latent": {**LATENT, "q_lora_rank": 10},
    "neighbours turn": {**LATENT, "rope_interleave": True},
    "values wider than keys": {**LATENT, "v_head_dim": 16},
    "a window": {**LATENT, "sliding_window": 5},
}
CPU = torch.device("cpu")


def layer_of(**changes):
    torch.manual_seed(1)
    config = tiny_config(**changes)
    return build_attention(config), torch.randn(2, 11, config.hidden_size), RotaryEmbedding(config)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_backend_has_one_result_and_one_gradient(case):
    found = []
    for backend in ("math", "sdpa", "native"):
        layer, x, rotary = layer_of(attention_backend=backend, **case)
        assert isinstance(layer, LatentAttention)
        out = layer(x.requires_grad_(), rotary(0, 11, CPU))
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(one.grad for one in layer.parameters())])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_cache_gives_what_the_whole_gives(case):
    layer, x, rotary = layer_of(**case)
    whole, cache = layer(x, rotary(0, 11, CPU)), KVCache(11)
    parts = [layer(x[:, a:b], rotary(a, b - a, CPU), cache) for a, b in ((0, 6), (6, 7), (7, 11))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-6)
    assert cache.keys.numel() + cache.values.numel() == 2 * 11 * (12 + 4)  # latent, and what turns, of each token


@pytest.mark.parametrize("backend", ["math", "sdpa", "native"])
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(backend):
    found = []
    for compiled in (False, True):
        layer, x, rotary = layer_of(attention_backend=backend, **CASES["queries of a latent"])
        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else layer
        run(x.requires_grad_(), rotary(0, 11, CPU)).square().sum().backward()
        found.append([x.grad, *(one.grad for one in layer.parameters())])
    for one, same in zip(*found, strict=True):  # in norm: the graph sums in another order
        assert torch.dist(one, same) < 1e-6 * one.norm()


def test_a_model_with_it_generates_and_its_parameters_are_counted():
    config = tiny_config(**LATENT, q_lora_rank=10)
    decoder = Decoder(config).eval()
    assert count_parameters(config)[0] == sum(one.numel() for one in decoder.parameters())
    assert generate(decoder, torch.arange(4)[None], 5, temperature=0.0).shape == (1, 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_lora_rank": 12}, "needs all of kv_lora_rank"),
        ({"q_lora_rank": 12}, "q_lora_rank is given"),
        ({**LATENT, "v_head_dim": 0}, "v_head_dim is 0"),
        ({**LATENT, "qk_rope_head_dim": 3}, "qk_rope_head_dim"),
        ({**LATENT, "head_dim": 16}, "head_dim is 16"),
        ({**LATENT, "num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({**LATENT, "qk_norm": "head"}, "qk_norm is 'head'"),
        ({**LATENT, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(**changes)
