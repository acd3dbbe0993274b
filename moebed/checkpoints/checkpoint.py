"""A checkpoint folder: its files found and checked against its config before anything is read.

Every setting and every tensor is used, or refused by name, or known to change nothing: what only a forward pass needs
is an error for whoever runs the model, and a note for who looks at its weights alone.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebed.checkpoints.families.base import Family, Stored
from moebed.checkpoints.families.declared import HARMLESS_TENSORS
from moebed.checkpoints.families.keys import KeyMap, TensorPart
from moebed.checkpoints.families.own import RUN
from moebed.checkpoints.families.registry import family_of
from moebed.checkpoints.files import NamedEntry, PackedEntry, RawEntry, RawFile, TensorEntry, UnknownEntry
from moebed.checkpoints.finding import find_entries, read_json
from moebed.checkpoints.gguf.finding import gguf_at
from moebed.checkpoints.gguf.model import open_gguf
from moebed.checkpoints.quantised import quantisation_of, unquantised
from moebed.checkpoints.recognised import (
    other_folder,
    prefix_of,
    require_no_adapter,
    require_no_other_file,
    require_unquantised,
)
from moebed.checkpoints.run import is_run, open_run
from moebed.checkpoints.stacked import unstacked
from moebed.checkpoints.xai import open_release, release_folder
from moebed.errors import ConfigError, UserError
from moebed.machine import provenance
from moebed.machine.finite import all_finite
from moebed.model.config import ModelConfig

_BAND = 1 << 22  # numbers of two tensors that are compared at a time


class Checkpoint:
    """A checkpoint whose every tensor is known to be there, to be whole, and to fit the config.

    Args:
        name: What a person calls it.
        family: Its family.
        config: Its model.
        settings: Its ``config.json``.
        entries: All tensors in its files, by name.
        notes: What a person should know about it.
        described_by: The file that says what the model is, for errors.
        called: What its files call one of the entries, for errors.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        config: ModelConfig,
        settings: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        notes: list[str],
        described_by: str = "config.json",
        called: Callable[[str], str] = str,
    ) -> None:
        self.name, self.family, self.config, self.settings = name, family, config, settings
        self.entries, self.notes = entries, notes
        self._described_by, self._called = described_by, called
        self.keys = KeyMap(family, config, entries)
        self._check()
        # Of a file that is read by its name, the file of that name counts; else the one that was opened.
        named = {entry.path for entry in entries.values() if isinstance(entry, NamedEntry)}
        held = {entry.path: entry.file for entry in entries.values() if entry.file is not None}
        self._opened: dict[Path, tuple[Path | RawFile, tuple[int, ...]]] = {}
        for path in self._files().values():
            file = path if path in named or path.parent in named else held.get(path) or RawFile(path)
            self._opened[path] = file, _content(file)

    @classmethod
    def open(cls, path: str | Path, runs: bool = True) -> Checkpoint:
        """Find and check a checkpoint: a folder, a GGUF file, xai-org's Grok-1, or a ``.ckpt`` file of a run.

        Args:
            path: Where it is.
            runs: Whether the model is wanted as a whole, to be run, trained or written anew. Where only its weights
                are looked at, what the decoder does not compute is a note and no error.

        Raises:
            UserError: Something is missing, damaged, does not fit or is not computed; one line that names the file and
                the tensor or the setting.
        """
        path = Path(path)
        if (file := gguf_at(path)) is not None:
            model = open_gguf(file)
            return cls._of_settings(
                file.name, file, model.settings, model.entries, model.notes, runs, "header", model.called
            )
        if path.is_file():
            require_no_other_file(path)
        if is_run(path):
            config, entries = open_run(path)
            checkpoint = cls(path.name, RUN, config, {"config": config.to_dict()}, entries, [])
            checkpoint._require_declared(path, [], runs)
            return checkpoint
        if not path.is_dir():
            raise UserError(f"{path} does not exist; give the folder of a checkpoint or a hub id such as org/name")
        require_no_adapter(path)
        where, release = path / "config.json", release_folder(path)
        if not where.is_file() and release is None:
            raise UserError(other_folder(path) or f"{where} is missing; a checkpoint folder needs it")
        settings, entries = open_release(release) if release and not where.is_file() else (read_json(where), {})
        return cls._of_settings(path.resolve().name, where, settings, entries, [], runs)

    @classmethod
    def _of_settings(
        cls,
        name: str,
        where: Path,
        settings: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        notes: list[str],
        runs: bool,
        described_by: str = "config.json",
        called: Callable[[str], str] = str,
    ) -> Checkpoint:
        """Check what a ``config.json``, or what stands for it, says against the tensors, which may lie beside it."""
        family = family_of(settings.get("model_type"), str(where))
        settings, quantisation = quantisation_of(settings, str(where))
        reading = family.read(settings, str(where))
        if not entries:
            entries, notes = _find(where.parent)
        entries, unpacked = unquantised(entries, quantisation, str(where))
        notes = notes + unpacked
        entries = unstacked(entries, family, reading.config)
        require_unquantised(entries)
        config, tied = _settle_head(family, reading.config, entries, where)
        checkpoint = cls(name, family, config, settings, entries, notes + tied, described_by, called)
        checkpoint.notes += [f"{where}: {note}" for note in reading.notes]
        if "auto_map" in settings:
            checkpoint.notes.append(
                f"{where} names code of its own (auto_map); it is ignored, code of a checkpoint is never run"
            )
        checkpoint._require_declared(where, reading.uncomputed, runs)
        return checkpoint

    def _require_declared(self, where: Path, uncomputed: Sequence[str], runs: bool) -> None:
        """Refuse, or note where only weights are looked at, what the decoder would pass over."""
        found = [f"{where}: {one}" for one in uncomputed]
        used = {part.name for part in self.keys.everything()}
        if self.config.tie_word_embeddings:  # compared already
            used.add(Stored.of(self.family.tensors["lm_head.weight"]).name)
        spare = sorted(name for name in self.entries if name not in used and not HARMLESS_TENSORS.search(name))
        if self.family.further is not None:
            further = re.compile(self.family.further.format(layers=self.config.num_hidden_layers))
            left = [name for name in spare if further.search(name)]
            spare = [name for name in spare if name not in set(left)]
            if left:
                self.notes.append(f"{left[0]} and its like ({len(left)}) predict further tokens and are left aside")
        if spare:
            more = f" and {len(spare) - 3} more" if len(spare) > 3 else ""
            layers = f"{self.config.num_hidden_layers} layers"
            found.append(
                f"{self.entries[spare[0]].path}: {', '.join(spare[:3])}{more}: no such tensor in the model of {layers} "
                f"that {where.name} describes"
            )
        if found and runs:
            raise ConfigError(f"{found[0]}; its weights alone can be looked at, by `moebed probe` without text")
        self.notes += [f"{one}; its weights alone are looked at here" for one in found]

    def _check(self) -> None:
        """Every tensor that the model needs is there, has the shape that the config gives it, and a known dtype."""
        parts = {part.name: part for part in self.keys.everything()}
        require_unquantised(self.entries, parts)
        missing = [name for name in parts if name not in self.entries]
        if missing:
            why = prefix_of(missing, self.entries)
            if why is not None:
                raise UserError(f"{self.name}: {why}")
            raise UserError(
                f"{self.name}: tensor {self._called(missing[0])} is missing; its {self._described_by} asks for it"
            )
        for part in parts.values():
            entry = self.entries[part.name]
            if entry.shape != part.shape:
                raise UserError(
                    f"{entry.path}: tensor {self._called(part.name)} has shape {list(entry.shape)} but its "
                    f"{self._described_by} makes it {list(part.shape)}; the file and the config do not belong together"
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
        """Size of the part in memory, in bytes."""
        return part.rows * part.columns * self.dtype(part).itemsize

    def stored_bytes(self, part: TensorPart) -> int:
        """Size of the part on disk, in bytes."""
        entry = self.entries[part.name]
        return entry.stored_bytes(part.rows) if isinstance(entry, PackedEntry) else self.num_bytes(part)

    def place(self, part: TensorPart) -> tuple[str, int, int]:
        """Sorts parts in the order in which they lie on disk."""
        entry = self.entries[part.name]
        return entry.path.name, entry.position, part.first

    def read_into(self, part: TensorPart, out: Tensor) -> None:
        """Read a part into out (rows, columns); the numbers are not looked at."""
        self.entries[part.name].read(part.first, out)

    def cached(self, part: TensorPart) -> Tensor | None:
        """A part (rows, columns) where the kernel holds it in memory: nothing is copied, nor looked at; else None."""
        entry = self.entries[part.name]
        return entry.cached(part.first, part.rows, part.columns) if isinstance(entry, RawEntry) else None

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
        if all_finite(values):
            return
        kind, entry = "NaN" if bool(values.isnan().any()) else "Inf", self.entries[part.name]
        within = getattr(entry, "within", None)
        of = f" (of {within})" if within else ""
        raise UserError(
            f"tensor {part.name}{of} in {entry.path} holds {kind}; download the file again, or probe the "
            "other layers with --layers"
        )

    def record(self) -> dict[str, Any]:
        """What tells it from another: its name, its files, and what stands for its config and its index."""
        tensors = {name: [entry.path.name, entry.shape, str(entry.dtype)] for name, entry in self.entries.items()}
        settings = provenance.fingerprint([dict(self.settings), tensors])
        return {"name": self.name, "settings": settings, "files": provenance.files_record(self._files())}

    def _files(self) -> dict[str, Path]:
        """The files that hold its tensors, by what they are called in a record."""
        paths: dict[str, Path] = {}
        for path in {entry.path for entry in self.entries.values()}:
            inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
            paths |= {str(one.relative_to(path.parent)): one for one in inside}
        return paths

    def require_unchanged(self) -> None:
        """Before what was made of it is kept: it is what was opened.

        Where another file took its name, the one that was opened is read on: it is held, and whole.

        Raises:
            UserError: A file was written to, or is read by its name and is another one now.
        """
        for path, (file, before) in self._opened.items():
            if _content(file) != before:
                raise UserError(
                    f"{path} has changed since it was opened; what was made of it meanwhile is not kept: begin again "
                    "once it is whole"
                )


def _content(file: Path | RawFile) -> tuple[int, ...]:
    """What changes as a file is written to; of what is not there nothing."""
    try:
        status = os.stat(file if isinstance(file, Path) else file.descriptor)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


def _find(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    try:
        return find_entries(folder)
    except UserError as error:
        told = other_folder(folder) if "has no weights" in str(error) else None
        raise UserError(told or str(error)) from error


def _settle_head(
    family: Family, config: ModelConfig, entries: Mapping[str, TensorEntry], where: Path
) -> tuple[ModelConfig, list[str]]:
    """The model with its head tied to the embedding or not, as transformers does where flag and files disagree.

    Raises:
        UserError: One of the two ends is missing, and the flag says that it is not the one that is there.
    """
    embedding, head = (Stored.of(family.tensors[f"{end}.weight"]).name for end in ("embed_tokens", "lm_head"))
    ends = [name in entries for name in (embedding, head)]
    if config.tie_word_embeddings:
        if all(ends) and not _equal(entries[embedding], entries[head]):
            note = (
                f"{head} is stored and differs from {embedding}, although tie_word_embeddings is true; it is used, as "
                "transformers does"
            )
            return dataclasses.replace(config, tie_word_embeddings=False), [note]
        if ends == [False, True]:
            return config, [f"{embedding} is not stored; it is {head}, since tie_word_embeddings is true"]
    elif any(ends) and not all(ends):
        absent, there = (embedding, head) if ends[1] else (head, embedding)
        raise UserError(
            f"{where.parent}: tensor {absent} is missing and tie_word_embeddings is false; set it to true in "
            f"{where.name} if {there} serves as both"
        )
    return config, []


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or len(one.shape) != 2:
        return False
    if isinstance(one, UnknownEntry) or isinstance(other, UnknownEntry):
        return False
    rows, columns = one.shape
    band = max(1, _BAND // max(1, columns))
    for first in range(0, rows, band):
        size = min(band, rows - first), columns
        bands = torch.empty(size, dtype=one.dtype), torch.empty(size, dtype=one.dtype)
        one.read(first, bands[0])
        other.read(first, bands[1])
        if not torch.equal(*bands):
            return False
    return True
