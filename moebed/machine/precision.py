"""The precision that ``auto`` stands for: what the machine multiplies fastest, measured where a name does not tell.

A CPU's flags are not enough: one with bf16 instructions may multiply float32 faster, as Intel's AVX512-BF16 does, or
half as fast, as AMD's. So on a CPU a product of each type is timed; a GPU's capability says it by itself.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

PrecisionName = Literal["bf16-mixed", "32-true"]

COMPUTED_IN = "computed in"  # the key beside a run's numbers
_COMPUTED_IN = {
    "32-true": "float32",
    "bf16-mixed": "weights in float32, products in bfloat16, losses from their results summed in float32",
    "bf16-true": "weights and products in bfloat16, losses from their results summed in float32",
}
SIDE = 256  # of the square matrices: as large as a small model's, and not minutes where bf16 is emulated
SECONDS = 0.025  # of a core, spent on each type, after one product that warms up
LEAST = 5  # products of each type: one alone may be slowed down by what else a machine does
# Mixed precision casts weights and activations besides. CPUs are far from this on either side: .7 or 2 and more.
MARGIN = 1.2


@dataclass(frozen=True)
class Choice:
    """What ``precision: auto`` becomes on a machine.

    Args:
        precision: A name that Lightning knows.
        reason: Why, in words, with what was measured.
    """

    precision: PrecisionName
    reason: str

    def __str__(self) -> str:
        return f"precision auto: {self.precision} here ({self.reason})"


def computed_in(precision: str) -> str:
    """What a run of Lightning's ``precision`` computes in, in a line beside its losses."""
    return f"{_COMPUTED_IN[precision]} ({precision})" if precision in _COMPUTED_IN else precision


def choose_precision(accelerator: str = "auto") -> Choice:
    """bf16-mixed where the hardware multiplies bf16 faster than float32, else 32-true.

    Args:
        accelerator: As in ``trainer.accelerator``: auto, cpu, gpu, cuda, mps. A GPU that is asked for and not here, as
            where a cluster's run is planned, is taken for one with bf16.
    """
    device = device_of(accelerator)
    if device == "cpu":
        return _of_cpu(*measured_rates())
    if device == "cuda":
        return _of_cuda()
    if device == "mps":
        return Choice("32-true", "MPS, on which nothing was measured")
    return Choice("32-true", f"accelerator {device}, of which nothing is known")


def device_of(accelerator: str) -> str:
    """The kind of device that Lightning takes for an accelerator's name."""
    if accelerator == "gpu":
        return "mps" if torch.backends.mps.is_available() else "cuda"
    if accelerator != "auto":
        return accelerator
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _of_cpu(float32: float, bfloat16: float) -> Choice:
    rates = f"a core multiplies bf16 at {bfloat16:,.0f} GFLOP/s, float32 at {float32:,.0f}"
    return Choice("bf16-mixed" if bfloat16 > MARGIN * float32 else "32-true", rates)


def _of_cuda() -> Choice:
    if not torch.cuda.is_available():
        return Choice("bf16-mixed", "no GPU is here to look at; one of capability 8.0 or later is assumed")
    capability, name = min(
        (torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))
        for index in range(torch.cuda.device_count())
    )
    version = ".".join(map(str, capability))
    if torch.version.hip is not None or capability >= (8, 0):
        return Choice("bf16-mixed", f"{name}, capability {version}, multiplies bf16")
    return Choice("32-true", f"{name}, capability {version}, has no bf16; 16-mixed is faster but can overflow")


def multiplies_bf16_faster() -> bool:
    """Whether this CPU multiplies bfloat16 clearly faster than float32."""
    float32, bfloat16 = measured_rates()
    return bfloat16 > MARGIN * float32


@functools.cache
def measured_rates() -> tuple[float, float]:
    """GFLOP/s of a core's products in float32 and bfloat16.

    One thread, the shortest time, and the clock of the thread, which stands while others have the core: so other work
    on the machine changes the figures little, and a run on a busy machine computes in what it would on an idle one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _product_seconds((torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    float32, bfloat16 = (2e-9 * SIDE**3 / min(found) for found in seconds)
    return float32, bfloat16


def _product_seconds(types: Sequence[torch.dtype]) -> list[list[float]]:
    pairs = [[torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2)] for dtype in types]
    for pair in pairs:
        torch.mm(*pair)
    seconds: list[list[float]] = [[] for _ in types]
    while any(map(_unfinished, seconds)):  # in turn, so that a slow moment of the machine falls on both
        for pair, found in zip(pairs, seconds, strict=True):
            if _unfinished(found):
                begin = time.thread_time()
                torch.mm(*pair)
                found.append(time.thread_time() - begin)
    return seconds


def _unfinished(seconds: Sequence[float]) -> bool:
    return len(seconds) < LEAST or sum(seconds) < SECONDS
