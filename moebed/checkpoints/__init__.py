"""Pretrained checkpoints on disk: found, checked before work, read a piece at a time, and written.

May import ``moebed.views``, ``moebed.data`` and what lies below.

Importing the package is cheap: the names below are loaded on first use.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "Checkpoint": "moebed.checkpoints.checkpoint",
    "WeightPool": "moebed.checkpoints.pool",
    "load_decoder": "moebed.checkpoints.whole",
    "write_checkpoint": "moebed.checkpoints.whole",
    "find_checkpoint": "moebed.checkpoints.hub",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moebed.checkpoints' has no attribute {name!r}")
