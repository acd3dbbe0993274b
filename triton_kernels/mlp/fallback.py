"""The switch between kernels and plain torch, and what serves when the compiler or the driver refuses a kernel.

``EXPERT_MLP_KERNELS`` in the environment is ``auto`` (the default: kernels where they can, else the reference, which
says why, once), ``require`` (what the kernels cannot take, and what is refused, is an error) or ``forbid`` (always the
reference).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")
SWITCH = "EXPERT_MLP_KERNELS"
CHOICES = ("auto", "require", "forbid")

# Keys of the launches that were refused: to try again would compile again, at every step, for minutes.
_refused: set[Hashable] = set()


@torch.compiler.assume_constant_result
def switch() -> str:
    """What EXPERT_MLP_KERNELS asks for.

    Raises:
        ValueError: it is none of ``CHOICES``.
    """
    value = os.environ.get(SWITCH, "auto")
    if value not in CHOICES:
        raise ValueError(f"{SWITCH}={value}: choose one of {', '.join(CHOICES)}")
    return value


@cache
def say(reason: str) -> None:
    """Warn that the reference serves, the first time for a reason."""
    warnings.warn(f"expert_mlp: using the plain torch reference, because {reason}", stacklevel=4)


def is_refused(key: Hashable) -> bool:
    """Whether the launches of this key were refused in this process."""
    return key in _refused


def with_fallback(key: Hashable, kernels: Callable[[], Result], reference: Callable[[], Result]) -> Result:
    """What kernels returns, or, once a launch of this key was refused, what the reference does.

    Raises:
        LaunchError: a launch is refused, and the switch requires the kernels.
    """
    from triton_kernels.launching import LaunchError

    if key not in _refused:
        try:
            return kernels()
        except LaunchError as error:
            if switch() == "require":
                raise
            _refused.add(key)
            say(f"a kernel was refused ({error}); {SWITCH}=require makes this an error, forbid leaves the kernels out")
    return reference()
