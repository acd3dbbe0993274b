"""The decoder against transformers with the same weights, and its own invariants."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from moebed.errors import UserError
from moebed.model.attention import KVCache
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters
from moebed.model.generate import generate
from tests.conftest import tiny_config


def _copy_mixtral(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The decoder's weights under transformers' names."""
    names = {
        "layers.": "model.layers.",
        "embed_tokens": "model.embed_tokens",
        "norm.weight": "model.norm.weight",
        "pre_attn_norm": "input_layernorm",
        "pre_ffn_norm": "post_attention_layernorm",
        "mlp.router": "mlp.gate",
    }
    state = {}
    for name, value in decoder.state_dict().items():
        if name == "norm.weight":
            name = "model.norm.weight"
        elif name.startswith(("layers.", "embed_tokens")):
            name = "model." + name
        for ours, theirs in list(names.items())[3:]:
            name = name.replace(ours, theirs)
        state[name] = value
    return state


def _mixtral(config, decoder):
    from transformers import MixtralConfig, MixtralForCausalLM

    hf = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            sliding_window=config.sliding_window,
            output_router_logits=True,
            router_aux_loss_coef=0.0,
        )
    )
    missing = hf.load_state_dict(_copy_mixtral(decoder), strict=True)
    assert not missing.missing_keys
    return hf


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("window", [None, 9])
def test_mixtral_parity_of_logits_gradients_and_aux_loss(backend, window):
    from moebed.model.losses import load_balancing_loss, router_stats

    config = tiny_config(num_experts=8, experts_backend=backend, sliding_window=window, rope_theta=1e6)
    decoder = Decoder(config)
    hf = _mixtral(config, decoder)
    ids = torch.randint(0, config.vocab_size, (3, 40))
    out, theirs = decoder(ids), hf(input_ids=ids)
    torch.testing.assert_close(out.logits, theirs.logits, rtol=1e-4, atol=1e-4)

    labels = torch.randint(0, config.vocab_size, (3, 40))
    for logits in (out.logits, theirs.logits):
        cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = {name: parameter.grad for name, parameter in hf.named_parameters()}
    ours = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    renamed = dict(zip(_copy_mixtral(decoder), ours, strict=True))
    assert set(renamed) == set(expected)
    for theirs_name, our_name in renamed.items():
        scale = expected[theirs_name].abs().max()
        torch.testing.assert_close(ours[our_name] / scale, expected[theirs_name] / scale, rtol=1e-3, atol=1e-3)

    # transformers pools the layers: mean counts and mean probabilities over all of them, and no division by K.
    mask = torch.ones(ids.numel(), dtype=torch.bool)
    stats = [router_stats(routing, mask) for routing in out.routings]
    pooled_counts = torch.stack([layer.counts for layer in stats]).mean(0)
    pooled_probs = torch.stack([layer.mean_probs for layer in stats]).mean(0)
    aux = config.num_experts_per_tok * load_balancing_loss(pooled_probs, pooled_counts)
    torch.testing.assert_close(aux, theirs.aux_loss, rtol=1e-4, atol=1e-5)


GROK = {
    "hidden_act": "gelu",
    "post_norms": True,
    "norm_topk_prob": False,
    "attn_logit_softcapping": 30.0,
    "embedding_multiplier": 5.0,
    "logits_multiplier": 0.5,
    "tie_word_embeddings": True,
}
DEEPSEEK = {"num_experts": [0, 6], "num_shared_experts": 2, "intermediate_size": 40, "norm_topk_prob": False}
QWEN = {"qk_norm": "head", "attention_bias": True, "num_shared_experts": 1, "shared_expert_gate": True}
FAMILIES = {
    "mixtral": {},
    "grok": GROK,
    "deepseek": DEEPSEEK,
    "qwen": QWEN,
    "olmoe": {"qk_norm": "full"},
    "window": {"sliding_window": 5},
    "ragged": {"num_experts": [2, 7]},
    "dense": {"num_experts": 0, "intermediate_size": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient_and_is_counted(family):
    config = tiny_config(**FAMILIES[family])
    decoder = Decoder(config)
    decoder(torch.randint(0, 96, (2, 50))).logits.square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert count_parameters(config)[0] == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_one_pass(family):
    config = tiny_config(**FAMILIES[family])
    decoder = Decoder(config).eval()
    ids = torch.randint(0, 96, (2, 20))
    whole = decoder(ids).logits
    caches = [KVCache(20) for _ in decoder.layers]
    parts = [decoder(ids[:, :7], caches).logits]
    parts += [decoder(ids[:, position : position + 1], caches).logits for position in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family):
    config = tiny_config(**FAMILIES[family])
    decoder = Decoder(config).train()
    ids = torch.randint(0, 96, (2, 20))
    grads = []
    for recompute in (False, True):
        decoder.activation_checkpointing = recompute
        out = decoder(ids)
        assert len(out.routings) == len(config.moe_layers)
        loss = out.logits.square().mean() + sum(routing.router_probs[:, 0].sum() for routing in out.routings)
        decoder.zero_grad()
        loss.backward()
        grads.append([parameter.grad.clone() for parameter in decoder.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_math_attention_equals_sdpa():
    ids = torch.randint(0, 96, (2, 30))
    for window in (None, 6):
        outs = []
        for backend in ("sdpa", "math"):
            torch.manual_seed(1)
            outs.append(Decoder(tiny_config(attention_backend=backend, sliding_window=window))(ids).logits)
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_future_tokens_change_nothing():
    decoder = Decoder(tiny_config())
    ids = torch.randint(0, 96, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 96
    torch.testing.assert_close(decoder(ids).logits[:, :12], decoder(changed).logits[:, :12])


def test_generation_is_greedy_argmax_and_leaves_the_model_as_it_was():
    decoder = Decoder(tiny_config()).train()
    ids = torch.randint(0, 96, (2, 5))
    state = torch.get_rng_state()
    sampled = generate(decoder, ids, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert decoder.training
    assert sampled.shape == (2, 11)
    greedy = generate(decoder, ids, 6, temperature=0)
    for position in range(5, 11):
        expected = decoder(greedy[:, :position]).logits[:, -1].argmax(-1)
        assert torch.equal(greedy[:, position], expected)


def test_generation_stops_at_the_longest_position():
    assert generate(Decoder(tiny_config(max_position_embeddings=8)), torch.zeros(1, 5, dtype=torch.long), 50).shape == (
        1,
        8,
    )


def test_too_long_text_is_one_clear_line():
    with pytest.raises(UserError, match="16 tokens is longer than the model's max_position_embeddings 8"):
        Decoder(tiny_config(max_position_embeddings=8))(torch.zeros(1, 16, dtype=torch.long))


def test_router_stays_in_float32_under_autocast():
    decoder = Decoder(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = decoder(torch.randint(0, 96, (1, 8))).routings[0]
    assert {value.dtype for value in (routing.router_logits, routing.router_probs, routing.topk_weight)} == {
        torch.float32
    }


def test_parameters_keep_their_order():
    """AdamW's state in a checkpoint knows a parameter by its number alone: in another order a run goes on wrongly."""
    decoder = Decoder(tiny_config(num_hidden_layers=1, qk_norm="head", num_shared_experts=1))
    names = [name.removeprefix("layers.0.").removesuffix(".weight") for name, _ in decoder.named_parameters()]
    assert names == [
        "embed_tokens",
        "pre_attn_norm",
        "pre_ffn_norm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "mlp.router",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
        "norm",
        "lm_head",
    ]
