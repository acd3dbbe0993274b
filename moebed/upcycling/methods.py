"""The ways to make the experts and the router of a layer from its dense FFN, by name.

E experts, K of them a token, H hidden, D width of the dense FFN, F width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.upcycling.contract import Copy, Settings
from moebed.upcycling.partition import Cluster, Partition

__all__ = ["METHODS", "Copy", "Settings"]


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
            raise ConfigError(
                f"granularity is {shards}, which does not divide the dense FFN's {width} neurons; give a divisor"
            )
        return settings.num_experts * shards, settings.num_experts_per_tok * shards, width // shards

    def expert(self, name: str, expert: int) -> Tensor:
        """Shard ``expert % G``: a run of neurons."""
        matrix, shards = self.ffn.matrix(name), self.settings.granularity
        piece = matrix.chunk(shards, dim=1 if name == "down" else 0)[expert % shards]
        return piece.float() * shards if name == "down" else piece

    def router(self, name: str = "weight") -> Tensor:
        """One random row a copy, G times (E·G, H)."""
        return super().router().repeat_interleave(self.settings.granularity, dim=0)


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
    "partition": Partition,
    "scratch": Scratch,
}
