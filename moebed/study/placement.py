"""Which GPUs a run of a study sees: as many as it asks for, those that the fewest other runs are on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_devices(environment: Mapping[str, str] = os.environ) -> list[str]:
    """GPUs of this process, as ``CUDA_VISIBLE_DEVICES`` names them; all of the machine's where it is not set."""
    named = environment.get(VARIABLE)
    if named is None:
        import torch

        return [str(index) for index in range(torch.cuda.device_count())]
    found = []
    for name in (part.strip() for part in named.split(",")):
        if not name or name.startswith("-"):  # CUDA takes those before the first that is none
            break
        found.append(name)
    return found


class Placement:
    """The runs that are under way share the GPUs as evenly as can be.

    Args:
        devices: Names of the GPUs; none where runs are not to be placed.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = list(devices)
        self._placed: dict[str, list[str]] = {}  # of each run under way

    def take(self, run: str, number: int) -> dict[str, str]:
        """What a run's environment is to say, so that it sees ``number`` GPUs; nothing where it wants none.

        A run that wants more than there are sees all, and says itself that they are too few.
        """
        if not self._devices or number < 1:
            return {}
        used = [name for names in self._placed.values() for name in names]
        chosen = sorted(self._devices, key=used.count)[:number]  # stable: in their order where equally many are there
        self._placed[run] = sorted(chosen, key=self._devices.index)
        return {VARIABLE: ",".join(self._placed[run])}

    def release(self, run: str) -> None:
        """A run has ended."""
        self._placed.pop(run, None)
