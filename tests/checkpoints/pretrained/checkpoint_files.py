"""Synthetic checkpoints: any family, any dtype, in one file or many, and large ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

from moebed.checkpoints import write_checkpoint
from moebed.checkpoints.families import FAMILIES, KeyMap
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}


def random_decoder(**changes) -> Decoder:
    """A small random model; the same one each time."""
    torch.manual_seed(3)
    return Decoder(ModelConfig(**{**SIZES, **changes})).eval()


def write(folder: Path, family="mixtral", dtype=torch.bfloat16, shards=True, pickled=False, **changes) -> Decoder:
    """Write a random model and return it, its parameters as stored."""
    decoder = random_decoder(**changes).to(dtype).float()
    write_checkpoint(decoder, family, folder, dtype, shard_bytes=40_000 if shards else 10**9)
    if pickled:
        to_bin(folder)
    return decoder


def to_bin(folder: Path) -> None:
    """Turn the safetensors of a folder into ``.bin`` files."""
    for path in sorted(folder.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def write_large(folder: Path, layers: int, experts: int = 8, width: int = 14336, hidden: int = 4096) -> int:
    """Write a Mixtral of random bf16 weights without ever holding more than one tensor; a shard a layer.

    Returns:
        Bytes on disk.
    """
    config = ModelConfig(
        vocab_size=64,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        moe_intermediate_size=width,
    )
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES["mixtral"]
    shards: dict[str, list] = {}
    for part in KeyMap(family, config).everything():
        pieces = part.name.split(".")
        shards.setdefault(pieces[2] if pieces[1] == "layers" else "rest", []).append(part)
    weight_map, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()
    for number, (_, parts) in enumerate(sorted(shards.items()), 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for part in parts:
            size = 2 * part.rows * part.columns
            header[part.name] = {"dtype": "BF16", "shape": part.shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[part.name] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for part in parts:
                left = 2 * part.rows * part.columns
                start = int(torch.randint(len(pool) // 2, (), generator=generator)) & ~1  # no two tensors alike
                while left:
                    count = min(left, len(pool) - start)
                    file.write(pool[start : start + count])
                    left, start = left - count, 0
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(family.write_config(config)))
    return total
