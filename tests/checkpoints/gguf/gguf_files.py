"""GGUF files of checkpoint folders, written with the gguf package as llama.cpp's converter does; and Q4_K, which that
package reads and does not write.

N rows, A heads, D numbers of a head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

# model_type -> architecture; those whose rows of queries and keys go from halves to neighbouring pairs.
ARCHITECTURES = {"mixtral": "llama", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen2_moe": "qwen2moe",
                 "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "deepseek": "deepseek", "grok-1": "grok"}  # fmt: skip
PAIRED = {"llama", "deepseek"}
# Name in the folder, without "model." and the layer -> name in the file.
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm.scale": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "pre_attn_norm.scale": "attn_norm.weight",
    "post_attn_norm.scale": "attn_output_norm.weight",
    "pre_moe_norm.scale": "ffn_norm.weight",
    "post_moe_norm.scale": "layer_output_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
ATTENTION = re.compile(r"(?:self_attn|attn)\.([qkvo])_proj\.(weight|bias)")
ROUTER = re.compile(r"(mlp|block_sparse_moe|moe_block)\.gate\.weight")
EXPERT = re.compile(r"(?:mlp|block_sparse_moe|moe_block)\.experts\.(\d+)\.(\w+)\.weight")
SHARED = re.compile(r"mlp\.shared_experts?\.(\w+)_proj\.weight")
DENSE = re.compile(r"mlp\.(gate|up|down)_proj\.weight")
MATRIX = {"w1": "gate", "w3": "up", "w2": "down", "linear": "gate", "linear_v": "up", "linear_1": "down"}


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    *,
    kinds: Mapping[str, str] | None = None,
    each_expert: bool = False,
    fused: bool = False,
    per_file: int = 0,
    metadata: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write the checkpoint of a folder as GGUF; returns the file, of several the first.

    Args:
        folder: config.json and model.safetensors.
        path: The file.
        kind: ggml's type of matrices; routers, norms and biases are always float32, as llama.cpp has them.
        kinds: Pattern of names -> another type.
        each_expert: Each expert's matrices as tensors of their own, as in files from before April 2024.
        fused: Gate and up of all experts as one tensor.
        per_file: Tensors of a file; all in one if 0.
        metadata: Further keys, or other values.
        more: Further tensors, in float32.
        without: Keys to leave out.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES[config["model_type"]]
    tensors = dict(_tensors(folder, config, architecture in PAIRED))
    if not each_expert:
        tensors = _stacked(tensors, fused)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_file)
    found = {f"{architecture}.{key}": value for key, value in _metadata(config, tensors).items()}
    if config["model_type"] == "mixtral" and kind == "Q4_K":
        found["general.file_type"] = 15
    for key, value in {**found, **(metadata or {})}.items():
        if key not in without and value is not None:
            _add(writer, key, value)
    for name, values in {**tensors, **(more or {})}.items():
        of = next((other for pattern, other in (kinds or {}).items() if re.search(pattern, name)), kind)
        plain = values.ndim < 2 or "ffn_gate_inp" in name
        stored, raw = packed(values, "F32" if plain else of)
        writer.add_tensor(name, stored, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if per_file == 0 else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config.json."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"] or heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
        "vocab_size": config["vocab_size"],
    }
    if config.get("head_dim"):
        found |= {f"attention.{part}_length": config["head_dim"] for part in ("key", "value")}
    experts = config.get("num_local_experts", config.get("num_experts", config.get("n_routed_experts")))
    if any("ffn_gate_inp." in name for name in tensors):
        found |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
        found["expert_feed_forward_length"] = config.get("moe_intermediate_size")
    if config["model_type"] == "qwen2_moe":
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    if config["model_type"] == "deepseek":
        found |= {"leading_dense_block_count": config["first_k_dense_replace"], "expert_weights_scale": 1.0}
        found |= {"expert_shared_count": config["n_shared_experts"], "rope.dimension_count": config["head_dim"]}
    if config["model_type"] == "grok-1":
        found |= {
            "attn_logit_softcapping": config["max_attn_value"],
            "router_logit_softcapping": 30.0,
            "attention.output_scale": config["attn_output_multiplier"],
            "embedding_scale": config["embedding_multiplier_scale"],
            "logit_scale": config["output_multiplier_scale"],
        }
    return found


def _tensors(folder: Path, config: Mapping[str, Any], paired: bool):
    """(name in a file of one tensor an expert, float32 numbers) of a folder's tensors."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"] or config["num_attention_heads"]}
    for full, value in load_file(folder / "model.safetensors").items():
        found = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)", full)
        layer, name, values = found[1], found[2], value.float().numpy()
        if attention := ATTENTION.fullmatch(name):
            part = attention[1]
            theirs = f"attn_{'output' if part == 'o' else part}.{attention[2]}"
            if paired and part in heads:
                values = to_pairs(values, heads[part])
        elif ROUTER.fullmatch(name):
            theirs = "ffn_gate_inp.weight"
        elif expert := EXPERT.fullmatch(name):
            theirs = f"ffn_{MATRIX.get(expert[2], expert[2].removesuffix('_proj'))}.{expert[1]}.weight"
        elif shared := SHARED.fullmatch(name):
            theirs = f"ffn_{shared[1]}_shexp.weight"
        elif dense := DENSE.fullmatch(name):
            theirs = f"ffn_{dense[1]}.weight"
        else:
            theirs = NAMES[name]
        values = values[0] if theirs == "ffn_gate_inp_shexp.weight" else values
        yield (theirs if layer is None else f"blk.{layer}.{theirs}"), values


def _stacked(tensors: Mapping[str, np.ndarray], fused: bool) -> dict[str, np.ndarray]:
    """All experts' matrices as one tensor."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, values in sorted(tensors.items()):
        one = re.fullmatch(r"(blk\.\d+\.ffn_\w+)\.(\d+)\.weight", name)
        if one is None:
            found[name] = values
        else:
            experts.setdefault(f"{one[1]}_exps.weight", []).append(values)
    stacked = {name: np.stack(values) for name, values in experts.items()}
    for name in list(stacked) if fused else ():
        if "ffn_gate_exps" in name:
            both = [stacked.pop(name), stacked.pop(name.replace("gate", "up"))]
            stacked[name.replace("gate", "gate_up")] = np.concatenate(both, axis=1)
    return found | stacked


def to_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys (A·D, columns), the halves of each head interleaved, as llama.cpp's converter does."""
    return values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def packed(values: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Numbers in a ggml type, and which one."""
    raw = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[raw]
    if values.shape[-1] % block:
        raise ValueError(f"rows of {values.shape[-1]} are no whole blocks of {kind}")
    values = np.ascontiguousarray(values, dtype=np.float32)
    return (to_q4_k(values) if kind == "Q4_K" else gguf.quantize(values, raw)), raw


def unpacked(values: np.ndarray, kind: str) -> np.ndarray:
    """What is left of numbers after packing."""
    return gguf.dequantize(*packed(values, kind)).reshape(values.shape)


def to_q4_k(values: np.ndarray) -> np.ndarray:
    """Numbers (..., columns) in blocks of 256 as Q4_K: eight groups of 32, each with a scale and a least value."""
    x = values.reshape(-1, 8, 32)  # (blocks, groups, 32)
    scales, least = _scale_and_least(x)
    d = (scales.max(axis=1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    dmin = (least.max(axis=1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    six = [_whole(of, by, 63) for of, by in ((scales, d), (least, dmin))]  # (blocks, 8) each
    step, low = (d * six[0])[..., None], (dmin * six[1])[..., None]
    codes = np.clip(np.rint(np.divide(x + low, step, out=np.zeros_like(x), where=step > 0)), 0, 15).astype(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    halves = [half.astype(np.float16).view(np.uint8).reshape(-1, 2) for half in (d, dmin)]
    sc, mn = (part.astype(np.uint8) for part in six)
    bits = np.concatenate(
        [
            sc[:, :4] | (sc[:, 4:] >> 4) << 6,
            mn[:, :4] | (mn[:, 4:] >> 4) << 6,
            (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    blocks = np.concatenate([*halves, bits, (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)], axis=1)
    return blocks.reshape(*values.shape[:-1], -1)


def _whole(values: np.ndarray, by: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.rint(np.divide(values, by, out=np.zeros_like(values), where=by > 0)), 0, most)


def _scale_and_least(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step and −least value of each group (blocks, groups), by least squares over some roundings."""
    low = np.minimum(x.min(axis=-1), 0.0)
    span = np.maximum(x.max(axis=-1), low + 1e-12) - low
    best = np.full(low.shape, np.inf, np.float32)
    found = span / 15, -low
    for steps in np.arange(14.0, 16.1, 0.25):
        q = np.clip(np.rint((x - low[..., None]) * (steps / span)[..., None]), 0, 15)
        mean, x_mean = q.mean(axis=-1), x.mean(axis=-1)
        spread = (q * q).mean(axis=-1) - mean**2
        scale = ((q * x).mean(axis=-1) - mean * x_mean) / np.maximum(spread, 1e-12)
        least = np.minimum(x_mean - scale * mean, 0.0)
        scale = np.where(least < 0, scale, (q * x).mean(axis=-1) / np.maximum((q * q).mean(axis=-1), 1e-12))
        error = ((scale[..., None] * q + least[..., None] - x) ** 2).sum(axis=-1)
        better = (error < best) & (scale > 0)
        best = np.where(better, error, best)
        found = np.where(better, scale, found[0]), np.where(better, -least, found[1])
    return found[0].astype(np.float32), found[1].astype(np.float32)
