"""What a scaling law is: its constants, the columns that it reads, and one formula that numbers go through in bulk.

n runs, B draws of the constants (starts, or resamples of the runs), P constants that are fitted.

The constants are plain numbers under the names of the paper. What is fitted is a vector, in which constants that must
be positive stand as their logarithm. A formula is written once and takes complex numbers too: its derivative is the
imaginary part after a tiny imaginary step (complex-step differentiation), exact to the last digit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

Array = np.ndarray
Constants = Mapping[str, Any]  # floats, or arrays (B, 1) of draws
Columns = Mapping[str, Any]  # floats, or arrays (n,)


def training_flops(active_parameters: Any, tokens: Any) -> Any:
    """6·N·tok, the estimate that scaling laws are stated in: forward two a parameter and token, backward twice as many.

    Products of attention are left out; ``moebed.model.flops.flops_per_token`` has them. Numbers or arrays.
    """
    return 6 * active_parameters * tokens


@dataclass(frozen=True)
class Constant:
    """One constant of a law.

    Args:
        name: As in the paper.
        low: Least value from which a fit starts.
        high: Largest one.
        positive: It is positive, and its logarithm is what is fitted.
        least: Least value that a fit may give; the tenth part of ``low`` or none if not given.
        most: Largest one; likewise.
    """

    name: str
    low: float
    high: float
    positive: bool = False
    least: float | None = None
    most: float | None = None

    def coordinate(self, value: float) -> float:
        """A value of the constant as the fit has it."""
        return float(np.log(value)) if self.positive else float(value)

    @property
    def starts(self) -> tuple[float, float]:
        """Where fits start, as the fit has it."""
        return self.coordinate(self.low), self.coordinate(self.high)

    @property
    def bounds(self) -> tuple[float, float]:
        """What a fit may give, as it has it: unless stated, as far again on both sides as the starts reach."""
        low, high = self.starts
        return (
            low - (high - low) if self.least is None else self.coordinate(self.least),
            high + (high - low) if self.most is None else self.coordinate(self.most),
        )


class Shape(NamedTuple):
    """What is chosen about the experts.

    Args:
        E: Experts of a layer (Krajewski: the expansion rate, all experts' parameters over the dense FFN's).
        K: Experts a token.
        G: Granularity, how many times finer than the dense FFN an expert is.
    """

    E: float
    K: float = 1.0
    G: float = 1.0

    def words(self, parts: Sequence[str]) -> str:
        """As a person says it: those of E, K and G that are told apart."""
        return ", ".join(f"{part} {getattr(self, part):g}" for part in parts)


class Law(ABC):
    """A formula for a positive quantity of a run, ``target``: its loss in nats a token, or another."""

    form: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    constants: ClassVar[tuple[Constant, ...]]
    needs: ClassVar[tuple[str, ...]]  # columns
    varies: ClassVar[tuple[str, ...]]  # those that must not be the same in all runs
    target: ClassVar[str] = "loss"
    size: ClassVar[str] = ""  # the column that the formula's N is
    size_words: ClassVar[str] = ""
    huber: ClassVar[float]  # where squares of log residuals become absolute values; the paper's where it says so
    published: ClassVar[Mapping[str, float]] = {}
    published_words: ClassVar[str]  # how the published runs differ from anybody else's

    def default(self, column: str, columns: Columns) -> Any:
        """What a table that has no such column is taken to mean, of the shape's columns; None where it must say."""
        return {"K": 1.0, "G": 1.0}.get(column)

    @abstractmethod
    def log_target(self, constants: Constants, columns: Columns) -> Any:
        """The logarithm of the target.

        Args:
            constants: Numbers, or arrays (B, 1).
            columns: Numbers, or arrays (n,).

        Returns:
            (B, n), or what these broadcast to.
        """

    def predict(self, constants: Constants, **columns: Any) -> Any:
        """The target itself."""
        return np.exp(self.log_target(constants, columns))

    def unpack(self, vector: Array) -> dict[str, Array]:
        """Constants by name, (..., 1) each, from fitted vectors (..., P)."""
        return {
            constant.name: (np.exp if constant.positive else np.asarray)(vector[..., index, None])
            for index, constant in enumerate(self.constants)
        }

    def pack(self, constants: Constants) -> Array:
        """The vector of constants."""
        return np.array([constant.coordinate(constants[constant.name]) for constant in self.constants])


class LossLaw(Law):
    """A law of the loss by a model's size N, tokens ``tok`` and shape of its experts.

    The sizes beside N are those of the paper's own models.
    """

    experts: ClassVar[str] = "E"  # the column that the shape's E is

    @abstractmethod
    def active_parameters(self, size: Any, shape: Shape) -> Any:
        """Parameters that a token meets, of models of so many N: a multiply-add each."""

    @abstractmethod
    def total_parameters(self, size: Any, shape: Shape) -> Any:
        """All parameters that must be held."""

    def flops_per_token(self, size: Any, shape: Shape) -> Any:
        """Training FLOPs of a token."""
        return training_flops(self.active_parameters(size, shape), 1)

    def loss(self, constants: Constants, size: Any, tokens: Any, shape: Shape) -> Any:
        """Loss in nats a token."""
        return self.predict(constants, **{"N": size, "tok": tokens, **shape._asdict()})


def saturated(experts: Any, start: Any, most: Any) -> Any:
    """The count of experts Ê that acts: ``start`` for one expert, ``most`` for infinitely many (Clark et al. 2022).

    1/Ê = 1 / (E − 1 + (1/start − 1/most)⁻¹) + 1/most.
    """
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
