"""Pretrained checkpoints on disk: found, checked before work, read a piece at a time, and written.

May import ``moebed.views``, ``moebed.data`` and what lies below.

Importing the package is cheap: the names below are loaded on first use.
"""

from moebed.lazy import loaded_on_use

_LAZY = {
    "Checkpoint": "moebed.checkpoints.checkpoint",
    "WeightPool": "moebed.checkpoints.pool",
    "load_decoder": "moebed.checkpoints.whole",
    "write_checkpoint": "moebed.checkpoints.whole",
    "find_checkpoint": "moebed.checkpoints.hub",
}
__all__ = sorted(_LAZY)
__getattr__ = loaded_on_use(__name__, _LAZY)
