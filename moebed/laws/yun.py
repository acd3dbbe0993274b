"""Toward inference-optimal Mixture-of-Experts large language models (Yun et al., 2404.02852)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moebed.laws.contract import Columns, Constant, Constants, LossLaw, Shape, saturated

REPLACED = 1 / 3  # share of a dense model's parameters that becomes experts: the FFN of every second layer


class Yun(LossLaw):
    """N is the size of the corresponding dense model; every second layer has experts."""

    form = "yun"
    formula = "L = (A/N^α + B/Ê^β + C/tok^γ + F) · N^(d ln Ê)"
    source = "2404.02852"
    size = "dense_parameters"
    size_words = "parameters of the corresponding dense model, without embeddings"
    needs = ("N", "tok", "E", "loss")
    varies = ("N", "tok", "E")
    huber = 1e-3
    published_words = "Its constants are not published: there are figures of the fit alone."
    constants = (
        Constant("A", 1.0, np.exp(25), positive=True, least=1e-6),
        Constant("alpha", 0.0, 2.0, least=0.0, most=3.0),
        Constant("B", 0.01, 100.0, positive=True, least=1e-8),
        Constant("beta", 0.0, 2.0, least=0.0, most=3.0),
        Constant("C", 1.0, np.exp(25), positive=True, least=1e-6),
        Constant("gamma", 0.0, 2.0, least=0.0, most=3.0),
        Constant("F", np.exp(-1), np.exp(1), positive=True, least=1e-4),
        Constant("d", -0.005, 0.005, least=-0.1, most=0.1),
        Constant("E_start", 1.0, 4.0, positive=True, least=0.5, most=10.0),
        Constant("E_max", 30.0, 1000.0, positive=True, least=20.0, most=1e5),
    )

    def default(self, column: str, columns: Columns) -> Any:
        """Two experts a token, as in the paper, where there are as many."""
        return np.minimum(columns["E"], 2.0) if column == "K" else super().default(column, columns)

    def log_target(self, constants: Constants, columns: Columns) -> Any:
        """See ``formula``."""
        k, log_size, tokens = constants, np.log(columns["N"]), columns["tok"]
        experts = np.log(saturated(columns["E"], k["E_start"], k["E_max"]))
        terms = (
            k["A"] * np.exp(-k["alpha"] * log_size)
            + k["B"] * np.exp(-k["beta"] * experts)
            + k["C"] * np.exp(-k["gamma"] * np.log(tokens))
            + k["F"]
        )
        return np.log(terms) + k["d"] * experts * log_size

    def active_parameters(self, size: Any, shape: Shape) -> Any:
        """K experts in place of one FFN, in every second layer: 4/3 N with two."""
        return size * (1 - REPLACED + REPLACED * shape.K)

    def total_parameters(self, size: Any, shape: Shape) -> Any:
        """E in place of one."""
        return size * (1 - REPLACED + REPLACED * shape.E)
