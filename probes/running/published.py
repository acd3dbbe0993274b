"""The published numbers that our headlines can be laid beside.

Tables 2 and 3 and the ranges of section 4.1 of 2406.18219, "the paper"; Table 5 of the Mixtral paper (2401.04088).
A model is named as in the paper's tables; ``paper_model`` tells from a checkpoint's config whether it is one of them.
"""

from __future__ import annotations

from typing import NamedTuple

MIXTRAL, MIXTRAL_22, DEEPSEEK, GROK = "Mixtral 8x7B", "Mixtral 8x22B", "DeepSeekMoE-16B", "Grok-1"
# (model_type, layers, hidden size) of the four.
_CONFIGS = {
    ("mixtral", 32, 4096): MIXTRAL,
    ("mixtral", 56, 6144): MIXTRAL_22,
    ("deepseek", 28, 2048): DEEPSEEK,
    ("grok-1", 64, 6144): GROK,
}


class Published(NamedTuple):
    """What the paper says of one headline.

    Args:
        low: The number, or the lower end of the range given.
        high: The upper end; the number once more where there is no range.
        source: Where it is said, and over what.
    """

    low: float
    high: float
    source: str

    @property
    def text(self) -> str:
        """As a table shows it."""
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


def _exactly(value: float, source: str) -> Published:
    return Published(value, value, source)


_TABLE_3 = {
    MIXTRAL: (0.06, 0.33, 0.07),
    MIXTRAL_22: (0.13, 0.26, 0.13),
    DEEPSEEK: (0, 0.40, 0),
    GROK: (0.04, 0.15, 0.04),
}
_TABLE_2_LAYERS = {
    MIXTRAL: "Table 2; layers 0, 5, ..., 30, 31",
    DEEPSEEK: "Table 2; layers 1, 5, ..., 25, 27",
    GROK: "Table 2; some layers",
}
_TABLE_2 = {
    MIXTRAL: {"mean_tau": 0.75, "gain_order": -3},
    DEEPSEEK: {"mean_tau": -0.0002},
    GROK: {"mean_tau": -0.0003},
}

# Lowest and highest of eight domains of the Pile, by layer: repeated first choice, repeated first or second choice.
_MIXTRAL_TABLE_5 = {
    0: ((0.136, 0.149), (0.449, 0.499)),
    15: ((0.236, 0.284), (0.616, 0.670)),
    31: ((0.197, 0.263), (0.445, 0.536)),
}

# Model -> "<probe>/<headline>" -> what the paper says.
PUBLISHED: dict[str, dict[str, Published]] = {model: {} for model in _CONFIGS.values()}
for _model, _values in _TABLE_3.items():
    for _name, _value in zip(("up", "gate", "down"), _values, strict=True):
        for _key in ("r2", "paper_rounding"):
            PUBLISHED[_model][f"gate_projection/{_key}_{_name}"] = _exactly(_value, "Table 3; average r² over layers")
for _model, _table in _TABLE_2.items():
    for _key, _value in _table.items():
        PUBLISHED[_model][f"neuron_matching/{_key}"] = _exactly(_value, _TABLE_2_LAYERS[_model])
for _model in (DEEPSEEK, GROK):
    PUBLISHED[_model]["neuron_matching/mean_cos"] = _exactly(0.01, f"{_TABLE_2_LAYERS[_model]}; the order of magnitude")
for _name in ("up", "gate", "down"):
    PUBLISHED[MIXTRAL][f"matrix_similarity/mean_cos_{_name}"] = Published(
        0.2, 0.4, "section 4.1; lower in layers 22 to 30"
    )
    PUBLISHED[MIXTRAL][f"matrix_similarity/reference_cos_{_name}"] = _exactly(0.6, "section 4.1; about")
    for _model in (DEEPSEEK, GROK):
        PUBLISHED[_model][f"matrix_similarity/mean_cos_{_name}"] = _exactly(0.0, "section 4.1; about")
for _model, _value in ((MIXTRAL, 0.996), (DEEPSEEK, 0.997), (GROK, 0.253)):
    PUBLISHED[_model]["activations/frac_above_1e-3"] = _exactly(_value, "appendix; share with |activation| > 0.001")
for _layer, _ranges in _MIXTRAL_TABLE_5.items():
    for _name, (_low, _high) in zip(("first", "any"), _ranges, strict=True):
        PUBLISHED[MIXTRAL][f"repeats/repeat_{_name}_layer_{_layer}"] = Published(
            _low, _high, "arXiv 2401.04088, Table 5; over eight domains of the Pile"
        )


def paper_model(model_type: str | None, num_hidden_layers: int | None, hidden_size: int | None) -> str | None:
    """The paper's name of a model with this config; None for any other."""
    return _CONFIGS.get((model_type or "", num_hidden_layers or 0, hidden_size or 0))


def published(headline: str, model: str | None) -> Published | None:
    """What the paper says of ``<probe>/<headline>`` for a model, as named by ``paper_model``; None if nothing."""
    return PUBLISHED.get(model or "", {}).get(headline)
