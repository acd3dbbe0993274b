"""Compiles the C++ sources beside it into one library for an instruction set, keeps it, and calls it.

The sources need a C++ compiler and no header of Python or PyTorch: that takes seconds. A library is kept in the cache
(``$MOEBED_CACHE``, ``~/.cache/moebed``), named by sources and flags. Of processes and threads that ask at once one
compiles and the others wait for it, and take its failure for theirs; one that is killed holds nobody up, and the next
takes away what it left.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.machine import storage
from moebed.machine.cache import cache_folder, find_or_build

COMPILER = "g++"
_COMMON = ("-O3", "-std=c++17", "-fno-tree-slp-vectorize", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")))
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
# From the smallest to the best.
FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
}
LIBRARY = "moebed.so"
NAMES = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx": "AMX"}


class Unavailable(Exception):
    """The backend cannot be had; the message says why."""


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(pattern))


def _kept() -> Path:
    return cache_folder(None) / "native"


def _key(instruction_set: str) -> str:
    digest = hashlib.sha256(" ".join((*_COMMON, *FLAGS[instruction_set])).encode())
    for source in [*_sources("*.cpp"), *_sources("*.h")]:
        digest.update(source.read_bytes())
    return f"{instruction_set}-{digest.hexdigest()[:16]}"


def is_there(instruction_set: str) -> bool:
    """Whether the library for an instruction set was compiled before."""
    return (_kept() / _key(instruction_set) / LIBRARY).exists()


def compiler_takes(instruction_set: str) -> bool:
    """Whether there is a compiler that knows an instruction set."""
    if shutil.which(COMPILER) is None:
        return False
    command = [COMPILER, *FLAGS[instruction_set], "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _compile(instruction_set: str, asked: float, folder: Path) -> None:
    """Write the library into a folder, unless that failed in another process since this one asked, at a time."""
    failure = _kept() / f"{_key(instruction_set)}.failed"
    # Of other sources nobody asks again. A clock that was set back since leaves a time to come.
    if failure.exists() and asked < failure.stat().st_mtime <= time.time():
        raise Unavailable(failure.read_text(encoding="utf-8"))
    for old in _kept().glob(f"{instruction_set}-*.failed"):
        old.unlink(missing_ok=True)
    if shutil.which(COMPILER) is None:
        raise Unavailable(f"compiling it needs {COMPILER}")
    print(
        f"compiling C++ for {NAMES[instruction_set]}, once, a few seconds (kept in {_kept()})",
        file=sys.stderr,
        flush=True,
    )
    command = [COMPILER, *_COMMON, *FLAGS[instruction_set], *map(str, _sources("*.cpp")), "-o", str(folder / LIBRARY)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        said = f"it did not compile: {errors[0].strip() if errors else f'exit code {done.returncode}'}"
        storage.write_text(failure, said)
        raise Unavailable(said)


@functools.cache
def library(instruction_set: str) -> ctypes.CDLL:
    """The compiled library, compiled now if need be.

    Raises:
        Unavailable: There is no compiler, it failed, or the cache cannot be written.
    """
    try:
        build = functools.partial(_compile, instruction_set, time.time())
        folder = find_or_build(_kept(), _key(instruction_set), build)
        loaded = ctypes.CDLL(str(folder / LIBRARY))
    except (OSError, UserError) as error:
        raise Unavailable(f"it cannot be kept or loaded: {error}") from error
    for name in ("expert_mlp", "attention", "coordinates", "gram", "krylov", "carry", "transpose", "assign", "reach"):
        function = getattr(loaded, f"moebed_{name}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int64
    return loaded


def structure(name: str, **types: type) -> type[ctypes.Structure]:
    """What a function of the library takes: its fields in the order of the source, ``workspace`` the last."""
    return type(name, (ctypes.Structure,), {"_fields_": [*types.items(), ("workspace", ctypes.c_void_p)]})


def invoke(
    function: Any,
    kind: type[ctypes.Structure],
    numbers: Mapping[str, float],
    tensors: dict[str, Tensor],
    backward: bool,
) -> int:
    """Call a function of the library on contiguous tensors; outputs are written in place.

    Returns:
        0, or what the function says is wrong, below 0.
    """
    call = kind(**numbers, **{name: tensor.data_ptr() for name, tensor in tensors.items()})
    needed = function(ctypes.byref(call), int(backward))
    if needed < 0:
        return needed
    workspace = torch.empty(max(needed, 1) + 64, dtype=torch.uint8)
    call.workspace = (workspace.data_ptr() + 64) // 64 * 64  # so that it ends where the memory does
    function(ctypes.byref(call), int(backward))
    return 0


_INTEGERS = ("tokens", "hidden", "width", "experts", "top_k", "ragged", "activation", "threads")
_TYPES = ("bf16_rows", "bf16_weights")
_INPUTS = ("index", "weight", "x", "gate_up", "down")
_OUTPUTS = ("before", "out", "grad", "grad_x", "grad_gate_up", "grad_down", "grad_weight")
_EXPERTS = structure(
    "Call", **dict.fromkeys(_INTEGERS + _TYPES, ctypes.c_int64), **dict.fromkeys(_INPUTS + _OUTPUTS, ctypes.c_void_p)
)


class Call:
    """One call of the experts on contiguous tensors."""

    def __init__(self, instruction_set: str, numbers: dict[str, int], tensors: dict[str, Tensor]) -> None:
        self.instruction_set, self.numbers, self.tensors = instruction_set, numbers, tensors
        index, weight, down, x = (tensors[name] for name in ("index", "weight", "down", "x"))
        sizes = tensors["gate_up"].shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
        if not sizes or x.shape[1] != down.shape[1] or index.shape != weight.shape or len(index) != len(x):
            raise RuntimeError("expert_mlp: shapes do not fit one another")
        if index.dtype != torch.int64 or weight.dtype != torch.float32:
            raise RuntimeError("expert_mlp: index must be int64, weight float32")

    def run(self, backward: bool, **outputs: Tensor) -> None:
        """Compute; outputs are written in place.

        Raises:
            RuntimeError: An assignment's expert is not there.
        """
        function = library(self.instruction_set).moebed_expert_mlp
        wrong = invoke(function, _EXPERTS, self.numbers, self.tensors | outputs, backward)
        if wrong < 0:
            expert = int(self.tensors["index"].flatten()[-1 - wrong])
            raise RuntimeError(f"expert_mlp: an assignment is to expert {expert} of {self.numbers['experts']}")
