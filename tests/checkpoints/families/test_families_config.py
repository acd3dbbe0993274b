"""Config maps: what is refused, what cannot be expressed, and the oracles' logits."""

import json

import numpy as np
import pytest
import torch

from moebed.checkpoints import load_decoder, write_checkpoint
from moebed.checkpoints.families import FAMILIES, family_of
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from tests.conftest import ORACLES

SETTINGS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("mixtral", "rope_scaling", {"rope_type": "yarn"}),
        ("mixtral", "rope_scaling", {"rope_type": "yarn", "factor": 4, "attention_factor": "1"}),
        ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8}),
        ("llama", "rope_scaling", {"type": "linear", "factor": 0.0}),
        ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4}),
        ("llama", "rope_scaling", {"rope_type": "proportional", "factor": 2.0}),
        ("mixtral", "attention_bias", True),
        ("phimoe", "num_experts_per_tok", 3),
        ("phimoe", "rope_scaling", {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
        ("llama", "mlp_bias", True),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention"]),
        ("gpt_oss", "swiglu_limit", 5.0),
        ("gpt_oss", "swiglu_limit", True),
        ("gpt_oss", "swiglu_alpha", 1.0),
        ("gpt_oss", "hidden_act", "relu"),
        ("gpt_oss", "sliding_window", None),
        ("olmoe", "clip_qkv", 8.0),
        ("deepseek", "scoring_func", "sigmoid"),
        ("mixtral", "quantization_config", {"bits": 4}),
        ("mixtral", "hidden_act", "relu"),
        ("mistral", "num_attention_heads", 5),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(family, key, value):
    with pytest.raises(ConfigError, match=key) as caught:
        FAMILIES[family].read_config({**SETTINGS, key: value}, "somewhere/config.json")
    assert "somewhere/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_may_be_written_whole():
    settings = {**SETTINGS, "swiglu_limit": 7, "swiglu_alpha": 1.702}
    assert FAMILIES["gpt_oss"].read(settings).uncomputed == []


def test_llama_3_scaling_is_read_from_its_old_place():
    """As Llama 3.1 and 3.2 were published."""
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    settings = {**SETTINGS, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    config = FAMILIES["llama"].read_config(settings)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, {"rope_type": "llama3", **scaling})


def test_one_expert_of_a_deepseek_token_keeps_its_weight():
    """The class divides by the sum of weights only where there are several."""
    settings = {**SETTINGS, "n_routed_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True}
    del settings["num_local_experts"]
    read = FAMILIES["deepseek"].read_config
    assert read(settings).norm_topk_prob
    assert not read({**settings, "num_experts_per_tok": 1}).norm_topk_prob


@pytest.mark.parametrize("settings", [{}, {"n_routed_experts": None, "num_experts_per_tok": None,
                                           "moe_intermediate_size": None, "n_shared_experts": None}])  # fmt: skip
def test_deepseek_without_experts_is_a_dense_model(settings):
    common = {key: value for key, value in SETTINGS.items() if "experts" not in key}
    assert FAMILIES["deepseek"].read_config({**common, **settings}).moe_layers == []


@pytest.mark.parametrize(("family", "key"), [("deepseek", "moe_layer_freq"), ("qwen2_moe", "decoder_sparse_step"),
                                             ("qwen3_moe", "decoder_sparse_step")])  # fmt: skip
def test_a_step_of_no_layers_is_refused_by_name(family, key):
    common = {key: value for key, value in SETTINGS.items() if "local" not in key}
    sizes = {**common, **OWN[family]}
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        FAMILIES[family].read({**sizes, key: 0})


def test_what_grok_s_settings_leave_out_is_what_the_port_s_class_takes():
    """All factors 1, the cap on attention logits too; the released folder says its own."""
    settings = {key: value for key, value in SETTINGS.items() if key != "num_local_experts"} | {"num_experts": 4}
    for key in ("rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        settings.pop(key, None)
    config = FAMILIES["grok-1"].read_config(settings)
    assert config.attn_logit_softcapping == 1.0
    assert (config.attention_multiplier, config.embedding_multiplier, config.logits_multiplier) == (1.0, 1.0, 1.0)
    assert (config.rms_norm_eps, config.hidden_act, config.tie_word_embeddings) == (1e-5, "gelu", True)


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="num_local_experts is missing"):
        FAMILIES["mixtral"].read_config({k: v for k, v in SETTINGS.items() if k != "num_local_experts"})


def test_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown model_type 'mamba'.*mixtral.*qwen3_moe"):
        family_of("mamba")


def model(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 4,
             "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 24}  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("mixtral", {"num_experts": [0, 4, 4]}, "num_experts"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("mixtral", {"num_shared_experts": 1}, "num_shared_experts"),
        ("mixtral", {"attention_bias": True}, "attention_bias"),
        ("olmoe", {}, "qk_norm"),
        ("deepseek", {"num_experts": [4, 0, 0]}, "num_experts"),
        ("qwen3_moe", {"qk_norm": "head", "num_experts": [2, 4, 4]}, "num_experts"),
        ("qwen2_moe", {"attention_bias": True}, "num_shared_experts"),
        ("grok-1", {"norm_topk_prob": False}, "post_norms"),
        ("llama", {}, "num_experts"),
        ("gpt_oss", {"hidden_act": "clamped_swiglu", "experts_bias": True, "attention_sinks": True}, "router_options"),
        ("mixtral", {"hidden_act": "clamped_swiglu"}, "hidden_act is 'clamped_swiglu'"),
        ("mixtral", {"attention_sinks": True}, "attention_sinks"),
        ("mixtral", {"experts_bias": True}, "experts_bias"),
        (
            "qwen2_moe",
            {
                "attention_bias": True,
                "sliding_window": [4, 5, None],
                "num_shared_experts": 1,
                "shared_expert_gate": True,
            },
            "sliding_window",
        ),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(family, changes, name):
    with pytest.raises(ConfigError, match=name):
        FAMILIES[family].write_config(model(**changes))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek", {"num_experts": [0, 4, 4], "num_shared_experts": 2, "norm_topk_prob": False}),
        ("deepseek", {"num_experts": [0, 4, 0], "num_hidden_layers": 3, "intermediate_size": 20}),
        (
            "grok-1",
            {"norm_topk_prob": False, "post_norms": True, "attn_logit_softcapping": 30.0, "hidden_act": "gelu_tanh",
             "embedding_multiplier": 8.0, "tie_word_embeddings": True},
        ),
    ],
)  # fmt: skip
def test_families_that_transformers_lacks_come_back_as_they_were(family, changes, tmp_path):
    config = model(**changes)
    if family == "deepseek" and config.num_experts == [0, 4, 0]:
        with pytest.raises(ConfigError, match="num_experts"):
            FAMILIES[family].write_config(config)
        return
    decoder = Decoder(config).eval()
    back = load_decoder(write_checkpoint(decoder, family, tmp_path / "out", torch.float32)).eval()
    ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, decoder(ids).logits)


@pytest.mark.shared("oracles")
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("name", ["mixtral", "deepseekmoe", "grok-1"])
def test_logits_of_the_oracles(name, length):
    wanted = np.load(ORACLES / name / f"expected_dynamic_{length}.npz")
    decoder = load_decoder(ORACLES / name).eval()
    with torch.no_grad():
        found = decoder(torch.from_numpy(wanted["input_ids"])[None]).logits[0].numpy()
    np.testing.assert_allclose(found, wanted["logits"], rtol=1e-4, atol=1e-4 * np.abs(wanted["logits"]).max())


FINE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 8,
          "qk_rope_head_dim": 4, "v_head_dim": 6}  # fmt: skip
OWN = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "grok-1": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "glm4_moe": FINE,
    "dots1": FINE,
    "deepseek_v2": {**FINE, **LATENT},
    "deepseek_v3": {**FINE, **LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "emo": {"num_experts": 4, "num_experts_per_tok": 3, "num_shared_experts": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 20},
}  # fmt: skip


def test_every_family_round_trips_its_own_settings():
    common = {key: value for key, value in SETTINGS.items() if "experts" not in key}
    for family in FAMILIES.values():
        settings = {**common, **OWN.get(family.model_type, {}), "model_type": family.model_type}
        reading = family.read(settings)
        assert not reading.notes
        written = json.loads(json.dumps(family.write_config(reading.config)))
        assert family.read_config(written).to_dict() == reading.config.to_dict()
        assert not family.read(written).notes
