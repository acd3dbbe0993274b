"""The plan of a run: every number of ``moebed fit --print_plan``, from a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.flops import count_parameters, flops_per_token, generator_flops
from moebed.parallel.config import ParallelConfig
from moebed.plan import activations, memory, traffic
from moebed.plan.activations import Parts
from moebed.plan.setup import Setup, precision_of

MAX_VIOLATION = 1.0  # the busiest expert has twice the mean load: (max - mean) / mean, as in 2408.15664


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes and FLOPs; memory and traffic are of one rank, traffic of one optimizer step.

    Args:
        ranks: Processes, as data x expert.
        total_parameters: Of the model.
        active_parameters: For one token.
        rank_parameters: On one rank; every rank holds as many, padding included.
        forward_flops_per_token: A multiply-add as two; of HyperMoE's generator, its share in a micro-batch.
        training_flops_per_token: Forward and backward, recomputation of the blocks with activation checkpointing, and
            the forward pass more of a step that looks ahead (``router_aux_loss_scope: window``).
        tokens_per_rank: In a micro-batch.
        tokens_per_step: Over all ranks and micro-batches.
        expert_tokens_per_step: Assignments to one expert in a step, on average, for each layer; 0 in a dense one.
        busiest_expert_tokens_per_step: At a maximal violation of MAX_VIOLATION.
        expert_rows: Rows that one expert's product sees in a micro-batch on average, for each layer.
        steps: Optimizer steps, if the recipe says.
        tokens: Tokens of the run, if the recipe says.
        activations: Kept for the backward pass, by part, over all layers.
        activations_checkpointed: The same with activation checkpointing: the blocks' inputs, and the largest block.
        peak_moment: When in a step most is alive.
        peak_memory: What is alive then, by part.
        peak_memory_total: Its sum.
        peak_memory_at_violation: The sum where a rank's experts get (1 + MAX_VIOLATION) times the mean.
        largest_gathered_block: A gathered block; 0 where nothing is sharded.
        exchange_bytes: Of tokens on their way to experts and back, of each layer.
        all_gather_bytes: FSDP2's.
        reduce_scatter_bytes: FSDP2's.
        all_reduce_bytes: Of replicated gradients.
        probe_gather_bytes: Of each layer, when probes look at weights.
    """

    ranks: tuple[int, int]
    total_parameters: int
    active_parameters: int
    rank_parameters: int
    forward_flops_per_token: int
    training_flops_per_token: int
    tokens_per_rank: int
    tokens_per_step: int
    expert_tokens_per_step: list[float]
    busiest_expert_tokens_per_step: list[float]
    expert_rows: list[float]
    steps: int | None
    tokens: int | None
    activations: Parts
    activations_checkpointed: Parts
    peak_moment: str
    peak_memory: Parts
    peak_memory_total: int
    peak_memory_at_violation: int
    largest_gathered_block: int
    exchange_bytes: list[float]
    all_gather_bytes: float
    reduce_scatter_bytes: float
    all_reduce_bytes: float
    probe_gather_bytes: list[int]


def make_plan(setup: Setup) -> Plan:
    """Work everything out; raises ConfigError if a layer's experts cannot be split, or no formula knows a setting."""
    setup.require_formulas()
    setup.layout.check(setup.world_size, setup.config)
    config, layers = setup.config, range(setup.config.num_hidden_layers)
    outer, *blocks = memory.all_shapes(setup)
    total, active = count_parameters(config)
    forward = flops_per_token(config, setup.sequence_length) + generator_flops(config, setup.tokens) // setup.tokens
    head = 2 * config.vocab_size * config.hidden_size
    loads = []
    for index in layers:
        layer = config.layer(index)
        share = layer.num_experts_per_tok / layer.num_experts if layer.num_experts else 0.0
        loads.append(share * setup.tokens_per_step)
    peak = memory.peak(setup)
    gathered = [setup.gathered_bytes * memory.unsharded_elements(setup, shapes) for shapes in blocks]
    all_gather, reduce_scatter = traffic.fsdp_bytes(setup)
    return Plan(
        ranks=(setup.layout.data, setup.layout.expert),
        total_parameters=total,
        active_parameters=active,
        rank_parameters=sum(memory.rank_elements(setup, shapes) for shapes in (outer, *blocks)),
        forward_flops_per_token=forward,
        training_flops_per_token=(
            3 * forward + (forward - head if setup.checkpointing else 0) + (forward if setup.looks_ahead else 0)
        ),
        tokens_per_rank=setup.tokens,
        tokens_per_step=setup.tokens_per_step,
        expert_tokens_per_step=loads,
        busiest_expert_tokens_per_step=[(1 + MAX_VIOLATION) * load for load in loads],
        expert_rows=[load / (setup.layout.data * setup.accumulate) for load in loads],
        steps=setup.max_steps,
        tokens=setup.max_steps and setup.max_steps * setup.tokens_per_step,
        activations=_kept(setup, checkpointing=False),
        activations_checkpointed=_kept(setup, checkpointing=True),
        peak_moment=peak.name,
        peak_memory=peak.parts,
        peak_memory_total=peak.total,
        peak_memory_at_violation=memory.peak(setup, MAX_VIOLATION).total,
        largest_gathered_block=max(gathered) if setup.gathers else 0,
        exchange_bytes=[traffic.exchange_bytes(setup, index) for index in layers],
        all_gather_bytes=all_gather,
        reduce_scatter_bytes=reduce_scatter,
        all_reduce_bytes=traffic.all_reduce_bytes(setup),
        probe_gather_bytes=[traffic.probe_gather_bytes(setup, shapes) for shapes in blocks],
    )


def _kept(setup: Setup, checkpointing: bool) -> Parts:
    """Activations kept, by part: of all blocks, or the blocks' inputs and the one block that keeps most."""
    layers = range(setup.config.num_hidden_layers)
    blocks = [activations.block(setup, index) for index in layers]
    logits = {"logits and loss": activations.logits(setup)}
    if not checkpointing:
        return memory.add(*blocks, logits)
    inputs = sum(activations.residual(setup) + activations.block_outputs(setup, index) for index in layers)
    return memory.add({"kept inputs of blocks": inputs}, max(blocks, key=lambda parts: sum(parts.values())), logits)


def setup_of(recipe: Any, cuda_devices: int) -> Setup:
    """What a parsed recipe of ``moebed fit`` says.

    Args:
        recipe: Namespace with trainer, model, data and parallel.
        cuda_devices: GPUs of this machine, for what the recipe leaves to it (``auto``, -1).

    Raises:
        ConfigError: If the processes do not fit the grid, or a setting cannot be planned.
    """
    trainer, model, data = recipe.trainer, recipe.model, recipe.data
    world, layout = world_size(recipe, cuda_devices), recipe.parallel
    if layout is None:
        layout = ParallelConfig(data=world, shard=False)
    else:
        layout = ParallelConfig(**{field.name: layout[field.name] for field in dataclasses.fields(ParallelConfig)})
    return Setup(
        config=ModelConfig.from_dict(model.config.as_dict()),
        batch_size=data.batch_size,
        sequence_length=data.sequence_length,
        precision=precision_of(trainer.precision),
        layout=layout.resolve(world),
        accumulate=trainer.accumulate_grad_batches,
        checkpointing=model.activation_checkpointing,
        device="gpu" if _on_gpu(trainer, cuda_devices) else "cpu",
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        optimizer="adamw" if model.optimizer is None else model.optimizer.name,
    )


def world_size(recipe: Any, cuda_devices: int) -> int:
    """Processes that a parsed recipe of ``moebed fit`` runs in; every one of them sees text of its own.

    Args:
        recipe: Namespace with trainer and parallel.
        cuda_devices: GPUs of this machine, for what the recipe leaves to it.

    Raises:
        ConfigError: If ``trainer.devices`` is no number.
    """
    trainer, layout = recipe.trainer, recipe.parallel
    grid = layout.data * layout.expert if layout is not None else 0
    here = cuda_devices if _on_gpu(trainer, cuda_devices) else 1
    return _devices(trainer.devices, grid and grid // trainer.num_nodes, here) * trainer.num_nodes


def takes_any_gpu(recipe: Any, cuda_devices: int) -> bool:
    """Whether a parsed recipe trains on GPUs, and does not say on which."""
    named = isinstance(recipe.trainer.devices, list) or "," in str(recipe.trainer.devices)
    return _on_gpu(recipe.trainer, cuda_devices) and not named


def _on_gpu(trainer: Any, cuda_devices: int) -> bool:
    return trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and cuda_devices > 0)


def _devices(devices: int | str | list[int], wanted: int, here: int) -> int:
    """Devices a node; where the recipe leaves them open, those that the grid wants, or else those of this machine."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return wanted or max(1, here)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"trainer.devices {devices!r} is no number of devices; say how many a node has")
    return int(text)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return dataclasses.asdict(plan)
