"""``moebed bench routers``: tokens per second of a training step with each router, beside ``softmax_topk``.

The same step, batches and alternation as ``moebed bench train``. ``autonomy`` has experts so wide that it takes the
active FLOPs of ``softmax_topk``; the others have its shapes, and the table says what they cost.

H hidden, F expert intermediate, E experts, K experts per token, C = d_low.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moebed.bench import train
from moebed.machine.allocator import keep_freed_memory
from moebed.model.config import ModelConfig
from moebed.model.flops import flops_per_token
from moebed.model.routers import ROUTERS

BASELINE = "softmax_topk"
_MULTIPLE = 16  # of every width, which products on all devices like


def config_with(config: ModelConfig, name: str) -> ModelConfig:
    """The model with another router; d_low is H / 3, or less where that took more than half of the experts' FLOPs."""
    layer = config.layer(0)
    half = 1.5 * layer.num_experts_per_tok * layer.moe_intermediate_size / layer.num_experts
    d_low = _rounded(min(config.hidden_size / 3, half))
    changes: dict[str, Any] = {"router": name, "norm_topk_prob": None, "router_options": {"d_low": d_low}}
    found = dataclasses.replace(config, **changes)
    width = ROUTERS[name].width_of_equal_flops(found)
    return dataclasses.replace(found, moe_intermediate_size=_rounded(width))


def run(
    size_name: str,
    names: list[str],
    rounds: int,
    steps: int,
    compile: bool = False,
    device: str = "cpu",
    precision: str = "bf16-mixed",
) -> dict[str, Any]:
    """Measure one size; plain data for a table and for JSON."""
    size, target = train.SIZES[size_name], torch.device(device)
    torch.manual_seed(0)
    keep_freed_memory()
    configs = {name: config_with(size.model, name) for name in dict.fromkeys((BASELINE, *names))}
    contestants = {
        name: train.own_step(config, target, compile and ROUTERS[name].compiles, precision)
        for name, config in configs.items()
    }
    found = train.measure(contestants, size, target, rounds, steps)
    base = flops_per_token(configs[BASELINE], size.sequence_length, training=True)
    rows = []
    for name, config in configs.items():
        ratios = sorted(found.ratios(name, BASELINE))
        rows.append(
            {
                "name": name,
                "tokens_per_second": found.tokens_per_second(name),
                "flops_ratio": flops_per_token(config, size.sequence_length, training=True) / base,
                "over_baseline": [ratios[0], torch.tensor(ratios).double().quantile(0.5).item(), ratios[-1]],
                "moe_intermediate_size": config.layer(0).moe_intermediate_size,
            }
        )
    return {
        "size": size_name,
        "rounds": rounds,
        "steps": steps,
        "compile": compile,
        "device": device,
        "precision": precision,
        "rows": rows,
    }


def _rounded(width: float) -> int:
    return max(_MULTIPLE, round(width / _MULTIPLE) * _MULTIPLE)
