"""dots.llm1 (2506.05767; model_type dots1): each head's queries and keys normalised by themselves; late windows."""

from typing import Any

from moebed.checkpoints.families import fine_grained
from moebed.checkpoints.families.base import Family, Settings
from moebed.checkpoints.families.layout import ALL_ATTENTION_BIAS, BIASED_ATTENTION, EXPERTS, QK_NORM
from moebed.checkpoints.families.windows import WINDOW_KEYS, uncomputed_windows, window_settings, windows_of
from moebed.model.config import ModelConfig

_USED = {"use_sliding_window": True}  # there is no such setting: windows are used where they are


def _slides(settings: Settings, layer: int) -> bool:
    return settings["sliding_window"] is not None and layer >= settings["max_window_layers"]


def _decode(settings: Settings) -> dict[str, Any]:
    return {**fine_grained.decode(settings), "sliding_window": windows_of({**settings, **_USED}, _slides)}


def _encode(config: ModelConfig) -> dict[str, Any]:
    windows = window_settings(config)
    first = 0 if windows["sliding_window"] else config.num_hidden_layers
    return {**fine_grained.encode(config), **windows, "max_window_layers": first}


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    tensors={**fine_grained.BIASED_TENSORS, **ALL_ATTENTION_BIAS, **QK_NORM},
    experts=EXPERTS,
    fields={**fine_grained.FIELDS, **BIASED_ATTENTION},
    fixed={"qk_norm": "head"},
    defaults={
        **fine_grained.DEFAULTS,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
    },
    reads=(*fine_grained.READS, *WINDOW_KEYS),
    same={"num_local_experts": "n_routed_experts"},
    uncomputed=lambda settings: uncomputed_windows({**settings, **_USED}, _slides),
    decode=_decode,
    encode=_encode,
)
