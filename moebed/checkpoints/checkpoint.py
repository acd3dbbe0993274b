"""A checkpoint folder: its files found and checked against its config before anything is read.

config.json, and one of
model.safetensors | model.safetensors.index.json + shards | pytorch_model.bin | pytorch_model.bin.index.json + shards
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebed.checkpoints.files import TensorEntry, UnknownEntry, open_bin, open_safetensors
from moebed.checkpoints.run import is_run, open_run
from moebed.checkpoints.xai import open_release, release_folder
from moebed.config import ModelConfig
from moebed.errors import ConfigError, UserError
from moebed.families.base import Family
from moebed.families.keys import KeyMap, TensorPart
from moebed.families.own import RUN
from moebed.families.registry import family_of

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """A checkpoint whose every tensor is known to be there, to be whole, and to fit the config.

    Args:
        name: What a person calls it.
        family: Its family.
        config: Its model.
        settings: Its ``config.json``.
        entries: All tensors in its files, by name.
        notes: What a person should know about it.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        config: ModelConfig,
        settings: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        notes: list[str],
    ) -> None:
        self.name, self.family, self.config, self.settings = name, family, config, settings
        self.entries, self.notes = entries, notes
        self.keys = KeyMap(family, config, entries)
        self._check()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Find and check a checkpoint: a folder, xai-org's release of Grok-1, or a ``.ckpt`` file of a run.

        Raises:
            UserError: Something is missing, damaged, or does not fit; one line that names the file and the tensor.
        """
        path = Path(path)
        if is_run(path):
            config, entries = open_run(path)
            return cls(path.name, RUN, config, {"config": config.to_dict()}, entries, [])
        if not path.is_dir():
            raise UserError(f"{path} does not exist; give the folder of a checkpoint or a hub id such as org/name")
        where, release = path / "config.json", release_folder(path)
        if where.is_file():
            settings, entries = _read_json(where), {}
        elif release is not None:
            settings, entries = open_release(release)
        else:
            raise UserError(f"{where} is missing; a checkpoint folder needs it")
        family = family_of(settings.get("model_type"), str(where))
        config = family.read_config(settings, str(where))
        checkpoint = cls(path.resolve().name, family, config, settings, entries or _find_entries(path), [])
        if "auto_map" in settings:
            checkpoint.notes.append(
                f"{where} names code of its own (auto_map); it is ignored, code of a checkpoint is never run"
            )
        unused = set(checkpoint.entries) - {part.name for part in checkpoint.keys.everything()}
        if config.tie_word_embeddings:
            unused.discard(family.tensors["lm_head.weight"])
        if unused:
            first, more = sorted(unused)[:3], f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            checkpoint.notes.append(f"tensors that have no place in the model are left out: {', '.join(first)}{more}")
        return checkpoint

    def _check(self) -> None:
        """Every tensor that the model needs is there, has the shape that the config gives it, and a known dtype."""
        checked = set()
        for part in self.keys.everything():
            if part.name in checked:
                continue
            checked.add(part.name)
            entry = self.entries.get(part.name)
            if entry is None:
                raise UserError(f"{self.name}: tensor {part.name} is missing; its config.json asks for it")
            if entry.shape != part.shape:
                raise UserError(
                    f"{entry.path}: tensor {part.name} has shape {list(entry.shape)} but config.json makes it "
                    f"{list(part.shape)}; the file and the config do not belong together"
                )
            if isinstance(entry, UnknownEntry):
                raise UserError(
                    f"{entry.path}: tensor {part.name} is stored as {entry.stored}; the known ones are float32, "
                    "float16 and bfloat16"
                )

    def dtype(self, part: TensorPart) -> torch.dtype:
        """What the part is stored in."""
        return self.entries[part.name].dtype

    def num_bytes(self, part: TensorPart) -> int:
        """Size of the part on disk, in bytes."""
        return part.rows * part.columns * self.dtype(part).itemsize

    def place(self, part: TensorPart) -> tuple[str, int, int]:
        """Sorts parts in the order in which they lie on disk."""
        entry = self.entries[part.name]
        return entry.path.name, entry.position, part.first

    def read_into(self, part: TensorPart, out: Tensor) -> None:
        """Read a part into out (rows, columns); the numbers are not looked at."""
        self.entries[part.name].read(part.first, out)

    def read(self, part: TensorPart) -> Tensor:
        """A part as it is stored, in the shape (rows, columns), or (columns,) for a vector.

        Raises:
            UserError: It holds NaN or Inf.
        """
        out = torch.empty(part.rows, part.columns, dtype=self.dtype(part))
        self.read_into(part, out)
        self.require_finite(part, out)
        return out[0] if len(part.shape) == 1 else out

    def require_finite(self, part: TensorPart, values: Tensor) -> None:
        """Raise UserError that names tensor and file if a part's values have NaN or Inf among them."""
        # NaN and Inf survive every sum, and a sum is many times faster than looking at each number.
        if bool(values.sum().isfinite()) or bool(values.isfinite().all()):
            return
        kind = "NaN" if bool(values.isnan().any()) else "Inf"
        raise UserError(
            f"tensor {part.name} in {self.entries[part.name].path} holds {kind}; download the file again, or probe the "
            "other layers with --layers"
        )

    def fingerprint(self) -> str:
        """A hash that changes with the config, the index, and the size or time of any file."""
        files = {}
        for path in sorted({entry.path for entry in self.entries.values()}):
            status = path.stat()
            files[path.name] = [status.st_size, status.st_mtime_ns]
        tensors = {name: [entry.path.name, entry.shape, str(entry.dtype)] for name, entry in self.entries.items()}
        text = json.dumps([dict(self.settings), files, tensors], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings by name")
    return found


def _find_entries(folder: Path) -> dict[str, TensorEntry]:
    """Open the files that the index names, or the single file where there is no index."""
    for name in _INDEXES:
        path = folder / name
        if path.is_file():
            return _open_shards(folder, path)
    for name in _SINGLE:
        path = folder / name
        if path.is_file():
            return _open_file(_inside(folder, name, path), None)
    raise UserError(f"{folder} has no weights; it needs one of {', '.join((*_SINGLE, *_INDEXES))}")


def _open_file(path: Path, example: str | None) -> dict[str, TensorEntry]:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_bin(path, example)


def _open_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise UserError(f"{index} has no weight_map of tensor names to files; download it again")
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        by_file.setdefault(file, []).append(tensor)
    for file, tensors in by_file.items():
        path = _inside(folder, file, index, tensors[0])
        if not path.is_file():
            more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
            raise UserError(f"{path} is missing; {index.name} puts tensor {tensors[0]}{more} in it: download it again")
    entries: dict[str, TensorEntry] = {}
    for file, tensors in by_file.items():
        found = _open_file(folder / file, tensors[0])
        for tensor in tensors:
            if tensor not in found:
                raise UserError(f"{folder / file} has no tensor {tensor}, which {index.name} puts in it")
            entries[tensor] = found[tensor]
    return entries


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
