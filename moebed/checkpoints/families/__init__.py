"""Checkpoint families: for each a config map and a key map onto the one decoder, usable both ways.

Importing the package is cheap: the names below are loaded on first use.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "FAMILIES": "moebed.checkpoints.families.registry",
    "family_of": "moebed.checkpoints.families.registry",
    "Family": "moebed.checkpoints.families.base",
    "KeyMap": "moebed.checkpoints.families.keys",
    "TensorPart": "moebed.checkpoints.families.keys",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moebed.checkpoints.families' has no attribute {name!r}")
