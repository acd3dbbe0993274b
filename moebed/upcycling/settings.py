"""Settings of the ways to make experts. Needs no PyTorch: what cannot be is refused before that is loaded.

E experts, K of them a token, D width of the dense FFN, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from moebed.errors import ConfigError
from moebed.upcycling.scales import SCALES

CHOICES = {
    "by": ("random", "contiguous", "cluster", "inner", "inter"),
    "rows": ("gate", "up", "down"),
    "router": ("random", "centroid", "hidden_centroid", "noisy"),
    "text_clusters": ("tokens", "domains"),
}


@dataclass(frozen=True)
class Settings:
    """How a dense model becomes an MoE.

    Args:
        num_experts: Routed experts of a layer (E), before any are cut by ``granularity``.
        num_experts_per_tok: Experts that a token is sent to (K), before any are cut.
        granularity: Shards that ``split`` cuts each copy into (G): E·G experts, K·G of them a token.
        fraction: Part of the entries that ``noise`` changes, or of the neurons that ``drop`` draws anew (r).
        noise_std: Standard deviation of what ``noise`` adds (σ).
        init_std: Standard deviation of a random router, of shared experts, and of the experts of ``scratch``.
        output_scale: Factor on ``down`` of ``partition`` and ``cluster``: a number, or how it is found (see
            :mod:`moebed.upcycling.scales`); ``published``, which is E / K, if not given.
        seed: Decides all that is random, for each layer and expert apart.
        by: How ``partition`` deals out the neurons (see :mod:`moebed.upcycling.neurons`).
        rows: Of which matrix, for ``cluster`` and for the router's centroids; of ``down`` the columns.
        normalise: Divide each of these rows by its length.
        starts: Starts of the k-means of ``cluster``, of which the best is kept.
        router: ``random``; ``centroid``, the mean of the rows of an expert's neurons; ``hidden_centroid``, the mean of
            the hidden states that an expert's importance is of; or ``noisy``, a random gate of router noisy_topk.
        residual_experts: Experts' worth of neurons that every token passes, of ``inter`` (R); 1 if not given.
        sharing: Whether the routed experts of ``inter`` may have neurons in common.
        expert_width: Neurons of an expert (F) of ``inner`` and ``inter``; D / (E + R) if not given.
        text_clusters: Of which texts the neurons' importance is to be told apart: ``domains``, or clusters of tokens.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    granularity: int = 2
    fraction: float = 0.5
    noise_std: float = 0.02
    init_std: float = 0.02
    output_scale: float | str | None = None
    seed: int = 0
    by: str = "random"
    rows: str = "up"
    normalise: bool = True
    starts: int = 10
    router: str = "random"
    residual_experts: int | None = None
    sharing: bool = True
    expert_width: int | None = None
    text_clusters: str = "tokens"

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that are out of range, and for words that are none of the known ones."""
        least = {"num_experts": 1, "granularity": 1, "starts": 1, "residual_experts": 0, "expert_width": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name.replace('_', '-')} is {value}; it must be at least {bound}")
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
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name.replace('_', '-')} is {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        scale = self.output_scale
        if isinstance(scale, str):
            if scale not in SCALES:
                raise ConfigError(f"output-scale is {scale!r}; give a number, or one of {', '.join(SCALES)}")
        elif scale is not None and not 0 < scale < float("inf"):
            raise ConfigError(f"output-scale is {scale}; it must be a positive number")
