"""A decoder laid out over a mesh of ranks: experts spread over them, everything sharded or replicated by FSDP2.

W ranks = D data × X expert. The mesh has three dimensions, of which one of the first two is 1:

    (replicate, shard, expert) = (1, D, X) where parameters are sharded, (D, 1, X) where they are replicated

Routed experts: first axis over X (DTensor), what is left over D by FSDP2. All other parameters: over all W by FSDP2.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moebed.model.decoder import Decoder, MoE
from moebed.model.routers import Router
from moebed.parallel.config import ParallelConfig
from moebed.parallel.exchange import EXCHANGES


class Layout:
    """The meshes that a decoder is laid out over.

    Args:
        parallel: The layout.
        world_size: Number of processes (W).
        device_type: ``cpu`` or ``cuda``.
    """

    def __init__(self, parallel: ParallelConfig, world_size: int, device_type: str) -> None:
        self.parallel, self.world_size = parallel, world_size
        data = parallel.data_size(world_size)
        replicate, shard = (1, data) if parallel.shard else (data, 1)
        names = ("replicate", "shard", "expert")
        self.mesh = init_device_mesh(device_type, (replicate, shard, parallel.expert), mesh_dim_names=names)
        whole = (1, world_size) if parallel.shard else (world_size, 1)
        self._all = init_device_mesh(device_type, whole, mesh_dim_names=names[:2])
        for mesh in (self.mesh, self._all):
            for group in mesh.get_all_groups():
                if group is not dist.group.WORLD:  # groups of some ranks begin with torch's time, ten minutes by NCCL
                    _set_pg_timeout(timedelta(minutes=parallel.timeout_minutes), group)

    @property
    def for_experts(self) -> DeviceMesh:
        """Ranks that hold the same experts."""
        return self._without_ones(self.mesh)

    @property
    def for_all_else(self) -> DeviceMesh:
        """All ranks."""
        return self._without_ones(self._all)

    def _without_ones(self, mesh: DeviceMesh) -> DeviceMesh:
        """FSDP2 takes one dimension to shard over, or two to replicate and to shard over."""
        return mesh["shard"] if self.parallel.shard else mesh["replicate", "shard"]

    def apply(self, decoder: Decoder, device: torch.device) -> None:
        """Lay a decoder out; its parameters become DTensors.

        Those on the meta device get their initial values, a block at a time, so that no rank ever has the whole model.

        Args:
            decoder: The model.
            device: Where this rank computes.
        """
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        narrow = torch.bfloat16 if self.parallel.gather_dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        again = self.parallel.reshard_after_forward
        for index, block in enumerate(decoder.blocks):
            prefix = f"layers.{index}."
            if isinstance(block.mlp, MoE):
                self._spread(decoder, block.mlp, f"{prefix}mlp.experts.", device)
            _materialise(decoder, block, prefix, device)
            if isinstance(block.mlp, MoE):
                _materialise_state(block.mlp.router, device)
                fully_shard(
                    block.mlp.experts,
                    mesh=self.for_experts,
                    mp_policy=policy,
                    reshard_after_forward=again,
                    # Not the axis that ranks of `expert` split.
                    shard_placement_fn=lambda parameter: Shard(1),
                )
                for method in ("mean_neurons", "responses"):
                    register_fsdp_forward_method(block.mlp.experts, method)
                if narrow is not None:
                    fully_shard(block.mlp.router, mesh=self.for_all_else, mp_policy=wide, reshard_after_forward=again)
                    register_fsdp_forward_method(block.mlp.router, "gate_copy")
            fully_shard(block, mesh=self.for_all_else, mp_policy=policy, reshard_after_forward=again)
        _materialise(decoder, decoder, "", device)
        fully_shard(decoder, mesh=self.for_all_else, mp_policy=policy)

    def _spread(self, decoder: Decoder, moe: MoE, prefix: str, device: torch.device) -> None:
        """Give each rank of `expert` its part of the experts."""
        mesh, experts = self.mesh["expert"], moe.experts
        if mesh.size() == 1:
            return
        for name, parameter in list(experts.named_parameters(recurse=False)):
            full = decoder.initial(prefix + name, parameter) if parameter.is_meta else parameter.detach()
            own = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None).to_local().to(device, copy=True)
            spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            experts.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        exchange = EXCHANGES[self.parallel.exchange](mesh.get_group())
        experts.exchange, moe.router.static_shapes = exchange, exchange.static_shapes


def _materialise(decoder: Decoder, module: nn.Module, prefix: str, device: torch.device) -> None:
    """Give a module's parameters that are on the meta device their initial values."""
    for path, part in module.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                value = decoder.initial(full, parameter).to(device)
                part.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    if isinstance(module, Decoder) and decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight


def _materialise_state(router: Router, device: torch.device) -> None:
    """Give a router's state, which every rank has as a whole, its first values."""
    if any(state.is_meta for state in router.buffers()):
        for name, state in list(router.named_buffers(recurse=False)):
            setattr(router, name, torch.zeros_like(state, device=device))
        router.reset_state()


def reshard(model: nn.Module) -> None:
    """Let go of every parameter that an evaluation left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
