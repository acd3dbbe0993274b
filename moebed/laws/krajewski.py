"""Scaling laws for fine-grained Mixture of Experts (Krajewski et al., 2402.07871)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moebed.laws.contract import Columns, Constant, Constants, LossLaw, Shape

ASPECT = 64  # H over layers, in all models of the paper
ROUTING = 14  # FLOPs of a router per channel and expert, training


class Krajewski(LossLaw):
    """N is the size of the whole MoE; E is the expansion rate, so that a layer has E·G experts."""

    form = "krajewski"
    formula = "L = c + (g/G^γ + a)/N^α + b/tok^β"
    source = "2402.07871"
    size = "total_nonembedding_parameters"
    size_words = "all parameters without embeddings and routers"
    needs = ("N", "tok", "G", "loss")
    varies = ("N", "tok", "G")
    experts = "expansion_rate"
    huber = 0.1
    published: ClassVar[Mapping[str, float]] = {
        "a": 18.1,
        "alpha": 0.115,
        "b": 30.8,
        "beta": 0.147,
        "g": 2.1,
        "gamma": 0.58,
        "c": 0.47,
    }
    published_words = (
        "Published constants are of an expansion rate of 64, C4 and their tokenizer, and rounded: they give losses .01 "
        "to .02 below the paper's own table. A dense model's are a 16.3, α .126, b 26.7, β .127, c .47."
    )
    constants = (
        Constant("a", 1.0, 1000.0, positive=True, least=1e-3, most=1e6),
        Constant("alpha", 0.05, 0.5, least=0.0, most=1.5),
        Constant("b", 1.0, 1000.0, positive=True, least=1e-3, most=1e6),
        Constant("beta", 0.05, 0.5, least=0.0, most=1.5),
        Constant("g", 0.1, 30.0, positive=True, least=1e-5, most=1e5),
        Constant("gamma", 0.1, 1.5, least=0.0, most=5.0),
        Constant("c", 0.1, 2.5, positive=True, least=1e-3),
    )

    def default(self, column: str, columns: Columns) -> Any:
        """The paper's expansion rate: the loss does not depend on it, but the FLOPs of a size do."""
        return 64.0 if column == self.experts else super().default(column, columns)

    def log_target(self, constants: Constants, columns: Columns) -> Any:
        """See ``formula``."""
        k = constants
        granular = k["g"] * np.exp(-k["gamma"] * np.log(columns["G"])) + k["a"]
        size = granular * np.exp(-k["alpha"] * np.log(columns["N"]))
        return np.log(k["c"] + size + k["b"] * np.exp(-k["beta"] * np.log(columns["tok"])))

    def layers(self, size: Any, shape: Shape) -> Any:
        """Layers, a whole number or not: N = H²·(8E + 4)·layers with H = 64·layers."""
        return np.cbrt(size / (ASPECT**2 * (8 * shape.E + 4)))

    def active_parameters(self, size: Any, shape: Shape) -> Any:
        """12H² a layer, whatever the granularity."""
        return 12 * ASPECT**2 * self.layers(size, shape) ** 3

    def total_parameters(self, size: Any, shape: Shape) -> Any:
        """N itself; the routers are left out."""
        return size

    def flops_per_token(self, size: Any, shape: Shape) -> Any:
        """Training FLOPs of a token, those of the routers among them: why G cannot grow for ever."""
        layers = self.layers(size, shape)
        return super().flops_per_token(size, shape) + ASPECT * layers * shape.E * shape.G * ROUTING * layers
