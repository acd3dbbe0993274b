"""moebed: train and probe Mixture-of-Experts language models.

The modules beside the rooms are what every command needs; they may import one another and no room. The one exception is
``moebed.cli``, which imports a command by its name when it is called.

Importing the package is cheap: the heavy names below are loaded on first use.
"""

from moebed.lazy import loaded_on_use

_LAZY = {
    "ModelConfig": "moebed.model.config",
    "Decoder": "moebed.model.decoder",
    "MoEModule": "moebed.training.module",
    "TextDataModule": "moebed.data.datamodule",
    "UserError": "moebed.errors",
    "ConfigError": "moebed.errors",
    "load": "probes.running.interactive",
    "probe": "probes.running.interactive",
}
__all__ = sorted(_LAZY)
__version__ = "0.1.0"
__getattr__ = loaded_on_use(__name__, _LAZY)
