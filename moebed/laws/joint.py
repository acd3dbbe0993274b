"""Joint MoE scaling laws: Mixture of Experts can be memory efficient (Ludziejewski et al., 2502.05172)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moebed.laws.contract import Array, Columns, Constant, Constants, LossLaw, Shape, saturated

ASPECT = 64  # H over layers of models of any size; our choice, since the formula leaves it open
VOCABULARY = 50257


class Joint(LossLaw):
    """N is what a token meets, embeddings included; one expert a token."""

    form = "joint"
    formula = "L = a Ê^δ N^(α + γ ln Ê) + b Ê^ω tok^(β + ζ ln Ê) + c"
    source = "2502.05172"
    size = "active_parameters"
    size_words = "active parameters, embeddings included"
    needs = ("N", "tok", "E", "loss")
    varies = ("N", "tok", "E")
    huber = 0.01
    published: ClassVar[Mapping[str, float]] = {
        "a": 35.91,
        "alpha": -0.1889,
        "delta": -0.2285,
        "gamma": 0.0098,
        "b": 35.98,
        "beta": -0.1775,
        "omega": 0.5529,
        "zeta": -0.0259,
        "c": 1.3637,
        "E_start": 2.0732,
        "E_max": 290.4521,
    }
    published_words = (
        "Published constants are of more than 280 runs of switch models: one expert a token, FFN width 3 H, 1 to 32 "
        "experts, their text and tokenizer; runs of low loss weighed more there. Other text or another tokenizer alone "
        "changes a, b and c."
    )
    constants = (
        Constant("a", 1.0, 1000.0, positive=True, least=1e-3, most=1e6),
        Constant("alpha", -0.5, -0.05, least=-1.5, most=0.0),
        Constant("delta", -0.5, 0.1, least=-3.0, most=3.0),
        Constant("gamma", -0.02, 0.03, least=-0.3, most=0.3),
        Constant("b", 1.0, 1000.0, positive=True, least=1e-3, most=1e6),
        Constant("beta", -0.5, -0.05, least=-1.5, most=0.0),
        Constant("omega", -0.1, 1.0, least=-3.0, most=3.0),
        Constant("zeta", -0.05, 0.02, least=-0.3, most=0.3),
        Constant("c", 0.3, 3.0, positive=True, least=1e-3),
        Constant("E_start", 1.0, 4.0, positive=True, least=0.5, most=10.0),
        Constant("E_max", 30.0, 1000.0, positive=True, least=20.0, most=1e5),
    )

    def log_target(self, constants: Constants, columns: Columns) -> Any:
        """See ``formula``."""
        k = constants
        experts = np.log(saturated(columns["E"], k["E_start"], k["E_max"]))
        size, tokens = (self.exponents(k, experts, part) for part in ("size", "tokens"))
        return np.log(
            k["a"] * np.exp(k["delta"] * experts + size * np.log(columns["N"]))
            + k["b"] * np.exp(k["omega"] * experts + tokens * np.log(columns["tok"]))
            + k["c"]
        )

    @staticmethod
    def exponents(constants: Constants, log_experts: Any, part: str) -> Any:
        """The exponent of N (``size``) or of tok (``tokens``) where ln Ê is given."""
        names = ("alpha", "gamma") if part == "size" else ("beta", "zeta")
        return constants[names[0]] + constants[names[1]] * log_experts

    def active_parameters(self, size: Any, shape: Shape) -> Any:
        """N itself."""
        return size

    def total_parameters(self, size: Any, shape: Shape) -> Any:
        """2HV + (4 + 9E)·layers·H², of which 4 + 9K are active."""
        layers = self.layers(size, shape)
        width = ASPECT * layers
        return 2 * width * VOCABULARY + (4 + 9 * shape.E) * layers * width**2

    def layers(self, size: Any, shape: Shape) -> Any:
        """Layers, a whole number or not, of the model with so many active parameters and H = 64·layers."""
        cubic, linear = (4 + 9 * shape.K) * ASPECT**2, 2 * VOCABULARY * ASPECT
        layers: Array = np.cbrt(np.asarray(size) / cubic)
        for _ in range(60):  # Newton's steps from above, on a convex function: they only fall
            layers = layers - (cubic * layers**3 + linear * layers - size) / (3 * cubic * layers**2 + linear)
        return layers

    def memory_bytes(self, size: Any, shape: Shape, cached_tokens: int = 16_384) -> Any:
        """Bytes to serve a model: parameters in bf16, and keys and values of so many tokens."""
        layers = self.layers(size, shape)
        return 2 * self.total_parameters(size, shape) + 2 * 2 * cached_tokens * layers * ASPECT * layers
