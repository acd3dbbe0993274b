"""The tiny published-layout checkpoints as decoders, mapped by hand so that these tests need no checkpoint reader."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import Tensor

from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from tests.conftest import ORACLES


def load_decoder(name: str) -> Decoder:
    folder = ORACLES / name
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    hf = json.loads((folder / "config.json").read_text())
    config, state = {"mixtral": _mixtral, "deepseekmoe": _deepseek, "grok-1": _grok}[name](hf, tensors)
    decoder = Decoder(ModelConfig(**(_common(hf) | config)))
    decoder.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    return decoder.float()


def _common(hf: dict) -> dict:
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    return {name: hf[name] for name in names} | {"experts_backend": "loop"}


def _experts(tensors: dict[str, Tensor], prefix: str, count: int, gate: str, up: str, down: str) -> dict[str, Tensor]:
    def stack(name: str) -> Tensor:
        return torch.stack([tensors[f"{prefix}.{expert}.{name}.weight"] for expert in range(count)])

    return {"gate_up_proj": torch.cat([stack(gate), stack(up)], dim=1), "down_proj": stack(down)}


def _attention(tensors: dict[str, Tensor], prefix: str, layer: int) -> dict[str, Tensor]:
    return {
        f"layers.{layer}.self_attn.{p}_proj.weight": tensors[f"{prefix}.{p}_proj.weight"] for p in ("q", "k", "v", "o")
    }


def _outside(tensors: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    return {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors[f"model.norm.{norm}"],
        "lm_head.weight": tensors["lm_head.weight"],
    }


def _mixtral(hf: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    state = _outside(tensors, "weight")
    for layer in range(hf["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        state |= _attention(tensors, f"{theirs}.self_attn", layer)
        state[f"{ours}.pre_attn_norm.weight"] = tensors[f"{theirs}.input_layernorm.weight"]
        state[f"{ours}.pre_ffn_norm.weight"] = tensors[f"{theirs}.post_attention_layernorm.weight"]
        state[f"{ours}.mlp.router.weight"] = tensors[f"{theirs}.block_sparse_moe.gate.weight"]
        experts = _experts(tensors, f"{theirs}.block_sparse_moe.experts", hf["num_local_experts"], "w1", "w3", "w2")
        state |= {f"{ours}.mlp.experts.{key}": value for key, value in experts.items()}
    config = {
        "num_experts": hf["num_local_experts"],
        "moe_intermediate_size": hf["intermediate_size"],
        "rope_theta": hf["rope_theta"],
    }
    return config, state


def _deepseek(hf: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    state, layers, dense = _outside(tensors, "weight"), hf["num_hidden_layers"], hf["first_k_dense_replace"]
    for layer in range(layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        state |= _attention(tensors, f"{theirs}.self_attn", layer)
        state[f"{ours}.pre_attn_norm.weight"] = tensors[f"{theirs}.input_layernorm.weight"]
        state[f"{ours}.pre_ffn_norm.weight"] = tensors[f"{theirs}.post_attention_layernorm.weight"]
        ffn = (f"{ours}.mlp", f"{theirs}.mlp")
        if layer >= dense:
            ffn = (f"{ours}.mlp.shared_expert", f"{theirs}.mlp.shared_experts")
            state[f"{ours}.mlp.router.weight"] = tensors[f"{theirs}.mlp.gate.weight"]
            experts = _experts(
                tensors, f"{theirs}.mlp.experts", hf["n_routed_experts"], "gate_proj", "up_proj", "down_proj"
            )
            state |= {f"{ours}.mlp.experts.{key}": value for key, value in experts.items()}
        for matrix in ("gate", "up", "down"):
            state[f"{ffn[0]}.{matrix}_proj.weight"] = tensors[f"{ffn[1]}.{matrix}_proj.weight"]
    config = {
        "num_experts": [0] * dense + [hf["n_routed_experts"]] * (layers - dense),
        "num_shared_experts": hf["n_shared_experts"],
        "moe_intermediate_size": hf["moe_intermediate_size"],
        "intermediate_size": hf["intermediate_size"],
        "norm_topk_prob": hf["norm_topk_prob"],
        "rope_theta": hf["rope_theta"],
    }
    return config, state


def _grok(hf: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    state = _outside(tensors, "scale")
    norms = {
        "pre_attn_norm": "pre_attn_norm",
        "post_attn_norm": "post_attn_norm",
        "pre_ffn_norm": "pre_moe_norm",
        "post_ffn_norm": "post_moe_norm",
    }
    for layer in range(hf["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        state |= _attention(tensors, f"{theirs}.attn", layer)
        state |= {f"{ours}.{own}.weight": tensors[f"{theirs}.{other}.scale"] for own, other in norms.items()}
        state[f"{ours}.mlp.router.weight"] = tensors[f"{theirs}.moe_block.gate.weight"]
        experts = _experts(tensors, f"{theirs}.moe_block.experts", hf["num_experts"], "linear", "linear_v", "linear_1")
        state |= {f"{ours}.mlp.experts.{key}": value for key, value in experts.items()}
    config = {
        "num_experts": hf["num_experts"],
        "moe_intermediate_size": hf["intermediate_size"],
        "norm_topk_prob": False,
        "hidden_act": "gelu",
        "post_norms": True,
        "attention_multiplier": hf["attn_output_multiplier"],
        "attn_logit_softcapping": hf["max_attn_value"],
        "embedding_multiplier": hf["embedding_multiplier_scale"],
        "logits_multiplier": hf["output_multiplier_scale"],
    }
    return config, state
