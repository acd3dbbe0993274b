"""The ways to make the experts and the router of a layer from its dense FFN.

E experts, K of them a token, H hidden, D width of the dense FFN, F width of an expert.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.upcycling.clusters import balanced_kmeans


@dataclass(frozen=True)
class Settings:
    """How a dense model becomes an MoE.

    Args:
        num_experts: Experts of a layer (E), before any are cut by ``granularity``.
        num_experts_per_tok: Experts that a token is sent to (K), before any are cut.
        granularity: Shards that ``split`` cuts each copy into (G): E·G experts, K·G of them a token.
        fraction: Part of the entries that ``noise`` changes, or of the neurons that ``drop`` draws anew (r).
        noise_std: Standard deviation of what ``noise`` adds (σ).
        init_std: Standard deviation of a random router, of shared experts, and of the experts of ``scratch``.
        output_scale: Factor on ``down`` of ``cluster``; E / K if not given.
        seed: Decides all that is random, for each layer and expert apart.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    granularity: int = 2
    fraction: float = 0.5
    noise_std: float = 0.02
    init_std: float = 0.02
    output_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that are out of range."""
        for name, value in (("num-experts", self.num_experts), ("granularity", self.granularity)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num-experts-per-tok is {self.num_experts_per_tok}; choose between 1 and num-experts "
                f"{self.num_experts}"
            )
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}; it must be between 0 and 1")
        for name in ("noise_std", "init_std"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if self.output_scale is not None and not 0 < self.output_scale < float("inf"):
            raise ConfigError(f"output-scale is {self.output_scale}; it must be a positive number")


class DenseFFN(Protocol):
    """The FFN of one layer of the dense model."""

    layer: int

    def matrix(self, name: str) -> Tensor:
        """``gate`` or ``up`` (D, H), or ``down`` (H, D), as stored."""
        ...


class Copy:
    """Every expert is the dense FFN; the router is random, N(0, init_std) (Sparse Upcycling 2212.05055).

    With renormalised weights, whatever the router chooses, the layer computes what the dense one did. The other
    methods are made by changing this one.

    Args:
        settings: What the method reads.
        ffn: The layer's FFN.
    """

    uses: frozenset[str] = frozenset()  # names of the settings that the method reads, beside those that all do

    def __init__(self, settings: Settings, ffn: DenseFFN) -> None:
        self.settings, self.ffn = settings, ffn

    @classmethod
    def sizes(cls, settings: Settings, width: int) -> tuple[int, int, int]:
        """Experts of a layer, experts of a token, and width of an expert, for a dense FFN of ``width`` neurons."""
        return settings.num_experts, settings.num_experts_per_tok, width

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert's ``gate`` or ``up`` (F, H), or ``down`` (H, F)."""
        return self.ffn.matrix(name)

    def router(self) -> Tensor:
        """Gate embeddings (E, H)."""
        columns = self.ffn.matrix("gate").shape[1]
        shape = self.settings.num_experts, columns
        return torch.randn(shape, generator=self.generator("router")) * self.settings.init_std

    def generator(self, *what: object) -> torch.Generator:
        """Random numbers for one purpose in this layer: the same whatever was drawn before."""
        return generator(self.settings.seed, self.ffn.layer, *what)


class Noise(Copy):
    """Copies, with N(0, noise_std) added to a random ``fraction`` of each expert's entries."""

    uses = frozenset({"fraction", "noise_std"})

    def expert(self, name: str, expert: int) -> Tensor:
        """A copy with noise of its own."""
        matrix, draws = self.ffn.matrix(name).float(), self.generator("noise", name, expert)
        noise = torch.randn(matrix.shape, generator=draws).mul_(self.settings.noise_std)
        noise.masked_fill_(torch.rand(matrix.shape, generator=draws) >= self.settings.fraction, 0.0)
        return noise.add_(matrix)


class Drop(Copy):
    """Copies in which a random ``fraction`` of the neurons, one set for gate, up and down, is drawn anew.

    The new weights have the mean and the standard deviation of those that were dropped (Drop-Upcycling 2502.19261;
    its code draws a set for each matrix, its text describes one set, which is meant here).
    """

    uses = frozenset({"fraction"})

    def dropped(self, expert: int) -> Tensor:
        """The neurons that an expert loses, ascending."""
        width = self.ffn.matrix("gate").shape[0]
        order = torch.randperm(width, generator=self.generator("drop", expert))
        return order[: round(self.settings.fraction * width)].sort().values

    def expert(self, name: str, expert: int) -> Tensor:
        """A copy in which the expert's dropped neurons are new."""
        matrix, neurons = self.ffn.matrix(name).to(torch.float32, copy=True), self.dropped(expert)
        if len(neurons) == 0:
            return matrix
        axis = 1 if name == "down" else 0
        old = matrix.index_select(axis, neurons)
        new = torch.randn(old.shape, generator=self.generator("drop", name, expert))
        return matrix.index_copy_(axis, neurons, new.mul_(old.std(correction=0)).add_(old.mean()))


class Split(Copy):
    """Each copy is cut into G experts of D / G neurons, whose router rows are equal (virtual groups 2410.07524).

    The E·G experts are numbered copy by copy. A token is sent to K·G of them: to all shards of K copies, each with 1/G
    of its copy's weight, so ``down`` is scaled by G. The factor must not be shared with gate and up: SiLU is not
    homogeneous. With renormalised weights the layer computes what the dense one did.
    """

    uses = frozenset({"granularity"})

    @classmethod
    def sizes(cls, settings: Settings, width: int) -> tuple[int, int, int]:
        """E·G, K·G and D / G."""
        shards = settings.granularity
        if width % shards:
            raise ConfigError(f"granularity is {shards}, which does not divide the dense FFN's {width} neurons")
        return settings.num_experts * shards, settings.num_experts_per_tok * shards, width // shards

    def expert(self, name: str, expert: int) -> Tensor:
        """Shard ``expert % G``: a run of neurons."""
        matrix, shards = self.ffn.matrix(name), self.settings.granularity
        piece = matrix.chunk(shards, dim=1 if name == "down" else 0)[expert % shards]
        return piece.float() * shards if name == "down" else piece

    def router(self) -> Tensor:
        """One random row a copy, G times (E·G, H)."""
        return super().router().repeat_interleave(self.settings.granularity, dim=0)


class Cluster(Copy):
    """The FFN's neurons in E groups of D / E, by balanced k-means on their gate rows; each group is an expert.

    The router's rows are the groups' centroids, so that a logit is the mean of a group's gates before their activation.
    Only K of the groups run, so ``down`` is scaled by E / K (MoEfication 2110.01786, LLaMA-MoE 2406.16554).
    """

    uses = frozenset({"output_scale"})

    @classmethod
    def sizes(cls, settings: Settings, width: int) -> tuple[int, int, int]:
        """E, K and D / E."""
        if width % settings.num_experts:
            raise ConfigError(
                f"num-experts is {settings.num_experts}, which does not divide the dense FFN's {width} neurons into "
                "groups of one size"
            )
        return settings.num_experts, settings.num_experts_per_tok, width // settings.num_experts

    @cached_property
    def groups(self) -> Tensor:
        """Neurons of each expert, (E, F)."""
        gate = self.ffn.matrix("gate").float()
        return balanced_kmeans(gate, self.settings.num_experts, self.generator("cluster"))

    def expert(self, name: str, expert: int) -> Tensor:
        """The group's neurons."""
        neurons = self.groups[expert]
        piece = self.ffn.matrix(name).index_select(1 if name == "down" else 0, neurons)
        scale = self.settings.output_scale or self.settings.num_experts / self.settings.num_experts_per_tok
        return piece.float() * scale if name == "down" else piece

    def router(self) -> Tensor:
        """Centroids (E, H)."""
        gate = self.ffn.matrix("gate")
        return torch.stack([gate[neurons].float().mean(dim=0) for neurons in self.groups])


class Scratch(Copy):
    """Random experts, N(0, init_std), beside the dense model's attention and embeddings."""

    def expert(self, name: str, expert: int) -> Tensor:
        """Random numbers of the FFN's shape."""
        shape = self.ffn.matrix(name).shape
        return torch.randn(shape, generator=self.generator("scratch", name, expert)).mul_(self.settings.init_std)


METHODS: dict[str, type[Copy]] = {
    "copy": Copy,
    "noise": Noise,
    "drop": Drop,
    "split": Split,
    "cluster": Cluster,
    "scratch": Scratch,
}


def generator(*what: object) -> torch.Generator:
    """A generator whose state follows from what it is for."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
