"""What a process needs in its environment to see emulated devices, and its children too."""

from __future__ import annotations

import os
from pathlib import Path

from tests.emulated_cuda.build import library

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def environment(devices: int = 1, capability: str = "9.0", waits: Path | None = None) -> dict[str, str]:
    """This environment and the emulated devices; each process leaves its waits in a folder ``waits``."""
    paths = [str(HERE / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "EMULATED_CUDA": f"{library()},{devices},{capability}",
        **({} if waits is None else {"EMULATED_CUDA_WAITS": str(waits.resolve())}),
    }
