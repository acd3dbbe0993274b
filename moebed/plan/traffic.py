"""Bytes that a rank sends in an optimizer step, by kind; a byte that a rank keeps for itself is not counted.

W ranks = D x X, T tokens of a micro-batch on a rank, K experts per token, H hidden, c bytes of a product's operands.
A ring over n ranks sends (n - 1) / n of a buffer once to gather it or to reduce and scatter it, twice to all-reduce it.
"""

from __future__ import annotations

from moebed.model.flops import Shapes, count
from moebed.parallel.traffic import bytes_per_trip
from moebed.plan.memory import all_shapes, rank_elements
from moebed.plan.setup import Setup

REDUCED = 4  # gradients are reduced in float32


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def exchange_bytes(setup: Setup, index: int) -> float:
    """One MoE layer's, of a rank in a step, with the experts of each token drawn evenly from all (``even_trips``).

    Forward, each token goes once to every rank that has some of its experts, c·H bytes with K weights and indices, and
    c·H come back; gradients take the same ways in the backward pass; a step that looks ahead repeats the forward pass,
    recomputation what goes out, and what comes back if a norm follows. (X - 1) / X of it leaves the rank. Counts of
    3·X int64 a pass are left out. Where ranks gather all tokens each goes to all X, and a ring's reduce-scatters and
    all-gathers send as many bytes.
    """
    config, layer = setup.config, setup.config.layer(index)
    if not layer.num_experts:
        return 0.0
    row = config.hidden_size, setup.precision.compute, layer.num_experts_per_tok
    each = bytes_per_trip(*row, setup.checkpointing, setup.looks_ahead, config.post_norms)
    return setup.accumulate * setup.trips(index) * each.both * _ring(setup.layout.expert)


def _groups(setup: Setup) -> list[tuple[int, int]]:
    """Unsharded elements of a rank's parameters, and over how many ranks they are shared: experts, and all else."""
    shapes = all_shapes(setup)
    routed = sum(count(part.get("experts", [])) for part in shapes)
    rest = sum(count(tensors) for part in shapes for tensors in part.values()) - routed
    return [(routed // setup.layout.expert, setup.layout.data), (rest, setup.world_size)]


def fsdp_bytes(setup: Setup) -> tuple[float, float]:
    """All-gathers and reduce-scatters of a rank in a step; 0 where nothing is sharded.

    Each block is gathered in c bytes for the forward pass and again for the backward pass, and once more where a step
    looks ahead; its gradients are reduced and scattered in float32, in every micro-batch.
    """
    if not setup.gathers:
        return 0.0, 0.0
    sent = setup.accumulate * sum(elements * _ring(ranks) for elements, ranks in _groups(setup))
    return (3 if setup.looks_ahead else 2) * setup.gathered_bytes * sent, REDUCED * sent


def all_reduce_bytes(setup: Setup) -> float:
    """Gradients that are replicated, once a step whatever the accumulation: 2 (n - 1) / n of their bytes."""
    if setup.layout.shard:
        return 0.0
    return sum(2 * setup.precision.parameter * elements * _ring(ranks) for elements, ranks in _groups(setup))


def probe_gather_bytes(setup: Setup, shapes: Shapes) -> int:
    """What a rank receives when probes of weights gather one layer: all of it but the rank's own part."""
    return setup.precision.parameter * max(0, sum(map(count, shapes.values())) - rank_elements(setup, shapes))
