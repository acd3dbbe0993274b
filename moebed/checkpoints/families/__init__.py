"""Checkpoint families: for each a config map and a key map onto the one decoder, usable both ways.

Importing the package is cheap: the names below are loaded on first use.
"""

from moebed.lazy import loaded_on_use

_LAZY = {
    "FAMILIES": "moebed.checkpoints.families.registry",
    "family_of": "moebed.checkpoints.families.registry",
    "Family": "moebed.checkpoints.families.base",
    "KeyMap": "moebed.checkpoints.families.keys",
    "TensorPart": "moebed.checkpoints.families.keys",
}
__all__ = sorted(_LAZY)
__getattr__ = loaded_on_use(__name__, _LAZY)
