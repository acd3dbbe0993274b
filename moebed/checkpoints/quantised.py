"""Quantised safetensors: fp8 with a scale for each block, channel or tensor, and MXFP4, as tensors of plain numbers.

What a tensor is stands in the file, by its type and the scale beside it; ``config.json`` says the size of blocks, and
the method of those that are not read. R rows and C columns of a matrix, E experts, F their width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebed.checkpoints.families.declared import QUANTISED_SETTINGS
from moebed.checkpoints.files import CodeEntry, PackedEntry, TensorEntry
from moebed.checkpoints.recognised import WAYS_OUT, quantised_names
from moebed.errors import UserError

_AT_A_TIME = 1 << 20  # numbers
_BLOCK = (128, 128)  # rows and columns that share a scale, where config.json names none
_FP8 = torch.float8_e4m3fn
_E8M0 = 127  # 2^(code - 127)
_READ = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors")  # the last one only with float-quantized
_SCALES = ("_scale_inv", "_scale")
# Scales of what passes through a layer, which are no part of its weights.
_ACTIVATIONS = re.compile(r"\.(input_scale|activation_scale|[qkv]_scale|output_scale)$")
_BLOCKS = re.compile(r"(?P<experts>.*\.experts)\.(?P<matrix>gate_up|down)_proj_blocks$")
# MXFP4's numbers, by their codes of 4 bits: a sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Quantisation(NamedTuple):
    """What a ``config.json`` says of its weights' quantisation.

    Args:
        key: Where it says so.
        method: What it is called; the format with it, where that tells more.
        block: Rows and columns that share a scale.
    """

    key: str
    method: str
    block: tuple[int, int]

    @property
    def read(self) -> bool:
        """Whether weights of this method are read."""
        name, _, form = self.method.partition(" ")
        return name in _READ and (name != "compressed-tensors" or form in ("float-quantized", "naive-quantized"))


def quantisation_of(settings: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Quantisation | None]:
    """Settings without those of quantisation, and what those say; None where there are none.

    Raises:
        UserError: They are no settings.
    """
    rest = {key: value for key, value in settings.items() if key not in QUANTISED_SETTINGS}
    key = next((key for key in QUANTISED_SETTINGS if settings.get(key) is not None), None)
    if key is None:
        return rest, None
    given = settings[key]
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: {key} is {json.dumps(given)[:60]}; it must be a block of settings")
    method, form = given.get("quant_method", "a method without a name"), given.get("format")
    size = given.get("weight_block_size")
    block = tuple(size) if isinstance(size, list) else _BLOCK
    if len(block) != 2 or not all(type(one) is int and one > 0 for one in block):
        raise UserError(f"{where}: weight_block_size is {json.dumps(size)[:60]}; it must be two whole numbers above 0")
    return rest, Quantisation(key, f"{method} {form}" if form else str(method), (block[0], block[1]))


def unquantised(
    entries: Mapping[str, TensorEntry], found: Quantisation | None, where: str
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Entries in which quantised weights are tensors of numbers under the names of weights, and notes.

    Args:
        entries: All tensors of the files.
        found: What ``config.json`` says of them.
        where: What an error calls that.

    Raises:
        UserError: Weights are quantised in a way that is not read, or a scale is missing, left over, or does not fit.
    """
    strange = quantised_names(entries)
    if not strange:
        said = "is passed over, as all tensors are stored as plain numbers"
        return dict(entries), [f"{where}: {found.key} ({found.method}) {said}"] if found is not None else []
    if found is not None and not found.read:
        raise UserError(
            f"{where}: the weights are quantised by {found.method}, which is not read (there is a tensor "
            f"{strange[0]}); {WAYS_OUT}"
        )
    rest, kinds = dict(entries), dict[str, None]()
    for kind, used, made in _made(entries, found):
        kinds[kind] = None
        for name in used:
            rest.pop(name, None)
        rest.update(made)
    notes = [f"{where}: weights are read from {kind}" for kind in kinds]
    dropped = [name for name in rest if _ACTIVATIONS.search(name)] if kinds else []
    for name in dropped:
        del rest[name]
    if dropped:
        notes.append(f"{where}: {dropped[0]} and the like are passed over; activations are not quantised here")
    return rest, notes


def _made(
    entries: Mapping[str, TensorEntry], found: Quantisation | None
) -> Iterator[tuple[str, tuple[str, ...], dict[str, TensorEntry]]]:
    """(what it is, names that it is made of, entries) of everything that is quantised."""
    block = found.block if found is not None else _BLOCK
    for name, entry in entries.items():
        if not isinstance(entry, CodeEntry):
            continue
        if blocks := _BLOCKS.fullmatch(name):
            scales = f"{blocks['experts']}.{blocks['matrix']}_proj_scales"
            made = _experts(entry, _scale(entries, name, scales), blocks["experts"], blocks["matrix"])
            yield "MXFP4, expected relative error .114", (name, scales), made
        elif entry.stored == "F8_E4M3":
            beside = next((name + end for end in _SCALES if name + end in entries), None)
            if beside is None:
                raise UserError(f"{entry.path}: tensor {name} is fp8 and has no scale; {WAYS_OUT}")
            yield "fp8, expected relative error .026", (name, beside), {name: Fp8Entry(entry, entries[beside], block)}


def _scale(entries: Mapping[str, TensorEntry], name: str, scale: str) -> CodeEntry:
    found = entries.get(scale)
    if not isinstance(found, CodeEntry):
        raise UserError(f"{entries[name].path}: tensor {name} has no {scale.rpartition('.')[2]}; {WAYS_OUT}")
    return found


class Fp8Entry(PackedEntry):
    """Numbers (..., R, C) in fp8 (e4m3), each times the scale of its block, its row, or the tensor.

    Args:
        codes: The tensor.
        scales: (..., ⌈R/rows⌉, ⌈C/columns⌉) of blocks, (R, 1) or (R,) of rows, or one number; plain, or powers of two.
        block: Rows and columns of a block.
    """

    dtype = torch.bfloat16

    def __init__(self, codes: CodeEntry, scales: TensorEntry, block: tuple[int, int]) -> None:
        self.path, self.file = codes.path, codes.file
        self.shape, self.position = codes.shape, codes.position
        self._codes, self._scales = codes, scales
        if len(self.shape) < 2:
            raise UserError(f"{self.path}: a tensor of shape {list(self.shape)} is fp8, which only matrices can be")
        *outer, rows, columns = self.shape
        grid = (*outer, -(-rows // block[0]), -(-columns // block[1]))
        if scales.shape == grid:
            self._block = block
        elif scales.shape in ((rows, 1), (rows,)) and not outer:
            self._block = 1, columns
        elif scales.shape in ((*outer, 1, 1), tuple(outer), (1,), ()):
            self._block = rows, columns
        else:
            raise UserError(
                f"{self.path}: scales of shape {list(scales.shape)} do not fit a tensor of shape {list(self.shape)} in "
                f"blocks of {block[0]} × {block[1]}"
            )

    def stored_bytes(self, rows: int) -> int:
        """Bytes that so many rows take in the file; those of the scales are next to nothing."""
        return rows * self.shape[-1]

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, C) with the rows from ``first`` on."""
        scales = self._all_scales()  # of all blocks (block rows, block columns)
        per_matrix = -(-self.shape[-2] // self._block[0])
        band = max(1, _AT_A_TIME // out.shape[-1])
        codes = torch.empty(min(band, len(out)), out.shape[-1], dtype=torch.uint8)
        for begin in range(0, len(out), band):
            rows = out[begin : begin + band]
            self._codes.read_codes(first + begin, codes[: len(rows)])
            place = torch.arange(first + begin, first + begin + len(rows))
            matrix, row = place // self.shape[-2], place % self.shape[-2]
            place = (matrix * per_matrix + row // self._block[0]) % len(scales)  # one number may serve all matrices
            wide = scales[place].repeat_interleave(self._block[1], dim=1)[:, : out.shape[-1]]
            rows.copy_(codes[: len(rows)].view(_FP8).float().mul_(wide))

    def _all_scales(self) -> Tensor:
        return _numbers(self._scales).reshape(-1, -(-self.shape[-1] // self._block[1]))


def _numbers(entry: TensorEntry) -> Tensor:
    """All scales of a tensor, float32, flat; of codes of 8 bits, powers of two."""
    columns = entry.shape[-1] if entry.shape else 1
    rows = 1
    for size in entry.shape[:-1]:
        rows *= size
    if isinstance(entry, CodeEntry):
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        entry.read_codes(0, codes)
        return torch.exp2(codes.flatten().float() - _E8M0)
    values = torch.empty(rows, columns, dtype=entry.dtype)
    entry.read(0, values)
    return values.flatten().float()


class Mxfp4Entry(PackedEntry):
    """One expert's matrix (R, C) in MXFP4: 32 numbers of 4 bits share a power of two; the lower half of a byte first.

    Args:
        blocks: Codes (E, O, C / 32, 16) of all experts.
        scales: Exponents (E, O, C / 32).
        expert: Which one.
        first: The first of its rows among the O stored ones.
        step: From one of its rows to the next.
    """

    dtype = torch.bfloat16

    def __init__(self, blocks: CodeEntry, scales: CodeEntry, expert: int, first: int, step: int) -> None:
        _, stored, groups, _ = blocks.shape
        self.path, self.file, self.shape = blocks.path, blocks.file, (stored // step, 32 * groups)
        self._first, self._step = expert * stored + first, step
        self._blocks, self._scales = blocks, scales
        self.position = blocks.position + self._first * groups * 16

    def stored_bytes(self, rows: int) -> int:
        """Bytes that so many rows take in the file."""
        return rows * self.shape[1] // 32 * 17

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, C) with the rows from ``first`` on."""
        groups, table = self.shape[1] // 32, torch.tensor(_E2M1)
        band = max(1, _AT_A_TIME // (self.shape[1] * self._step))
        for begin in range(0, len(out), band):
            rows = out[begin : begin + band]
            place, count = self._first + (first + begin) * self._step, (len(rows) - 1) * self._step + 1
            codes = torch.empty(count * groups, 16, dtype=torch.uint8)
            exponents = torch.empty(count, groups, dtype=torch.uint8)
            self._blocks.read_codes(place * groups, codes)
            self._scales.read_codes(place, exponents)
            codes = codes.view(count, groups, 16)[:: self._step].int()
            numbers = table[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(2)]  # (rows, groups, 32)
            scales = torch.exp2(exponents[:: self._step].float() - _E8M0)[..., None]
            rows.copy_((numbers * scales).flatten(1))


def _experts(blocks: CodeEntry, scales: CodeEntry, prefix: str, matrix: str) -> dict[str, TensorEntry]:
    """The matrices of all experts under names of their own; rows of gate and up alternate in the file, gate first."""
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
        raise UserError(
            f"{blocks.path}: blocks of shape {list(blocks.shape)} and scales of shape {list(scales.shape)} are no MXFP4"
        )
    names = ("gate", "up") if matrix == "gate_up" else ("down",)
    if blocks.shape[1] % len(names):
        raise UserError(f"{blocks.path}: {blocks.shape[1]} rows are not those of gate and up in turn")
    return {
        f"{prefix}.{expert}.{name}_proj.weight": Mxfp4Entry(blocks, scales, expert, place, len(names))
        for expert in range(blocks.shape[0])
        for place, name in enumerate(names)
    }
