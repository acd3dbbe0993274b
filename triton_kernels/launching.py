"""The one place where kernels are launched: on the device of their tensors, with errors that name the kernel."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable
from typing import Any

import torch
import triton

from triton_kernels.precision import interpreted

INTERPRETED_PROGRAMS = 3  # few, so that each walks several tiles
MOST_PROGRAMS = 2**31 - 1


class LaunchError(RuntimeError):
    """A kernel that the compiler or the driver refused; the message is one line, with the kernel's name."""


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes device the current one, which is where Triton compiles for and launches to, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel.

    Raises:
        LaunchError: the compiler or the driver refused it. What another kernel left on the device (an assertion, an
            illegal address, no memory) stays the error that it is: no other way of computing would mend it.
    """
    _refusing(kernel, grid, lambda: kernel[grid](*arguments, **options))


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few where kernels are interpreted."""
    return INTERPRETED_PROGRAMS if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def launch_persistent(kernel: Any, device: torch.device, most: int, *arguments: Any, **options: Any) -> None:
    """Launch one program for each multiprocessor, and no more than most, on a kernel that makes descriptors.

    Triton asks an allocator, which belongs to the calling context, for the memory of these descriptors. It is set in
    a copy of the context: a caller's own stays, and the threads of autograd, which have contexts of their own, have it.
    """
    grid = (min(processors(device), most),)

    def run() -> None:
        if not interpreted():
            triton.set_allocator(_scratch)
        kernel[grid](*arguments, **options)

    _refusing(kernel, (most,), lambda: contextvars.copy_context().run(run))


def _refusing(kernel: Any, grid: tuple[int, ...], run: Callable[[], object]) -> None:
    if math.prod(grid) > MOST_PROGRAMS:
        raise LaunchError(f"{_name(kernel)}: {math.prod(grid)} tiles are more than the {MOST_PROGRAMS} it can count")
    if interpreted():
        run()
        return
    try:
        run()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise LaunchError(f"{_name(kernel)}: {type(error).__name__}: {first}") from error


def _name(kernel: Any) -> str:
    return getattr(kernel, "__name__", str(kernel))


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors that a kernel makes, from torch's allocator, which keeps to the stream's order."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
