"""The tables of moebed/plan/README.md are what the plan's formulas give."""

from pathlib import Path

import pytest
import yaml

from moebed.machine.units import human
from moebed.model.config import ModelConfig
from moebed.parallel.config import ParallelConfig
from moebed.plan.plan import Plan, make_plan
from moebed.plan.setup import Setup, precision_of

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "cluster" / "moe_64gpu.yaml"


def plan(nodes: int = 8, expert: int = 8, batch_size: int | None = None, **changes) -> Plan:
    """Of the recipe for 64 GPUs with some settings changed, without the command line."""
    content = yaml.safe_load(RECIPE.read_text())
    config = ModelConfig.from_dict(content["model"]["config"] | changes)
    layout = ParallelConfig(**{**content["parallel"], "expert": expert})
    return make_plan(
        Setup(
            config,
            batch_size or content["data"]["batch_size"],
            content["data"]["sequence_length"],
            precision_of("bf16-mixed"),  # what auto is on such GPUs
            layout.resolve(content["trainer"]["devices"] * nodes),
            checkpointing=content["model"]["activation_checkpointing"],
        )
    )


def ranks_table() -> list[str]:
    plans = [plan(1), plan(8), plan(64), plan(64, expert=64)]
    rows = {
        "GPUs (data × expert)": [f"{p.ranks[0] * p.ranks[1]} ({p.ranks[0]} × {p.ranks[1]})" for p in plans],
        "parameters of a rank": [human(p.rank_parameters) for p in plans],
        "memory of a rank at its peak": [human(p.peak_memory_total, "B") for p in plans],
        "the same at a max violation of 1": [human(p.peak_memory_at_violation, "B") for p in plans],
        "tokens of a step": [human(p.tokens_per_step) for p in plans],
        "tokens of an expert in a step": [human(p.expert_tokens_per_step[0]) for p in plans],
        "rows of an expert's product": [human(p.expert_rows[0]) for p in plans],
        "exchange of tokens, a layer": [human(p.exchange_bytes[0], "B") for p in plans],
        "exchange of tokens, all layers": [human(sum(p.exchange_bytes), "B") for p in plans],
        "all-gather of parameters": [human(p.all_gather_bytes, "B") for p in plans],
        "reduce-scatter of gradients": [human(p.reduce_scatter_bytes, "B") for p in plans],
        "probe gather of weights, a layer": [human(p.probe_gather_bytes[0], "B") for p in plans],
    }
    return _markdown(rows)


def doubling_table() -> list[str]:
    changed = {
        "as it is": plan(),
        "48 layers": plan(num_hidden_layers=48),
        "128 experts": plan(num_experts=128),
        "12 experts a token": plan(num_experts_per_tok=12),
        "32 sequences a rank": plan(batch_size=32),
        "128 GPUs": plan(16),
    }
    rows = {"64 GPUs (8 × 8)": ["parameters", "memory of a rank", "exchange", "all-gather", "probe gather, a layer"]}
    for name, p in changed.items():
        sizes = [p.peak_memory_total, sum(p.exchange_bytes), p.all_gather_bytes, p.probe_gather_bytes[0]]
        rows[name] = [human(p.total_parameters), *(human(size, "B") for size in sizes)]
    return _markdown(rows)


def _markdown(rows: dict[str, list[str]]) -> list[str]:
    lines = ["| " + " | ".join([name, *values]) + " |" for name, values in rows.items()]
    return [lines[0], "|" + "---|" * (len(next(iter(rows.values()))) + 1), *lines[1:]]


@pytest.mark.parametrize("table", [ranks_table, doubling_table])
def test_readme_shows_what_the_formulas_give(table):
    lines = (ROOT / "moebed" / "plan" / "README.md").read_text(encoding="utf-8").splitlines()
    expected = table()
    assert expected[0] in lines, f"the table of {table.__name__} has another head"
    start = lines.index(expected[0])
    assert lines[start : start + len(expected)] == expected


if __name__ == "__main__":
    print("\n".join([*ranks_table(), "", *doubling_table()]))
