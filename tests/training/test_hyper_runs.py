"""Runs of HyperMoE: its settings on the command line, the closing table, the plan, and a run that goes on."""

import json

import pytest

from moebed.cli import main
from moebed.commands.size import read_settings
from moebed.model.config import ModelConfig
from moebed.model.flops import count_parameters, flops_per_token, generator_flops
from tests.training.saving_runs import last, require_same_model

SIZES = {"adapter_size": 4, "expert_embedding_size": 5, "layer_embedding_size": 3, "generator_size": 6}
ALONE = ["--model.config.num_experts_per_tok", 1, "--model.config.norm_topk_prob", "false"]
KINDS = {"unchosen": [], "constant": [], "free": ALONE, "shared_equal_flops": [], "shared_equal_parameters": []}


def options_of(adapters: str) -> list[object]:
    settings = {"adapters": adapters, **SIZES}
    given = [part for key, value in settings.items() for part in (f"--model.config.hyper_experts.{key}", value)]
    return [*given, *KINDS[adapters]]


@pytest.mark.parametrize("adapters", ["unchosen", pytest.param("free", marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit(run, adapters):
    kind = [*options_of(adapters), "--model.optimizer.schedule", "constant"]
    code, _, whole = run("whole", *kind)
    assert code == 0
    assert any("hyper_experts" in key for key in last(whole)["state_dict"])
    assert run("parts", *kind, "--trainer.max_steps", 3)[0] == 0
    code, said, parts = run("parts", *kind, "--ckpt_path", "last")
    assert code == 0
    assert "step 3" in said
    require_same_model(last(parts), last(whole))


def test_another_kind_of_adapters_is_another_model(run):
    assert run("run", *options_of("unchosen"), "--trainer.max_steps", 2)[0] == 0
    code, said, _ = run("run", *options_of("constant"), "--ckpt_path", "last")
    assert code == 2
    assert "hyper_experts" in said


@pytest.mark.parametrize(
    "adapters",
    [pytest.param(kind, marks=() if kind in ("unchosen", "free") else pytest.mark.slow) for kind in KINDS],
)
def test_total_and_active_parameters_are_shown(run, adapters):
    """In the closing table."""
    code, said, folder = run("run", *options_of(adapters), "--trainer.max_steps", 1)
    assert code == 0
    config = ModelConfig.from_dict(last(folder)["model_config"])
    total, active = count_parameters(config)
    assert total == sum(value.numel() for key, value in last(folder)["state_dict"].items() if "decoder." in key)
    assert f"{total:,}" in said
    assert f"{active:,}" in said


@pytest.mark.parametrize("adapters", KINDS)
def test_a_plan_counts_them(recipe, adapters, capsys, tmp_path):
    """What generates adapters is in no token's FLOPs: a plan adds its share in a micro-batch."""
    where = ["--trainer.default_root_dir", str(tmp_path / "run")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(recipe), *map(str, options_of(adapters)), *where, "--print_plan", "json"])
    assert not stopped.value.code
    plan = json.loads(capsys.readouterr().out)
    changes = [f"hyper_experts={json.dumps({**SIZES, 'adapters': adapters})}"]
    changes += ["num_experts_per_tok=1", "norm_topk_prob=false"] if KINDS[adapters] else []
    settings = read_settings(recipe, changes)
    config, length = settings.config(), settings.sequence_length
    assert (plan["total_parameters"], plan["active_parameters"]) == count_parameters(config)
    tokens = plan["tokens_per_rank"]
    generated = generator_flops(config, tokens)
    assert plan["forward_flops_per_token"] == flops_per_token(config, length) + generated // tokens
    assert (generated > 0) == (adapters in ("unchosen", "constant"))
