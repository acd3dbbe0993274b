"""Towards greater leverage: scaling laws for efficient Mixture-of-Experts language models (Tian et al., 2507.17702)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moebed.laws.contract import Columns, Constant, Constants, Law, saturated


class Leverage(Law):
    """Efficiency leverage: how many times the FLOPs a dense model needs for the same loss."""

    form = "leverage"
    formula = "EL = Â^(a + d log₁₀ C + γ (log₂ G)² + β log₂ G)"
    source = "2507.17702"
    target = "leverage"
    needs = ("flops", "A", "G", "leverage")
    varies = ("flops", "A", "G")
    huber = 0.1
    published: ClassVar[Mapping[str, float]] = {
        "a": 1.23,
        "d": -0.0761,
        "gamma": 0.0167,
        "beta": -0.117,
        "A_start": 0.0163,
        "A_max": 5.28e16,
    }
    published_words = (
        "Published constants are of other text, another tokenizer and dense models of their own; the paper does not "
        "say which logarithms it takes, and only these give its own claims."
    )
    constants = (
        Constant("a", -1.0, 2.0, least=-20.0, most=20.0),
        Constant("d", -0.2, 0.1, least=-3.0, most=3.0),
        Constant("gamma", -0.05, 0.1, least=-2.0, most=2.0),
        Constant("beta", -0.5, 0.2, least=-5.0, most=5.0),
        Constant("A_start", 0.001, 0.1, positive=True, least=1e-6, most=0.9),
        Constant("A_max", 10.0, 1e8, positive=True, least=1.5, most=1e18),
    )

    def log_target(self, constants: Constants, columns: Columns) -> Any:
        """The logarithm of EL; C is training FLOPs, A the share of experts that a token meets."""
        k, log_granularity = constants, np.log2(columns["G"])
        exponent = (
            k["a"] + k["d"] * np.log10(columns["flops"]) + k["gamma"] * log_granularity**2 + k["beta"] * log_granularity
        )
        # Â of an activation share A has the form of Ê, with A in the place of E − 1.
        return exponent * np.log(saturated(columns["A"] + 1, k["A_start"], k["A_max"]))

    @staticmethod
    def best_granularity(constants: Constants) -> Any:
        """G at which the leverage of a sparse model (Â < 1) is largest: the lowest point of the exponent's parabola."""
        return 2 ** (-constants["beta"] / (2 * constants["gamma"]))
