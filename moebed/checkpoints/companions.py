"""What lies beside the weights of a checkpoint folder: its tokenizer, and a recipe to train from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from moebed.checkpoints.families.meaning import NOT_IN_CHECKPOINTS
from moebed.checkpoints.gguf.finding import gguf_at
from moebed.checkpoints.run import is_run, run_folder
from moebed.errors import UserError
from moebed.model.config import ModelConfig

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_END_OF_TEXT = "<|endoftext|>"
START_RECIPE = "start.yaml"


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What ``data.tokenizer.kind`` calls a tokenizer beside a checkpoint; auto if it lies there as ``tokenizer.json``.
Kind = Literal["bytes", "auto"]


def run_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer's folder of the run that a ``.ckpt``, file or folder, belongs to; None if it has none."""
    folder = run_folder(checkpoint) / "tokenizer"
    return folder if folder.is_dir() else None


def special_ids(checkpoint: Path, settings: Mapping[str, Any]) -> dict[str, int | None]:
    """Settings of ``config.json`` that name the ids which begin and end a text; none where nothing tells.

    Left out, they would mean ids 1 and 2 to some classes of transformers.

    Args:
        checkpoint: Folder of a checkpoint, or the ``.ckpt`` file of a run.
        settings: The checkpoint's ``config.json``.
    """
    own = run_tokenizer(checkpoint) if is_run(checkpoint) else None
    if own is None:
        return {key: settings[key] for key in _SPECIAL_IDS if key in settings}
    from moebed.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(own)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}


def copy_tokenizer(checkpoint: Path, folder: Path) -> tuple[Kind | None, str]:
    """Copy a checkpoint's tokenizer, in a form that ``transformers.AutoTokenizer`` loads.

    Args:
        checkpoint: Folder of a checkpoint, GGUF file, or the ``.ckpt`` of a run, whose folder holds the tokenizer.
        folder: Where to.

    Returns:
        What the tokenizer is, None where there is none, and a note for the person who asked.
    """
    if (file := gguf_at(checkpoint)) is not None:
        return _unpack_tokenizer(file, folder)
    if not is_run(checkpoint):
        found = {path for pattern in _TOKENIZER_FILES for path in checkpoint.glob(pattern) if path.is_file()}
        for path in sorted(found):
            shutil.copyfile(path, folder / path.name)
        if any(path.name.startswith("tokenizer") for path in found):
            return "auto", ""
        return None, f"{checkpoint} has no tokenizer; put its tokenizer.json beside the new weights to use text"
    own = run_tokenizer(checkpoint)
    if own is None:
        return None, f"{run_folder(checkpoint)} has no tokenizer of the run; the new folder has none either"
    from moebed.data.tokenizer import BytesTokenizer, SymbolsTokenizer, load_tokenizer

    tokenizer = load_tokenizer(own)
    if isinstance(tokenizer, SymbolsTokenizer):
        return None, "the run's tokenizer is of planted symbols, which no other format has; the new folder has none"
    if not isinstance(tokenizer, BytesTokenizer):
        for path in sorted(path for path in own.iterdir() if path.is_file()):
            shutil.copyfile(path, folder / path.name)
        return "auto", ""
    write_bytes_tokenizer(folder)
    note = "the run's tokenizer is bytes; it is written as a byte-level BPE without merges, which gives the same ids"
    return "bytes", note


def _unpack_tokenizer(file: Path, folder: Path) -> tuple[Kind | None, str]:
    from moebed.checkpoints.gguf.tokenizer import GgufTokenizer

    try:
        GgufTokenizer(file).save(folder)
    except UserError as error:
        return None, f"{error}; the new folder has no tokenizer"
    return "auto", ""


def write_bytes_tokenizer(folder: Path) -> None:
    """Write as tokenizer.json what gives the ids of moebed's bytes tokenizer: the bytes, and 256 to end a text.

    The format has no tokenizer of plain bytes, but a byte-level BPE (GPT-2's) that merges nothing is one.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    # GPT-2's alphabet: bytes that print stand for themselves, the others for the characters from 256 on.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    vocabulary = {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END_OF_TEXT])
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT}
    # Without the last, transformers' decode would take the blank out of " ." and the like.
    config |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_start_recipe(partial: Path, folder: Path, config: ModelConfig, tokenizer: Kind | None) -> None:
    """Write ``start.yaml``: what a recipe needs besides its own settings to train from a checkpoint folder.

    Args:
        partial: Where to write it.
        folder: What the folder will be called.
        config: The model; how it is trained and computed is left to the recipe.
        tokenizer: The tokenizer beside it, if any.
    """
    where = str(folder.resolve())
    model = {key: value for key, value in config.to_dict().items() if key not in NOT_IN_CHECKPOINTS}
    content: dict[str, object] = {"model": {"init_from": where, "config": model}}
    if tokenizer is not None:
        named = {"kind": "auto", "path": where} if tokenizer == "auto" else {"kind": "bytes"}
        content["data"] = {"tokenizer": named}
    head = f"# Train from this checkpoint: moebed fit --config RECIPE.yaml --config {where}/{START_RECIPE}\n"
    (partial / START_RECIPE).write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
