"""Which files of a folder hold the weights, in transformers' order of preference, and what they hold.

model.safetensors, model.safetensors.index.json + shards, pytorch_model.bin, pytorch_model.bin.index.json + shards
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebed.checkpoints.files import TensorEntry, open_bin, open_safetensors
from moebed.errors import ConfigError, UserError
from moebed.machine.storage import reason_of

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """The settings of a JSON file by name; raises ConfigError where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({reason_of(error)}); download it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings by name; download it again")
    return found


def find_entries(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensors of a folder's weights by name, and notes on files that are left aside.

    Raises:
        UserError: There are no weights, a file is missing or damaged, or two files hold one tensor.
    """
    there = [name for name in WEIGHTS if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder} has no weights; it needs one of {', '.join(WEIGHTS)}")
    taken, others = there[0], there[1:]
    path = _inside(folder, taken, folder / taken)
    notes = [f"{path} is read and {', '.join(others)} beside it left aside, as transformers does"] if others else []
    if taken.endswith(".index.json"):
        beside = f", or take {taken} out to have {there[1]} read" if others else ""
        return _open_shards(folder, path, beside), notes
    return _open_file(path), notes


def _open_file(path: Path, example: str | None = None) -> dict[str, TensorEntry]:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_bin(path, example)


def _open_shards(folder: Path, index: Path, beside: str) -> dict[str, TensorEntry]:
    """All that the shards hold: the index says which files they are, and need not list every tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise UserError(f"{index} has no weight_map of tensor names to files; download it again")
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        by_file.setdefault(file, []).append(tensor)
    for file, tensors in by_file.items():
        path = _inside(folder, file, index, tensors[0])
        if not path.is_file():
            more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
            raise UserError(
                f"{path} is missing; {index.name} puts tensor {tensors[0]}{more} in it: download it again{beside}"
            )
    entries: dict[str, TensorEntry] = {}
    for file, tensors in by_file.items():
        found = _open_file(folder / file, tensors[0])
        _require_single(entries, found)
        entries |= found
    for tensor, file in weight_map.items():
        if tensor not in entries:
            raise UserError(
                f"{folder / file} has no tensor {tensor}, which {index.name} puts in it; download both again"
            )
    return entries


def _require_single(entries: Mapping[str, TensorEntry], more: Mapping[str, TensorEntry]) -> None:
    for tensor in more:
        if tensor in entries:
            raise UserError(
                f"tensor {tensor} is in {entries[tensor].path} and in {more[tensor].path}; take out the file that "
                "does not belong to the checkpoint"
            )


def _inside(folder: Path, file: str, named_by: Path, tensor: str | None = None) -> Path:
    """The path of a file of the checkpoint.

    Raises:
        UserError: The name, or a link, leads out of the folder.
    """
    path = folder / file
    roots = [folder.resolve()]
    # The hub's cache keeps each file once, and links to it from the folder of every revision.
    blobs = folder.resolve().parent.parent / "blobs"
    if folder.resolve().parent.name == "snapshots" and blobs.is_dir():
        roots.append(blobs)
    plain = not Path(file).is_absolute() and ".." not in Path(file).parts
    if plain and any(path.resolve().is_relative_to(root) for root in roots):
        return path
    of = f" for tensor {tensor}" if tensor else ""
    raise UserError(f"{named_by} names {file!r}{of}, which lies outside the checkpoint's folder; it was not opened")
