"""Where a checkpoint is: a folder, a file, or a repository on the Hugging Face hub, which is fetched in part.

Needs no PyTorch before something is fetched: commands ask it first for what is neither here nor on the hub.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
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
_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(:(?P<kind>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
# Where a repository of GGUF files, of which most hold a model in ten kinds, says the kind.
_KIND = ("*[-._/]{kind}.gguf", "*[-._/]{kind}-?????-of-?????.gguf", "{kind}.gguf", "{kind}/*.gguf")


def require_nameable(*names: str) -> None:
    """Raise UserError for the name of nothing that is here and nothing that the hub, which is not asked, could have."""
    for name in names:
        _here_or_id(name)


def find_checkpoint(name: str) -> Path:
    """The folder or the file of a checkpoint.

    Args:
        name: A folder or file, or a hub id such as ``mistralai/Mixtral-8x7B-v0.1``, optionally with ``@revision``. Of a
            repository of GGUF files the id goes on with the kind that is wanted, as in ``org/name:Q4_K_M``.

    Raises:
        UserError: There is no such folder, or the hub cannot give it.
    """
    found = _here_or_id(name)
    if isinstance(found, Path):
        return found
    repository, kind, revision = found["repository"], found["kind"], found["revision"]
    if kind is not None:
        return _find_gguf(name, repository, kind, revision)
    for weights in _WEIGHTS:
        folder = _fetch(name, repository, revision, _PLAIN + weights)
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return folder
    kinds = _listed(repository, revision)
    if kinds:
        raise UserError(
            f"{name} is a repository of GGUF files; name one, as in {repository}:{kinds[0]}: {_said(kinds)}"
        )
    return folder


def _here_or_id(name: str) -> Path | re.Match[str]:
    """What is here of that name, or the parts of a hub id; raises UserError where it is neither."""
    here = standing(Path(name))
    if here.exists():
        return here
    found = _ID.fullmatch(name)
    if found is None or name.startswith((".", "/")):
        raise UserError(f"{name} does not exist; give the folder of a checkpoint or a hub id such as org/name")
    return found


def _find_gguf(name: str, repository: str, kind: str, revision: str | None) -> Path:
    """The file of the kind that is wanted, the first one where the model is several; none of the others is fetched."""
    from moebed.checkpoints.gguf.finding import models_among

    spelled = list(dict.fromkeys((kind, kind.upper(), kind.lower())))
    patterns = [pattern.format(kind=one) for one in spelled for pattern in _KIND]
    folder = _fetch(name, repository, revision, patterns)
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.gguf"))]
    models = models_among(file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns))
    if len(models) == 1:
        return folder / models[0][0]
    if models:
        raise UserError(
            f"{name} is {len(models)} models: {_said([files[0] for files in models])}; give the path of one"
        )
    kinds = _listed(repository, revision)
    there = f": it has {_said(kinds)}" if kinds else ""
    raise UserError(f"{repository} has no GGUF file of kind {kind}{there}")


def _fetch(name: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name} is no folder here, and the hub cannot give it ({type(error).__name__}: {said}); check the id "
            "and the network, or give the folder of a copy"
        ) from error


def _listed(repository: str, revision: str | None) -> list[str]:
    """What the GGUF files of a repository add to their common name; empty where the hub cannot be asked."""
    from huggingface_hub import list_repo_files

    from moebed.checkpoints.gguf.finding import models_among

    try:
        files = list(list_repo_files(repository, revision=revision))
    except Exception:  # noqa: BLE001  a better message is all that is lost
        return []
    names = [model[0].removesuffix(".gguf") for model in models_among(one for one in files if one.endswith(".gguf"))]
    return list(dict.fromkeys(_kind_in(name) for name in names))


def _kind_in(name: str) -> str:
    """The kind that a file's name ends with, or that its folder is called."""
    return name.partition("/")[0] if "/" in name else re.split(r"[-.]", re.sub(r"-\d{5}-of-\d{5}$", "", name))[-1]


def _said(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (" and more" if len(names) > 12 else "")
