"""Sliding windows that a family gives to some of its layers: ``layer_types``, or a rule where it is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moebed.checkpoints.families.base import require_count
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

WINDOW_KEYS = ("sliding_window", "layer_types")
WINDOW_DEFAULTS = {"use_sliding_window": False, "max_window_layers": 28}
_FULL, _SLIDING = "full_attention", "sliding_attention"
Slides = Callable[[Mapping[str, Any], int], bool]  # settings, layer


def _layer_types(settings: Mapping[str, Any], slides: Slides) -> list[Any]:
    given, layers = settings.get("layer_types"), settings["num_hidden_layers"]
    if given is not None:
        return given if isinstance(given, list) else [given]
    used = settings["use_sliding_window"] and isinstance(layers, int)
    return [_SLIDING if used and slides(settings, i) else _FULL for i in range(layers if used else 1)]


def windows_of(settings: Mapping[str, Any], slides: Slides) -> list[int | None] | None:
    """The window of each layer; None where all look at everything, or where that is not computed."""
    kinds = _layer_types(settings, slides)
    if uncomputed_windows(settings, slides) or _SLIDING not in kinds:
        return None
    return [settings.get("sliding_window", 4096) if kind == _SLIDING else None for kind in kinds]


def window_settings(config: ModelConfig) -> dict[str, Any]:
    """What :func:`windows_of` reads; of several windows the widest, and then a model is not read as it was."""
    windows = [config.window(index) for index in range(config.num_hidden_layers)]
    kinds = [_FULL if window is None else _SLIDING for window in windows]
    return {"sliding_window": max((w for w in windows if w is not None), default=None), "layer_types": kinds}


def uncomputed_windows(settings: Mapping[str, Any], slides: Slides) -> list[str]:
    """What the decoder does not compute of the windows, in words."""
    if not isinstance(settings["use_sliding_window"], bool):
        raise ConfigError(f"use_sliding_window is {settings['use_sliding_window']!r}; it must be true or false")
    require_count(settings, "max_window_layers", 0)
    kinds = _layer_types(settings, slides)
    layers, window = settings["num_hidden_layers"], settings.get("sliding_window", 4096)
    if settings.get("layer_types") is not None and len(kinds) != layers:
        return [f"layer_types lists {len(kinds)} layers of {layers}"]
    if set(kinds) == {_FULL}:
        return []
    whole = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    if set(kinds) <= {_FULL, _SLIDING} and settings["use_sliding_window"] and whole:
        return []
    said = "layer_types" if settings.get("layer_types") is not None else "use_sliding_window"
    return [
        f"{said} is {settings[said]!r} with sliding_window {window!r}; supported are layers of full_attention and of "
        "sliding_attention with a window of 1 or more"
    ]
