"""How a run is laid out over its processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moebed.config import ModelConfig
from moebed.errors import ConfigError


@dataclass
class ParallelConfig:
    """The processes of a run as a grid of data x expert; every one reads its own data.

    Args:
        data: Rows of the grid (D); 0 stands for what the world size leaves.
        expert: Columns (X): processes over which the routed experts of a layer are split.
        shard: Shard parameters, gradients and optimizer state (FSDP2); otherwise they are replicated.
    """

    data: int = 0
    expert: int = 1
    shard: bool = True

    def resolve(self, world_size: int) -> ParallelConfig:
        """The same with ``data`` filled in; raises ConfigError where the grid does not fit the world size."""
        if self.data < 0 or self.expert < 1:
            raise ConfigError(
                f"parallel: data is {self.data} and expert is {self.expert}; data must be 0 or more, expert 1 or more"
            )
        if world_size % self.expert:
            raise ConfigError(
                f"parallel: a world size of {world_size} (trainer.devices x trainer.num_nodes) is not divisible by "
                f"parallel.expert {self.expert}; change one of them"
            )
        data = self.data or world_size // self.expert
        if data * self.expert != world_size:
            raise ConfigError(
                f"parallel: data {data} x expert {self.expert} makes {data * self.expert} processes but "
                f"trainer.devices x trainer.num_nodes makes {world_size}; change one, or leave out parallel.data"
            )
        return dataclasses.replace(self, data=data)

    def check_experts(self, config: ModelConfig) -> None:
        """Raise ConfigError if the experts of a layer cannot be split evenly."""
        for index in config.moe_layers:
            experts = config.layer(index).num_experts
            if experts % self.expert:
                raise ConfigError(
                    f"parallel: layer {index} has {experts} experts, which parallel.expert {self.expert} does not "
                    "divide; change model.config.num_experts or parallel.expert"
                )
