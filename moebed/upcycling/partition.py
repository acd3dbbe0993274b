"""Experts that are parts of a dense FFN: its neurons dealt out, none of them copied or changed.

E experts, K of them a token, R residual ones, H hidden, D width of the dense FFN, F width of an expert.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.upcycling.clusters import balanced_kmeans, best_kmeans
from moebed.upcycling.contract import Copy, DenseFFN, Settings, TextFacts
from moebed.upcycling.neurons import contiguous_groups, most_important, random_groups, residual_and_routed
from moebed.upcycling.scales import output_scale


class Partition(Copy):
    """The FFN's neurons in E groups, an expert each (LLaMA-MoE 2406.16554, MoEfication 2110.01786).

    ``by`` says how: at random, in stored order, by k-means of exactly equal groups on rows of a matrix, or by their
    importance for the texts of each expert: ``inner`` gives each expert its most important ones, ``inter`` puts those
    that many experts would list into residual experts first. Residual experts are the decoder's shared experts: R of
    them as one FFN with weight 1, exactly their part of the dense FFN. LLaMA-MoE weighs several by a softmax gate of
    their own, which is 1 where R is 1; that gate is not made here.

    Only K of the routed experts run, so their ``down`` is multiplied with ``output_scale``.
    """

    uses = frozenset(
        {
            "output_scale",
            "by",
            "rows",
            "normalise",
            "starts",
            "router",
            "residual_experts",
            "sharing",
            "expert_width",
            "text_clusters",
        }
    )
    has_scale = True

    @classmethod
    def reads(cls, settings: Settings) -> frozenset[str]:
        """Those that ``by`` and ``router`` leave something to decide."""
        found = {"output_scale", "by", "router"}
        if settings.by == "cluster":
            found |= {"rows", "normalise", "starts"}
        if settings.router == "centroid":
            found |= {"rows", "normalise"}
        if by_importance(settings):
            found |= {"expert_width", "text_clusters"}
        if settings.by == "inter":
            found |= {"residual_experts", "sharing"}
        return frozenset(found)

    @classmethod
    def sizes(cls, settings: Settings, width: int) -> tuple[int, int, int]:
        """E, K and F; F·E is D, but for experts by importance."""
        experts, residual = settings.num_experts, residual_experts(settings)
        sizes = experts, settings.num_experts_per_tok, settings.expert_width or width // (experts + residual)
        if not by_importance(settings) and width % experts:
            raise ConfigError(
                f"num-experts is {experts}, which does not divide the dense FFN's {width} neurons into groups of one "
                "size"
            )
        if settings.by == "inter" and not settings.sharing and (experts + residual) * sizes[2] != width:
            raise ConfigError(
                f"{experts} routed and {residual} residual experts of {sizes[2]} neurons are not the dense FFN's "
                f"{width}; without sharing every neuron has one place: change num-experts, residual-experts or "
                "expert-width"
            )
        if not 1 <= sizes[2] <= width - residual * sizes[2]:
            raise ConfigError(
                f"expert-width is {sizes[2]}, but the dense FFN has {width} neurons"
                + (f", of which {residual} residual experts take {residual * sizes[2]}" if residual else "")
            )
        return sizes

    @classmethod
    def model(cls, settings: Settings) -> dict[str, Any]:
        """Residual experts as shared ones without a gate; and the router."""
        if settings.router == "centroid" and settings.rows == "down":
            raise ConfigError(
                "router centroid: columns of down lie where outputs do, not hidden states; choose rows up"
            )
        if settings.router == "hidden_centroid" and not by_importance(settings):
            raise ConfigError(
                f"router hidden_centroid: with by {settings.by} no text belongs to an expert; choose by inner or inter"
            )
        found: dict[str, Any] = {"router": "noisy_topk"} if settings.router == "noisy" else {}
        if residual := residual_experts(settings):
            found |= {"num_shared_experts": residual, "shared_expert_gate": False}
        return found

    @classmethod
    def asks_text(cls, settings: Settings) -> str:
        """Importance, or the deviation of outputs."""
        if by_importance(settings):
            return f"by {settings.by} takes the importance of neurons from it"
        return "output-scale calibrate is found on it" if settings.output_scale == "calibrate" else ""

    @classmethod
    def notes(cls, settings: Settings) -> list[str]:
        """Where the model is not LLaMA-MoE's."""
        if (residual := residual_experts(settings)) < 2:
            return []
        return [
            f"the {residual} residual experts are one shared FFN with weight 1, their exact part of the dense FFN; "
            "LLaMA-MoE weighs them by a softmax gate of their own"
        ]

    @cached_property
    def _dealt(self) -> tuple[Tensor, Tensor]:
        """Neurons of the residual experts, (R·F,), and of each routed one, (E, F)."""
        settings, count = self.settings, self.ffn.matrix("gate").shape[0]
        none = torch.empty(0, dtype=torch.int64)
        if settings.by == "random":
            return none, random_groups(count, settings.num_experts, self.generator("random partition"))
        if settings.by == "contiguous":
            return none, contiguous_groups(count, settings.num_experts)
        if settings.by == "cluster":
            return none, self.clusters()
        importance, (_, _, width) = self.facts.importance, self.sizes(settings, count)
        assert importance is not None
        if settings.by == "inner":
            return none, most_important(importance, width)
        return residual_and_routed(importance, residual_experts(settings), width, settings.sharing)

    def clusters(self) -> Tensor:
        """Groups by k-means, the best of several starts."""
        settings = self.settings
        return best_kmeans(self.rows(), settings.num_experts, self.generator("cluster"), settings.starts)

    def rows(self) -> Tensor:
        """What neurons are compared by, (D, H) float32."""
        matrix = self.ffn.matrix(self.settings.rows).float()
        matrix = matrix.T if self.settings.rows == "down" else matrix
        return torch.nn.functional.normalize(matrix, dim=1) if self.settings.normalise else matrix

    @property
    def groups(self) -> Tensor:
        """Neurons of each routed expert, (E, F)."""
        return self._dealt[1]

    def expert(self, name: str, expert: int) -> Tensor:
        """The group's neurons; ``down`` is multiplied with the output's scale."""
        piece = self._neurons(name, self.groups[expert])
        return piece.float() * self.scale() if name == "down" else piece

    def scale(self) -> float | Tensor:
        """The factor s, or one for each channel (H, 1)."""
        found = output_scale(self.settings.output_scale, self.settings.num_experts, self.settings.num_experts_per_tok)
        if found is None:
            assert self.facts.scale is not None
            return self.facts.scale.unsqueeze(1)
        return found

    def shared(self, name: str) -> Tensor | None:
        """The residual experts' neurons, which keep their scale."""
        residual = self._dealt[0]
        return self._neurons(name, residual) if len(residual) else None

    def _neurons(self, name: str, neurons: Tensor) -> Tensor:
        return self.ffn.matrix(name).index_select(1 if name == "down" else 0, neurons)

    def router(self, name: str = "weight") -> Tensor:
        """Random gate embeddings, or centroids (E, H); or a parameter of the noisy gate."""
        settings = self.settings
        if settings.router == "centroid":
            rows = self.rows()
            return torch.stack([rows[neurons].mean(dim=0) for neurons in self.groups])
        if settings.router == "hidden_centroid":
            assert self.facts.centroids is not None
            return self.facts.centroids
        if settings.router == "noisy":
            return self._noisy(name)
        return super().router(name)

    def _noisy(self, name: str) -> Tensor:
        """Both layers of the gate are random, the noise's is 0."""
        experts, hidden = self.settings.num_experts, self.ffn.matrix("gate").shape[1]
        if name == "noise_proj":
            return torch.zeros(experts, hidden)
        shape = (experts, experts) if name == "output_proj" else (experts, hidden)
        return torch.randn(shape, generator=self.generator("router", name)) * self.settings.init_std


class Cluster(Partition):
    """``partition`` by balanced k-means on the gate rows as they are; the router's rows are the groups' centroids.

    So a logit is the mean of a group's gates before their activation. One start, and assignments that no swap of two
    rows improves: groups are not the best there are, and rows of large norm end together.
    """

    uses = frozenset({"output_scale"})

    def __init__(self, settings: Settings, ffn: DenseFFN, facts: TextFacts | None = None) -> None:
        fixed = dataclasses.replace(settings, by="cluster", rows="gate", normalise=False, router="centroid")
        super().__init__(fixed, ffn, facts)

    @classmethod
    def reads(cls, settings: Settings) -> frozenset[str]:
        """The scale."""
        return cls.uses

    def clusters(self) -> Tensor:
        """Groups by k-means from one start."""
        return balanced_kmeans(self.rows(), self.settings.num_experts, self.generator("cluster"))


def by_importance(settings: Settings) -> bool:
    """Whether neurons are dealt out by their importance for texts."""
    return settings.by in ("inner", "inter")


def residual_experts(settings: Settings) -> int:
    """R."""
    if settings.by != "inter":
        return 0
    return 1 if settings.residual_experts is None else settings.residual_experts
