"""What the router tests share: every router at a tiny size, and experts whose outputs are given."""

import torch

from moebed.model.config import ModelConfig
from moebed.model.routers import ROUTERS, Router, build_router
from tests.conftest import tiny_config

OPTIONS = {"d_low": 8, "competition_rate": 1.0, "num_domains": 2}
ALL = tuple(ROUTERS)
BY_DOMAIN = tuple(name for name, router in ROUTERS.items() if router.needs_domain)
COMPILED = tuple(name for name, router in ROUTERS.items() if router.compiles)


def domains_of(ids: torch.Tensor) -> torch.Tensor:
    """A domain for each token (B, S), by its place: the same in every row."""
    return (torch.arange(ids.shape[1]) // 3 % 2).expand_as(ids)


def config_of(name: str, **changes) -> ModelConfig:
    """A tiny model with this router; all its experts compete in every step where they ever do."""
    options = {**OPTIONS, **changes.pop("router_options", {})}
    return tiny_config(router=name, router_options=options, **changes)


def router_of(name: str, **changes) -> Router:
    """A router alone, with random weights, as in training."""
    config = config_of(name, **changes)
    router = build_router(config, config.layer(0))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    router.begin_step(0)
    return router.train()


class GivenOutputs:
    """Experts that answer with outputs (T, E, H) decided before."""

    def __init__(self, outputs: torch.Tensor) -> None:
        self.outputs = outputs

    def each(self, x: torch.Tensor, topk_index: torch.Tensor) -> torch.Tensor:
        """The outputs asked for."""
        return self.outputs.gather(1, topk_index.unsqueeze(-1).expand(-1, -1, self.outputs.shape[-1]))
