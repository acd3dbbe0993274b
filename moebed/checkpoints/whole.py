"""Whole checkpoints: into a decoder in memory, and from a decoder to a folder that transformers loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.decoder import Decoder
from moebed.errors import UserError
from moebed.families.keys import KeyMap
from moebed.families.registry import family_of

SHARD_BYTES = 5 * 10**9


@torch.no_grad()
def load_decoder(checkpoint: Checkpoint | str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with all weights of a checkpoint, in memory.

    Args:
        checkpoint: An open checkpoint, or its folder.
        dtype: What the parameters become.

    Raises:
        UserError: The checkpoint is missing, damaged, or of a family that is not known.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    decoder = decoder.to(dtype).to_empty(device="cpu")
    if checkpoint.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    for name, parameter in decoder.named_parameters():
        for part, region in checkpoint.keys.parameter(name):
            parameter[region] = checkpoint.read(part).to(dtype)
    return decoder


@torch.no_grad()
def write_checkpoint(
    decoder: Decoder,
    family: str,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a decoder as a checkpoint folder of a family: ``config.json`` and safetensors, with an index if sharded.

    Args:
        decoder: The model.
        family: Its ``model_type`` there, such as mixtral.
        folder: A new or empty folder.
        dtype: What the weights are stored in.
        shard_bytes: Largest size of one file; a tensor larger than that has a file to itself.

    Returns:
        The folder.

    Raises:
        ConfigError: The family is unknown or cannot express the model.
        UserError: The folder holds something, or cannot be written.
    """
    folder = Path(folder)
    found = family_of(family, "family")
    settings = found.write_config(decoder.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    keys = KeyMap(found, decoder.config)
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in _tensors(decoder, keys):
        count = tensor.numel() * dtype.itemsize
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += count
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another folder for the checkpoint")
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {name: tensor.to(dtype).cpu().contiguous() for name, tensor in shard}
            save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
            os.replace(folder / f"{file}.partial", folder / file)
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        # Last: a folder without it is not taken for a checkpoint.
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"the checkpoint cannot be written to {folder} ({error.strerror or error})") from error
    return folder


def _tensors(decoder: Decoder, keys: KeyMap) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in decoder.named_parameters():
        for part, region in keys.parameter(name):
            yield part.name, parameter.detach()[region]
