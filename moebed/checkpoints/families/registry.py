"""The families by ``model_type``."""

from __future__ import annotations

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.deepseek import DEEPSEEK
from moebed.checkpoints.families.deepseek_v2 import DEEPSEEK_V2, DEEPSEEK_V3
from moebed.checkpoints.families.dots1 import DOTS1
from moebed.checkpoints.families.emo import EMO, EMO_DENSE
from moebed.checkpoints.families.ernie import ERNIE
from moebed.checkpoints.families.flex_olmo import FLEX_OLMO
from moebed.checkpoints.families.glm4_moe import GLM4_MOE
from moebed.checkpoints.families.gpt_oss import GPT_OSS
from moebed.checkpoints.families.granite import GRANITE, GRANITE_SHARED
from moebed.checkpoints.families.grok1 import GROK1
from moebed.checkpoints.families.llama import LLAMA_FAMILY
from moebed.checkpoints.families.minimax_m2 import MINIMAX_M2
from moebed.checkpoints.families.mistral import MISTRAL
from moebed.checkpoints.families.mixtral import MIXTRAL
from moebed.checkpoints.families.olmoe import OLMOE
from moebed.checkpoints.families.own import MOEBED
from moebed.checkpoints.families.phimoe import PHIMOE
from moebed.checkpoints.families.qwen2 import QWEN2
from moebed.checkpoints.families.qwen2_moe import QWEN2_MOE
from moebed.checkpoints.families.qwen3_moe import QWEN3_MOE
from moebed.errors import ConfigError, did_you_mean

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        MIXTRAL,
        MISTRAL,
        LLAMA_FAMILY,
        QWEN2,
        DEEPSEEK,
        GROK1,
        OLMOE,
        QWEN2_MOE,
        QWEN3_MOE,
        GRANITE,
        GRANITE_SHARED,
        GLM4_MOE,
        DOTS1,
        MINIMAX_M2,
        ERNIE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GPT_OSS,
        FLEX_OLMO,
        PHIMOE,
        EMO,
        EMO_DENSE,
    )
}


def family_of(model_type: object, where: str = "config.json") -> Family:
    """The family of a ``model_type``; moebed's own layout is one more.

    Raises:
        ConfigError: No family has it.
    """
    known = {**FAMILIES, MOEBED.model_type: MOEBED}
    if not isinstance(model_type, str) or model_type not in known:
        near = did_you_mean(model_type, known)
        hint = f" ({near})" if near else ""
        raise ConfigError(f"{where}: unknown model_type {model_type!r}; the known ones are {', '.join(known)}{hint}")
    return known[model_type]
