"""Every family that transformers has, against it: logits of what it wrote, and of what we wrote for it."""

import json
from copy import deepcopy

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moebed.checkpoints import Checkpoint, load_decoder, write_checkpoint
from moebed.checkpoints.families.choice import IN_TRANSFORMERS
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.views.layer import HeadView, Need, ProbeText

COMMON = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-4,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
# 12 positions are more than the original 4, and of the four dimensions some are slow, blended and fast.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 30.0,
    "factor": 8.0,
    "low_freq_factor": 0.1,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 4,
}
FOUR = {"factor": 4.0, "original_max_position_embeddings": 8}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", **FOUR, "beta_fast": 2.0, "beta_slow": 0.5},
    "longrope": {
        "rope_type": "longrope",
        **FOUR,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    },
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2}
SPARSE = {**MOE, "moe_intermediate_size": 24}
CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, **ROPE}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "mixtral-one-expert": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 4, **ROPE}),
    "mistral-wide-heads": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh", **ROPE}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    **{f"llama-{name}": ("llama", {"rope_parameters": {**rope, "rope_theta": 30.0}}) for name, rope in ROPES.items()},
    "qwen2": ("qwen2", ROPE),
    "olmoe": ("olmoe", {**MOE, "norm_topk_prob": False, **ROPE}),
    "olmoe-normed": ("olmoe", {**MOE, "norm_topk_prob": True, "attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", {**SPARSE, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1], **ROPE}),
    "qwen2_moe-no-bias": ("qwen2_moe", {**SPARSE, "shared_expert_intermediate_size": 24, "qkv_bias": False}),
    "qwen3_moe": ("qwen3_moe", {**SPARSE, "head_dim": 16, "norm_topk_prob": True, **ROPE}),
    "qwen3_moe-step": ("qwen3_moe", {**SPARSE, "decoder_sparse_step": 2, "attention_bias": True}),
    "qwen3_moe-window": ("qwen3_moe", {**SPARSE, "use_sliding_window": True, "sliding_window": 4}),
}  # fmt: skip


GRANITE = {"num_local_experts": 6, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "attention_multiplier": 0.25,
           "residual_multiplier": 0.22, "logits_scaling": 6.0}  # fmt: skip
CASES |= {
    "granitemoe": ("granitemoe", {**GRANITE, "tie_word_embeddings": True, "attention_bias": True, **ROPE}),
    "granitemoeshared": ("granitemoeshared", {**GRANITE, "shared_intermediate_size": 50, "attention_bias": True}),
    "granitemoeshared-none": ("granitemoeshared", {**GRANITE, "shared_intermediate_size": 0}),
}


FINE = {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2,
        "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}  # fmt: skip
GROUPS = {**FINE, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
M2 = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
ERNIE = {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 24, "moe_num_shared_experts": 2}
CASES |= {
    "glm4_moe": ("glm4_moe", {**FINE, "head_dim": 8, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe-groups": ("glm4_moe", {**GROUPS, "head_dim": 16, "norm_topk_prob": False, "partial_rotary_factor": 0.25}),
    "dots1": ("dots1", {**GROUPS, "norm_topk_prob": True}),
    "dots1-window": ("dots1", {**FINE, "sliding_window": 5, "max_window_layers": 0, "first_k_dense_replace": 0}),
    "minimax_m2": ("minimax_m2", {**M2, "rotary_dim": 4, **ROPE}),
    "minimax_m2-whole": ("minimax_m2", M2),
    "ernie4_5_moe": ("ernie4_5_moe", {**ERNIE, "tie_word_embeddings": True}),
    "ernie4_5_moe-steps": ("ernie4_5_moe", {**ERNIE, "moe_layer_interval": 2, "moe_num_shared_experts": 0, **ROPE}),
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
MSCALE = {"rope_parameters": {**ROPES["yarn"], "rope_theta": 30.0, "mscale": 0.707, "mscale_all_dim": 0.9}}
CASES |= {
    "deepseek_v2": ("deepseek_v2", {**FINE, **LATENT, "q_lora_rank": None, "routed_scaling_factor": 1.0, **MSCALE}),
    "deepseek_v2-scale": ("deepseek_v2", {**FINE, **LATENT, "q_lora_rank": 12, **ROPE}),
    "deepseek_v2-groups": ("deepseek_v2", {**GROUPS, **LATENT, "q_lora_rank": 12,
                                           "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    "deepseek_v3": ("deepseek_v3", {**GROUPS, **LATENT, "q_lora_rank": 12, "norm_topk_prob": True, **MSCALE}),
    "deepseek_v3-halves": ("deepseek_v3", {**FINE, **LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                                           "norm_topk_prob": False, "rope_interleave": False, **ROPE}),
}  # fmt: skip
# Every other layer has the window; some gates and ups go beyond their limits.
OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5, "initializer_range": 0.7}
CASES |= {
    "gpt_oss": ("gpt_oss", {**OSS, "rope_parameters": {**ROPES["yarn"], "rope_theta": 30.0, "truncate": False}}),
    "gpt_oss-plain": ("gpt_oss", {**OSS, "attention_bias": False, "layer_types": ["full_attention"] * 3, **ROPE}),
    "qwen2_moe-windows": ("qwen2_moe", {**SPARSE, "shared_expert_intermediate_size": 24, "sliding_window": 5,
                                        "use_sliding_window": True, "max_window_layers": 1}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "dots1-windows": ("dots1", {**FINE, "sliding_window": 5, "max_window_layers": 1, "attention_bias": True}),
}  # fmt: skip
LONG = {**ROPES["longrope"], "original_max_position_embeddings": 16, "short_mscale": 1.2, "long_mscale": 1.3}
CASES |= {
    "flex_olmo": ("flex_olmo", {**MOE, "attention_bias": True, **ROPE}),
    # With the noise of the published model few tokens would teach the gate anything.
    "phimoe": ("phimoe", {"num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 0.3,
                          "attention_bias": True, "lm_head_bias": True,
                          "rope_parameters": {**LONG, "rope_theta": 30.0}}),
    "phimoe-plain": ("phimoe", {"num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 0.3,
                                "sliding_window": 5, **ROPE}),
}  # fmt: skip


# A family's variants are of its config: what they are to logits and to what is written is quick, the rest is slow.
ONE_EACH = [name if name == CASES[name][0] else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(params=CASES)
def theirs(request):
    model_type, changes = CASES[request.param]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **COMMON | deepcopy(changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norm scales too, which start as 0 and 1
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1)
            elif tensor.ndim == 1 or name.endswith("_bias"):
                tensor.normal_(1.0, 0.3)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_logits_of_what_transformers_wrote(theirs, tmp_path):
    ids = torch.randint(3, 80, (2, 12))
    theirs.save_pretrained(tmp_path)
    same(logits(load_decoder(tmp_path), ids), logits(theirs, ids))


def test_transformers_loads_what_we_write(theirs, tmp_path):
    ids = torch.randint(3, 80, (2, 12))
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs")
    family = theirs.config.model_type
    write_checkpoint(decoder, family, tmp_path / "ours", torch.float32, shard_bytes=20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same(logits(back, ids), logits(theirs, ids))
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_decoder(tmp_path / "ours").parameters(), decoder.parameters(), strict=True)
    )


@pytest.mark.parametrize("theirs", ONE_EACH, indirect=True)
def test_gradients_of_every_weight_are_transformers(theirs, tmp_path):
    """A checkpoint whose weights are transformers' gradients, read as ours, holds ours."""
    ids, wanted = torch.randint(3, 80, (2, 12)), torch.randn(2, 12, 80)
    theirs.save_pretrained(tmp_path / "weights")
    decoder = load_decoder(tmp_path / "weights")
    (decoder(ids).logits * wanted).sum().backward()
    theirs.set_experts_implementation("eager")
    (theirs(ids).logits * wanted).sum().backward()
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = dict(load_decoder(tmp_path / "gradients").named_parameters())
    for name, parameter in decoder.named_parameters():
        scale = wanted[name].abs().max().item()
        assert scale > 1e-3 or decoder.config.num_experts == 1, name  # what has no choice learns nothing
        different = (parameter.grad - wanted[name].detach()).abs().max().item()
        assert different <= 1e-4 * max(scale, 1), f"{name}: {different} of {scale}"


@pytest.mark.parametrize("theirs", ONE_EACH, indirect=True)
def test_text_streams_through_it_with_a_few_experts_in_memory(theirs, tmp_path):
    ids = torch.randint(3, 80, (2, 12))
    theirs.save_pretrained(tmp_path)
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))
    model = PretrainedMoE(str(tmp_path), text=text)
    head = 80 * 32 * 4  # bytes; the largest thing, of which two must fit
    model.memory_budget = model._text_bytes(text) + 3 * head
    needs = frozenset({Need.ROUTING, Need.LOGITS})
    *_, last = model.views(text, needs)
    held = model._pool.most
    model.close()
    assert 0 < held <= 3 * head < sum(one.numel() * one.itemsize for one in theirs.parameters())
    assert isinstance(last, HeadView)
    same(last.logits, logits(theirs, ids).flatten(0, 1))


@pytest.mark.parametrize("family", IN_TRANSFORMERS[True])
def test_what_transformers_writes_as_it_holds_it_is_read(family, tmp_path):
    """Experts fused, and routers under other names."""
    config = transformers.AutoConfig.for_model(family, **COMMON | deepcopy(CASES[family][1]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "original")
    model.save_pretrained(tmp_path / "held", save_original_format=False)
    held = load_file(tmp_path / "held" / "model.safetensors")
    assert set(held) == set(model.state_dict()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    decoders = [load_decoder(tmp_path / name) for name in ("held", "original")]
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in decoders), strict=True))
    ids = torch.randint(3, 80, (2, 12))
    same(logits(decoders[0], ids), logits(model, ids))


def test_llama_3_scaling_is_written_in_both_places(tmp_path):
    """transformers before version 5 looks under rope_scaling, and wants whole positions."""
    config = transformers.AutoConfig.for_model("llama", **COMMON, rope_parameters=LLAMA3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs")
    write_checkpoint(decoder, "llama", tmp_path / "ours", torch.float32)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["rope_theta"] == 30.0
    for key in ("rope_scaling", "rope_parameters"):
        found = settings[key]
        assert type(found["original_max_position_embeddings"]) is int
        assert {name: found[name] for name in LLAMA3 if name != "rope_theta"} == {
            name: value for name, value in LLAMA3.items() if name != "rope_theta"
        }


def test_config_in_its_old_form(tmp_path):
    """rope_theta beside the other settings, no rope_parameters, nothing that has a default."""
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["rope_parameters"]
    path.write_text(json.dumps(settings))
    assert Checkpoint.open(tmp_path).config.rope_theta == 1e6
    path.write_text(json.dumps(settings | {"rope_theta": 123.0, "rope_scaling": None}))
    assert Checkpoint.open(tmp_path).config.rope_theta == 123.0
