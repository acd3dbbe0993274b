"""What a way to make experts is, what it is given, and the plainest one, exact copies.

E experts, K of them a token, H hidden, D width of the dense FFN, F width of an expert.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moebed.upcycling.settings import Settings as Settings


class DenseFFN(Protocol):
    """The FFN of one layer of the dense model."""

    layer: int

    def matrix(self, name: str) -> Tensor:
        """``gate`` or ``up`` (D, H), or ``down`` (H, D), as stored."""
        ...


class TextFacts(NamedTuple):
    """What text told of a layer of the dense model."""

    importance: Tensor | None = None  # (E, D) of each neuron, for the texts of each expert
    centroids: Tensor | None = None  # (E, H) of the FFN's inputs, for the texts of each expert
    note: str = ""  # what a person should know of it
    scale: Tensor | None = None  # (H,) with which the routed experts' output has the deviation of the dense one's


class Copy:
    """Every expert is the dense FFN; the router is random, N(0, init_std) (Sparse Upcycling 2212.05055).

    With renormalised weights, whatever the router chooses, the layer computes what the dense one did. The other
    methods are made by changing this one.

    Args:
        settings: What the method reads.
        ffn: The layer's FFN.
        facts: What text told of the layer, where the method asks for it.
    """

    uses: frozenset[str] = frozenset()  # names of the settings that the method reads, beside those that all do
    has_scale = False  # whether ``output_scale`` multiplies its experts' output

    def __init__(self, settings: Settings, ffn: DenseFFN, facts: TextFacts | None = None) -> None:
        self.settings, self.ffn, self.facts = settings, ffn, facts or TextFacts()

    @classmethod
    def sizes(cls, settings: Settings, width: int) -> tuple[int, int, int]:
        """Experts of a layer, experts of a token, and width of an expert, for a dense FFN of ``width`` neurons."""
        return settings.num_experts, settings.num_experts_per_tok, width

    @classmethod
    def reads(cls, settings: Settings) -> frozenset[str]:
        """Those of ``uses`` that do something beside the other settings."""
        return cls.uses

    @classmethod
    def model(cls, settings: Settings) -> dict[str, Any]:
        """Fields of the model's config that the method decides, beside the sizes."""
        return {}

    @classmethod
    def asks_text(cls, settings: Settings) -> str:
        """What the method needs text for, in words; nothing if it needs none."""
        return ""

    @classmethod
    def notes(cls, settings: Settings) -> list[str]:
        """What a person should know who asks for this."""
        return []

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert's ``gate`` or ``up`` (F, H), or ``down`` (H, F)."""
        return self.ffn.matrix(name)

    def router(self, name: str = "weight") -> Tensor:
        """A parameter of the router; ``weight`` is its gate embeddings (E, H)."""
        columns = self.ffn.matrix("gate").shape[1]
        shape = self.settings.num_experts, columns
        return torch.randn(shape, generator=self.generator("router")) * self.settings.init_std

    def shared(self, name: str) -> Tensor | None:
        """The shared expert's matrix, where the method makes one."""
        return None

    def generator(self, *what: object) -> torch.Generator:
        """Random numbers for one purpose in this layer: the same whatever was drawn before."""
        return generator(self.settings.seed, self.ffn.layer, *what)


def generator(*what: object) -> torch.Generator:
    """A generator whose state follows from what it is for."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
