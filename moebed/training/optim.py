"""AdamW with decay groups, Muon beside it, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebed.errors import ConfigError
from moebed.model.experts import Experts
from moebed.model.width import is_bias
from moebed.training.muon import Muon, muon_parameters


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule.

    Args:
        name: adamw, or muon: matrices that map hidden states take the orthogonalised momentum as their step, each
            expert's by itself, and AdamW trains the rest; both by one learning rate and decay (moebed.training.muon).
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of matrices; norm scales and biases are not decayed.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator of the update.
        momentum: Decay of Muon's momentum.
        nesterov: Whether Muon's step looks ahead, to gradient + momentum.
        warmup_steps: Optimizer steps of linear warm-up from 0.
        schedule: After the warm-up: cosine, wsd (stable, then a linear decay over the last decay_fraction of the
            steps) or constant.
        decay_fraction: Share of all steps over which wsd decays.
        min_lr_ratio: Last learning rate as a share of the peak.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    nesterov: bool = True
    warmup_steps: int = 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer: {name} is {getattr(self, name)}; it must not be negative")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW, or Muon with it; parameters of two or more dimensions decay, vectors and biases do not.

    Routed experts have a group of their own: they may lie on another mesh of ranks than the rest. Groups and their
    order are the same whatever the layout, so that a checkpoint fits any.
    """
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    stacked = {id(p) for name, p in model.named_parameters() if is_bias(name) and p.ndim >= 2}  # a bias an expert
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in stacked]
    joined = muon_parameters(model) if config.name == "muon" else {}
    groups: list[dict[str, Any]] = []
    for are_experts in (False, True):
        own = [p for p in matrices if (id(p) in experts) == are_experts]
        groups.append({"params": [p for p in own if id(p) not in joined], "weight_decay": config.weight_decay})
        for count in sorted(set(joined.values())):
            stacks = [p for p in own if joined.get(id(p)) == count]
            groups.append({"params": stacks, "weight_decay": config.weight_decay, "joined": count})
    groups.append({"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0})
    groups.append({"params": [p for p in parameters if id(p) in stacked], "weight_decay": 0.0})
    groups = [one for group in groups for one in _by_rate(model, group) if one["params"]]
    for group in groups:
        group["lr"] = config.learning_rate * group.get("width", 1.0)
    adamw: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "muon":
        if any("width" in group for group in groups):
            raise ConfigError(
                "optimizer: name is muon, whose steps have one size at any width, but model.config.base_hidden_size "
                "scales learning rates as Adam needs them; leave it out, or choose adamw"
            )
        return Muon(groups, config.momentum, config.nesterov, fused=True, **adamw)
    return torch.optim.AdamW(groups, fused=True, **adamw)


def _by_rate(model: nn.Module, group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group, or one for each learning rate over the optimizer's: ``"width"`` is the factor, in descending order."""
    factors = getattr(model, "width_factors", {})
    rates = {id(parameter): factors[name].rate for name, parameter in model.named_parameters() if name in factors}
    if not rates:
        return [group]
    found: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        found.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
    return [group | {"params": found[rate], "width": rate} for rate in sorted(found, reverse=True)]


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, float32 whatever they are; every rank has it, over all meshes they lie on."""
    sums: list[Tensor] = []  # one a mesh, on the gradients' device; a number from the host would be waited for
    for grads in _gradients_by_mesh(parameters):
        # Not get_total_norm, which sums and answers in the gradients' type: 8 bits of a bf16-true run's.
        norms = torch._foreach_norm(_local(grads), 2, dtype=torch.float32)
        squares = torch.linalg.vector_norm(torch.stack(norms)).square()
        if isinstance(grads[0], DTensor):
            for dimension, placement in enumerate(grads[0].placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(squares, group=grads[0].device_mesh.get_group(dimension))
        sums.append(squares)
    return torch.stack(sums).sum().sqrt() if sums else torch.zeros(())


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply all gradients by one number."""
    for grads in _gradients_by_mesh(parameters):
        torch._foreach_mul_(_local(grads), factor)


def _local(grads: list[Tensor]) -> list[Tensor]:
    """What this rank holds of them."""
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def _gradients_by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            found.setdefault(mesh, []).append(parameter.grad)
    return list(found.values())


def learning_rate_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of an optimizer step, as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    progress = (step - (total_steps - decay_steps)) / decay_steps
    return 1.0 - (1 - config.min_lr_ratio) * min(1.0, max(0.0, progress))
