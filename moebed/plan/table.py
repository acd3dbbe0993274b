"""A plan as a table for people, or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moebed.machine.units import human
from moebed.plan.plan import MAX_VIOLATION, Plan, to_dict


def print_plan(plan: Plan, as_json: bool) -> None:
    """Print on standard output."""
    if as_json:
        print(json.dumps(to_dict(plan), indent=2))
        return
    data, expert = plan.ranks
    ranks = f"{data * expert} ranks: data {data} x expert {expert}" if data * expert > 1 else "1 rank"
    table = Table(title=f"plan for {ranks}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for title, rows in _sections(plan):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", "")
        for name, value in rows:
            table.add_row(f"  {name}", value)
    Console(width=100).print(table)


def _sections(plan: Plan) -> list[tuple[str, list[tuple[str, str]]]]:
    def nbytes(parts: dict[str, int]) -> list[tuple[str, str]]:
        return [(name, human(size, "B")) for name, size in parts.items()]

    kept, checkpointed = plan.activations, plan.activations_checkpointed
    return [
        (
            "model",
            [
                ("parameters", human(plan.total_parameters)),
                ("active for a token", human(plan.active_parameters)),
                ("on a rank", human(plan.rank_parameters)),
                ("FLOPs a token, forward", human(plan.forward_flops_per_token)),
                ("FLOPs a token, in training", human(plan.training_flops_per_token)),
            ],
        ),
        (
            "tokens",
            [
                ("of a rank in a micro-batch", f"{plan.tokens_per_rank:,}"),
                ("of a step", f"{plan.tokens_per_step:,}"),
                ("of an expert in a step, mean", _over_layers(plan.expert_tokens_per_step)),
                (
                    f"of the busiest, at a max violation of {MAX_VIOLATION:g}",
                    _over_layers(plan.busiest_expert_tokens_per_step),
                ),
                ("rows of an expert's product, mean", _over_layers(plan.expert_rows)),
                ("optimizer steps", "not said" if plan.steps is None else f"{plan.steps:,}"),
                ("of the run", "not known" if plan.tokens is None else human(plan.tokens)),
            ],
        ),
        (
            f"memory of a rank at its peak: {plan.peak_moment}",
            [
                *nbytes(plan.peak_memory),
                ("total of live tensors", human(plan.peak_memory_total, "B")),
                (f"the same at a max violation of {MAX_VIOLATION:g}", human(plan.peak_memory_at_violation, "B")),
                ("one gathered block", human(plan.largest_gathered_block, "B")),
            ],
        ),
        ("activations kept, without checkpointing", [*nbytes(kept), ("total", human(sum(kept.values()), "B"))]),
        (
            "activations kept, with checkpointing (the largest block recomputed)",
            [*nbytes(checkpointed), ("total", human(sum(checkpointed.values()), "B"))],
        ),
        (
            "sent by a rank in a step",
            [
                ("exchange of tokens, a layer", _over_layers(plan.exchange_bytes, "B")),
                ("exchange of tokens, all layers", human(sum(plan.exchange_bytes), "B")),
                ("all-gather of parameters", human(plan.all_gather_bytes, "B")),
                ("reduce-scatter of gradients", human(plan.reduce_scatter_bytes, "B")),
                ("all-reduce of gradients", human(plan.all_reduce_bytes, "B")),
            ],
        ),
        ("received by a rank when probes gather weights", [("a layer", _over_layers(plan.probe_gather_bytes, "B"))]),
    ]


def _over_layers(values: Sequence[float], unit: str = "") -> str:
    """The one number of all MoE layers, or its range."""
    found = sorted({value for value in values if value})
    if not found:
        return human(0, unit)
    low, high = human(found[0], unit), human(found[-1], unit)
    return low if low == high else f"{low} to {high}"
