"""What the probes of weights cost: each one, and all together, over reading and multiplying a layer once.

The floor reads every expert matrix of the layer from the page cache into one buffer, copies it to float32, multiplies
it by its own transpose on its shorter side: the smallest product from which all lengths and angles, and so a spectrum,
follow, exact as ``moebed.machine.float32.exact_products`` has it. Both sides are given the same files.

N shorter side, K longer side of a matrix.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moebed.bench.streaming import Shape
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.machine.allocator import keep_freed_blocks
from moebed.machine.float32 import exact_products
from probes.registry import PROBES, STATIC_PROBES
from probes.running.driver import Timing, needs_of, run_probes

MATCHING = "neuron_matching"  # has lines of its own
MEASURED = tuple(name for name in STATIC_PROBES if name != MATCHING)


SIZES = {
    "mixtral": ("Mixtral 8x7B", Shape(layers=1)),
    "deepseek": ("DeepSeekMoE-16B", Shape(2048, 1408, 16, 16, 64, 1)),
    "olmoe": ("OLMoE-1B-7B", Shape(2048, 1024, 16, 16, 64, 1)),
}  # a layer of each, without a shared expert


def layer_pass(folder: Path) -> dict[str, float]:
    """Seconds of each probe, and as "all" those of the whole pass through layer 0, its reading included."""
    keep_freed_blocks()  # as ``moebed probe`` does
    timing, start = Timing(), time.perf_counter()
    model = PretrainedMoE(str(folder), layers=[0], memory_budget="2GiB")
    probes = [PROBES[name]() for name in MEASURED]
    run_probes(model.views(None, needs_of(probes)), probes, timing)
    model.close()
    return timing.probe | {"all": time.perf_counter() - start}


def read_and_multiply(folder: Path, shape: Shape) -> float:
    """Seconds of the floor, layer 0."""
    size = shape.hidden * shape.width
    small, wide = torch.empty(size, dtype=torch.bfloat16), torch.empty(size)
    side = min(shape.hidden, shape.width)
    product = torch.empty(side, side)
    places = places_of(folder / "layer-0.safetensors")
    start = time.perf_counter()
    with exact_products(is_bf16=True), (folder / "layer-0.safetensors").open("rb", buffering=0) as file:
        for offset, rows, columns in places:
            file.seek(offset)
            into = memoryview(small.view(torch.uint8).numpy().data)
            while len(into):
                into = into[file.readinto(into) :]
            wide.copy_(small)
            matrix = wide.view(rows, columns) if rows < columns else wide.view(rows, columns).T  # (N, K)
            torch.mm(matrix, matrix.T, out=product)
    return time.perf_counter() - start


def rates() -> str:
    """What the machine gives on all cores, for a roofline: the best of some tries, in words."""
    numbers = torch.ones(1 << 28)  # a GB, which no cache holds
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        side, seconds = _product(dtype)
        found.append(f"{name} {2e-9 * side**3 / seconds:,.0f} GFLOP/s ({side} × {side})")
    rate = 1e-9 * numbers.nbytes / _best_seconds(numbers.sum)
    return f"products here: {', '.join(found)}; memory is read at {rate:.1f} GB/s"


def _product(dtype: torch.dtype) -> tuple[int, float]:
    """Side and seconds of the largest product that takes no time to speak of: bf16 has 1 GFLOP/s on some processors."""
    side = 256
    while True:
        matrix = torch.ones(side, side, dtype=dtype)
        seconds = _best_seconds(functools.partial(torch.mm, matrix, matrix))
        if side == 2048 or seconds > 0.01:
            return side, seconds
        side *= 2


def _best_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def places_of(path: Path) -> list[tuple[int, int, int]]:
    """Where the expert matrices lie in a safetensors file: offset in bytes, rows, columns."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = [entry for name, entry in header.items() if ".experts." in name]
    return sorted((8 + length + entry["data_offsets"][0], *entry["shape"]) for entry in found)
