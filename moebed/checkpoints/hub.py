"""Where a checkpoint is: a folder, or a repository on the Hugging Face hub, of which weights and config are fetched."""

from __future__ import annotations

import re
from pathlib import Path

from moebed.errors import UserError
from moebed.machine.storage import standing

_PLAIN = [
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
]
# Safetensors where there are any; pickles only where there are none.
_WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint.

    Args:
        name: A folder, or a hub id such as ``mistralai/Mixtral-8x7B-v0.1``, optionally with ``@revision``.

    Raises:
        UserError: There is no such folder, or the hub cannot give it.
    """
    here = standing(Path(name))
    if here.exists():
        return here
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) or name.startswith((".", "/")):
        raise UserError(f"{name} does not exist; give the folder of a checkpoint or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    for weights in _WEIGHTS:
        try:
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=_PLAIN + weights))
        except Exception as error:
            said = " ".join(str(error).split())[:160]
            raise UserError(
                f"{name} is no folder here, and the hub cannot give it ({type(error).__name__}: {said}); check the id "
                "and the network, or give the folder of a copy"
            ) from error
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            break
    return folder
