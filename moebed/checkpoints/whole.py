"""Whole checkpoints: into a decoder in memory, and from a decoder to a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.keys import KeyMap
from moebed.checkpoints.families.registry import family_of
from moebed.checkpoints.writer import SHARD_BYTES, FolderWriter
from moebed.model.decoder import Decoder
from moebed.model.spread import assign


@torch.no_grad()
def load_decoder(checkpoint: Checkpoint | str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with all weights of a checkpoint, in memory.

    Args:
        checkpoint: An open checkpoint, or its folder.
        dtype: What the parameters become. The routers' own state, such as a selection bias, stays as it is.

    Raises:
        UserError: The checkpoint is missing, damaged, or of a family that is not known.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    for parameter in decoder.parameters():
        parameter.data = parameter.to(dtype)
    decoder = decoder.to_empty(device="cpu")
    if checkpoint.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    fill(decoder, checkpoint)
    return decoder


@torch.no_grad()
def fill(decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Set the parameters, and the routers' state, of a decoder of the checkpoint's model; each rank its own parts.

    One tensor at a time. What a decoder has beside the checkpoint's experts (``families.base.beside_experts``) stays
    as it was drawn, but for shared experts, whose ``down`` becomes 0: at first it adds nothing.

    Raises:
        UserError: A weight is NaN or Inf, or a file changed meanwhile.
    """
    for name, tensor in decoder.stored().items():
        if name not in checkpoint.keys.shapes:
            if name.endswith("shared_expert.down_proj.weight"):
                tensor.zero_()
            continue
        spread = isinstance(tensor, DTensor)
        value = torch.empty(tensor.shape, dtype=tensor.dtype) if spread else tensor
        for part, region in checkpoint.keys.parameter(name):
            value[region] = checkpoint.read(part).to(value).view_as(value[region])
        if spread:
            assign(tensor, value)
    checkpoint.require_unchanged()


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
    found = family_of(family, "family")
    keys = KeyMap(found, decoder.config)
    parameters = decoder.stored()
    writer = FolderWriter(keys, found.write_config(decoder.config), dtype, shard_bytes)
    writer.write(Path(folder), lambda name, placed: [parameters[name][placed.region]])
    return Path(folder)
