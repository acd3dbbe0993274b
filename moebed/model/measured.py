"""What ``moebed check`` found on this kind of GPU about the experts backends, for ``experts_backend: auto``.

One JSON file for each kind of device, in the user's cache folder. It serves only the versions of PyTorch and Triton,
and the source of the kernels, that it was measured with; without it ``grouped_mm`` serves. Imports no Triton.

Work is R·H·F: R rows of the experts (tokens × experts a token), H hidden, F expert intermediate.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from moebed.machine.cache import cache_folder
from moebed.machine.settled import settled
from triton_kernels.tuned import source


def path_of(device: str) -> Path:
    """The file for a device of this name; it need not be there."""
    return cache_folder(None) / "experts_backends" / f"{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"


def content(device: str, least_work: Mapping[str, float | None]) -> str:
    """What the file holds.

    Args:
        device: Name of the device.
        least_work: By type (``bfloat16``), from how much work on the Triton kernels are right and faster than
            ``grouped_mm``; None where they never are.
    """
    return json.dumps({**_made_with(device), "least_work": dict(least_work)}, indent=1) + "\n"


@settled  # of a device and a type, within a process
def least_work(device: torch.device, dtype: torch.dtype) -> float:
    """From how much work on ``auto`` takes the Triton kernels on a device; infinite where nothing asks for them."""
    return _of_kind(torch.cuda.get_device_name(device)).get(str(dtype).removeprefix("torch."), math.inf)


def _made_with(device: str) -> dict[str, str]:
    return {"device": device, "torch": torch.__version__, "triton": _triton(), "source": source()}


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def _of_kind(device: str) -> Mapping[str, float]:
    path = path_of(device)
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {kept[name]}" for name, value in _made_with(device).items() if kept[name] != value]
        if not other:
            return {dtype: float(work) for dtype, work in kept["least_work"].items() if work is not None}
        why = f"was measured with {', '.join(other)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"cannot be read ({type(error).__name__})"
    warnings.warn(
        f"experts_backend auto: what {path} says of this kind of GPU {why}, so grouped_mm serves; `moebed check`"
        " measures anew",
        stacklevel=2,
    )
    return {}
