"""The Lightning strategy behind a recipe's `parallel:`, with checkpoints that any layout can continue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moebed.checkpoints import sharded
from moebed.checkpoints.files import load_mapped
from moebed.errors import UserError
from moebed.machine.storage import on_first_rank, standing
from moebed.model.spread import assign, whole
from moebed.parallel.config import ParallelConfig
from moebed.parallel.sharding import Layout, reshard


class MeshStrategy(ModelParallelStrategy):
    """Lays the module's ``decoder`` out over a mesh of ranks (see moebed.parallel.sharding).

    The module applies ``layout`` in its ``configure_model``. Checkpoints are folders to which each rank writes its
    parts, or single files; either is read in any layout.

    Args:
        parallel: The layout.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        super().__init__(timeout=timedelta(minutes=parallel.timeout_minutes))
        self.parallel = parallel
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The meshes; known once the processes have found each other."""
        assert self._layout is not None
        return self._layout

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Join the other processes and build the meshes."""
        self._setup_distributed()
        self._layout = Layout(self.parallel, self.world_size, self.root_device.type)
        self._device_mesh = self._layout.mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients accumulate, replicas do not average theirs; shards are reduced in every micro-batch."""
        model: Any = self.lightning_module.decoder  # type: ignore[union-attr]
        model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            model.set_requires_all_reduce(True)

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts of the parameters."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's parts of the optimizer's state."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, all ranks together."""
        path = Path(self.broadcast(filepath))
        if self.parallel.checkpoint == "file":
            self._save_file(checkpoint, path)
            return
        rest = dict(checkpoint)
        tensors = {f"model.{name}": value for name, value in rest.pop("state_dict").items()}
        states = rest.pop("optimizer_states", [])
        rest["optimizer_states"] = []
        for state, optimizer in zip(states, self.optimizers, strict=False):
            names = self._parameter_names(optimizer)
            tensors |= sharded.flatten(state["state"], names)
            rest["optimizer_states"].append({"names": names, "param_groups": state["param_groups"]})
        sharded.write(path, tensors, rest)

    def _save_file(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Gather a tensor at a time to the first rank's memory; it writes one file, as a single process would."""

        def gather(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: gather(entry) for key, entry in value.items()}
            if isinstance(value, Tensor):
                full = whole(value)
                return full.cpu() if self.is_global_zero else None
            return value

        checkpoint["state_dict"] = gather(checkpoint["state_dict"])
        for state in checkpoint.get("optimizer_states", []):
            state["state"] = gather(state["state"])
        on_first_rank(lambda: self.checkpoint_io.save_checkpoint(checkpoint, path))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any layout into model and optimizer; what is left is what Lightning restores."""
        path = standing(Path(self.broadcast(checkpoint_path)))
        module = self.lightning_module
        assert module is not None
        reshard(module)
        state = module.state_dict()
        if not sharded.is_sharded(path):
            if not path.is_file():
                raise UserError(f"checkpoint {path} does not exist; give the path of a .ckpt, or last")
            checkpoint = dict(load_mapped(path))  # mapped: no rank reads more than its parts
            _require_same_names(path, state, checkpoint["state_dict"])
            for name, value in checkpoint.pop("state_dict").items():
                assign(state[name], value)
            for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
                _restore(optimizer, saved["state"], saved["param_groups"])
            checkpoint["state_dict"] = {}
            return checkpoint
        sizes, rest = sharded.sizes(path), sharded.read_rest(path)
        tensors: dict[str, Any] = {f"model.{name}": value for name, value in state.items()}
        _require_same_names(path, tensors, [name for name in sizes if name.startswith("model.")])
        parameters = dict(module.named_parameters())
        for name, (size, dtype) in sizes.items() if self.optimizers else ():
            if name.startswith("optimizer."):
                parameter = parameters[name.removeprefix("optimizer.").rsplit(".", 1)[0]]
                alike = size == parameter.shape
                tensors[name] = torch.zeros_like(parameter) if alike else torch.zeros(size, dtype=dtype)
        sharded.read_tensors(path, tensors)
        for optimizer, saved in zip(self.optimizers, rest["optimizer_states"], strict=False):
            states = sharded.unflatten(tensors, self._parameter_names(optimizer))
            _restore(optimizer, states, saved["param_groups"])
        rest["state_dict"] = {}
        return rest

    def _parameter_names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in its order."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _require_same_names(path: Path, ours: Any, theirs: Any) -> None:
    other = sorted(set(ours) ^ set(theirs))
    if other:
        raise UserError(f"checkpoint {path} is of another model: {other[0]} is only in one of them")


def _restore(optimizer: Optimizer, states: Mapping[int, Mapping[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Give an optimizer the state of a checkpoint, of which a rank keeps its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {number: {k: _part(parameters[number], v) for k, v in state.items()} for number, state in states.items()}
    optimizer.load_state_dict({"state": own, "param_groups": groups})


def _part(parameter: Tensor, value: Any) -> Any:
    """This rank's part of a parameter's state; what is no tensor of its shape, or is a part already, stays."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    part = torch.zeros_like(parameter)
    assign(part, value)
    return part
