"""GGUF files of gpt-oss, DeepSeek-V2 and V3: names that others have not, and latent attention in one tensor or two."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import _add, packed, unpacked
from safetensors.torch import load_file

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.errors import UserError

COMMON = {"vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 96, "initializer_range": 0.2,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-4}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 30.0, "factor": 4.0, "original_max_position_embeddings": 8}
FINE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
LOG = {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
CASES = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5,
                "rope_parameters": {**YARN, "truncate": False}},
    "deepseek_v2": {**FINE, "q_lora_rank": None, **LOG},
    "deepseek_v3": {**FINE, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
}  # fmt: skip
IDS = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
# Name in the folder -> name in the file.
NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.sinks": "attn_sinks.weight", "mlp.router": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{m}_proj": f"ffn_{m}" for m in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{m}_proj": f"ffn_{m}_shexp" for m in ("gate", "up", "down")},
}  # fmt: skip


def model_of(family):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **CASES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1)
            elif tensor.ndim == 1 or name.endswith("_bias"):
                tensor.normal_(1.0, 0.3)
    return model


def tensors_of(family, folder, split):
    """Name in the file and float32 numbers, as llama.cpp's converter makes them."""
    found, experts = {}, {}
    for full, tensor in load_file(folder / "model.safetensors").items():
        layer, name = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)", full).groups()
        prefix, values = f"blk.{layer}." if layer else "", tensor.float().numpy()
        if one := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(f"{prefix}ffn_{one[2]}_exps.weight", {})[int(one[1])] = values
        elif gathered := re.fullmatch(r"mlp\.experts\.(gate_up|down)_proj(_bias)?", name):
            values = values if gathered[2] else values.swapaxes(1, 2)
            parts = {"gate": values[:, ::2], "up": values[:, 1::2]} if gathered[1] == "gate_up" else {"down": values}
            for part, of in parts.items():
                found[f"{prefix}ffn_{part}_exps.{'bias' if gathered[2] else 'weight'}"] = of
        elif name == "self_attn.kv_b_proj.weight" and split:
            heads = values.reshape(4, 48, 32)  # of 32 rows of keys and 16 of values
            found[f"{prefix}attn_k_b.weight"] = heads[:, :32].swapaxes(1, 2)
            found[f"{prefix}attn_v_b.weight"] = heads[:, 32:]
        elif name in NAMES:
            found[prefix + NAMES[name]] = values
        else:
            of, _, ending = name.rpartition(".")
            found[f"{prefix}{NAMES[of]}.{ending}"] = values
    found |= {name: np.stack([of[e] for e in sorted(of)]) for name, of in experts.items()}
    if family == "gpt_oss":
        found = {name.replace("ffn_norm", "post_attention_norm"): values for name, values in found.items()}
    return found


def written(family, folder, path, kind="F32", split=False, metadata=(), more=()):
    """Save the family's model in a folder and write it as GGUF; the model, with the numbers that are left of it."""
    model = model_of(family)
    model.save_pretrained(folder)
    c = json.loads((folder / "config.json").read_text())
    name = "gpt-oss" if family == "gpt_oss" else "deepseek2"
    found = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-4, "expert_count": 4, "expert_used_count": 2,
        "rope.freq_base": float(c["rope_parameters"]["rope_theta"]),
    }  # fmt: skip
    if c["rope_parameters"]["rope_type"] == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8}
    if family == "gpt_oss":
        found |= {"attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
                  "attention.sliding_window": 5, "expert_feed_forward_length": 96, "expert_gating_func": 3}  # fmt: skip
    else:
        mla = {"key_length": 40, "value_length": 16}
        new = {"key_length": 40, "value_length": 32, "key_length_mla": 40, "value_length_mla": 16}
        found |= {f"attention.{key}": value for key, value in (new if split else mla).items()}
        found |= {"attention.head_count_kv": 1 if split else 4, "attention.kv_lora_rank": 32, "expert_shared_count": 1,
                  "attention.q_lora_rank": c["q_lora_rank"], "rope.dimension_count": 8, "expert_weights_scale": 2.5,
                  "expert_feed_forward_length": 32, "leading_dense_block_count": 1}  # fmt: skip
        if family == "deepseek_v3":
            found |= {"expert_gating_func": 2, "expert_weights_norm": True, "expert_group_count": 2,
                      "expert_group_used_count": 1}  # fmt: skip
        else:
            found["rope.scaling.yarn_log_multiplier"] = 0.0707
    writer = gguf.GGUFWriter(path, name)
    for key, value in {**found, **dict(metadata)}.items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    for tensor, values in {**tensors_of(family, folder, split), **dict(more)}.items():
        experts = tensor.endswith("_exps.weight") or "attn_k_b" in tensor or "attn_v_b" in tensor
        stored, raw = packed(values, kind if experts and values.shape[-1] % 32 == 0 else "F32")
        writer.add_tensor(tensor, stored, raw_dtype=raw)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return model


def same(decoder, model):
    with torch.no_grad():
        found, wanted = decoder.eval()(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("family", "split"), [("gpt_oss", False), ("deepseek_v2", False), ("deepseek_v2", True),
                                               ("deepseek_v3", True)])  # fmt: skip
def test_float32_gives_the_logits_of_transformers(family, split, tmp_path):
    """Of latent attention both as older files have it and in two halves, of which the keys' is transposed."""
    model = written(family, tmp_path, tmp_path / "model.gguf", split=split)
    checkpoint = Checkpoint.open(tmp_path / "model.gguf")
    assert checkpoint.family.model_type == family
    same(load_decoder(checkpoint), model)
    if split:  # some rows, across the end of a head and of its keys
        name = "model.layers.1.self_attn.kv_b_proj.weight"
        entry, whole = checkpoint.entries[name], load_file(tmp_path / "model.safetensors")[name]
        for first, rows in ((0, 192), (30, 25), (100, 1)):
            out = torch.empty(rows, 32)
            entry.read(first, out)
            assert torch.equal(out, whole[first : first + rows])


def test_gpt_oss_in_mxfp4(tmp_path):
    """As it is published: the experts' matrices are packed, their biases and the router are not."""
    model = written("gpt_oss", tmp_path, tmp_path / "model.gguf", "MXFP4")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name:
                left = unpacked(parameter.transpose(1, 2).numpy(), "MXFP4")
                parameter.copy_(torch.from_numpy(left).bfloat16().float().transpose(1, 2))
    checkpoint = Checkpoint.open(tmp_path / "model.gguf")
    same(load_decoder(checkpoint), model)
    part = checkpoint.keys.expert(1, "up", 2)
    assert checkpoint.stored_bytes(part) == part.rows * part.columns * 17 // 32
    assert any("MXFP4" in note for note in checkpoint.notes)
    assert any("outputs are the release's and not llama.cpp's" in note for note in checkpoint.notes)


def test_what_does_not_fit_is_named_and_further_layers_are_left_aside(tmp_path):
    written("gpt_oss", tmp_path, tmp_path / "model.gguf", metadata={"expert_gating_func": 4}.items())
    with pytest.raises(UserError, match="expert_gating_func is 4; supported is 3 or 1 only"):
        Checkpoint.open(tmp_path / "model.gguf")
    further = {"blk.2.nextn.eh_proj.weight": np.ones((64, 128), np.float32)}
    changes = {"block_count": 3, "nextn_predict_layers": 1}
    model = written(
        "deepseek_v3", tmp_path, tmp_path / "next.gguf", split=True, metadata=changes.items(), more=further.items()
    )
    checkpoint = Checkpoint.open(tmp_path / "next.gguf")
    assert any(
        "blk.2.nextn.eh_proj.weight and its like (1) predict further tokens" in note for note in checkpoint.notes
    )
    same(load_decoder(checkpoint), model)


@pytest.mark.parametrize("heads", [3, 5])
def test_halves_of_a_latent_that_are_of_other_heads_are_refused(heads, tmp_path):
    more = {"blk.1.attn_v_b.weight": np.ones((heads, 16, 32), np.float32)}
    written("deepseek_v2", tmp_path, tmp_path / "model.gguf", split=True, more=more.items())
    with pytest.raises(UserError, match=r"blk\.1\.attn_k_b and v_b are not those of the same heads"):
        Checkpoint.open(tmp_path / "model.gguf")
