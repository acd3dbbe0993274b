"""``moebed fit --print_plan``: before anything is allocated or read, and one line for what cannot be planned."""

import json
import re
from pathlib import Path

import pytest
import yaml

import moebed.training.module
from moebed.cli import main
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = sorted((ROOT / "recipes" / "cluster").glob("*.yaml"))
TINY = ROOT / "recipes" / "tiny_deepseekmoe.yaml"


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan builds no model")

    monkeypatch.setattr(moebed.training.module, "Decoder", refuse)
    monkeypatch.chdir(tmp_path)  # where a run folder would be


def plan_of(capsys, recipe: Path, *arguments: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(recipe), *arguments, "--print_plan", "json"])
    assert not stopped.value.code
    assert not list(Path.cwd().iterdir())
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", CLUSTER, ids=lambda path: path.stem)
def test_cluster_recipes_fit_their_gpus(recipe, capsys):
    content = yaml.safe_load(recipe.read_text())
    plan = plan_of(capsys, recipe)
    gpus = int(re.search(r"moe_(\d+)gpu", recipe.stem).group(1))
    assert (
        plan["ranks"][0] * plan["ranks"][1] == gpus == content["trainer"]["devices"] * content["trainer"]["num_nodes"]
    )
    room = 0.9 * 80e9 - 5e9  # a tenth and 5 GB are left for what a plan does not count
    assert plan["peak_memory_total"] < plan["peak_memory_at_violation"] < room
    assert 3.5e9 < plan["total_parameters"] < 3.7e9
    with_checkpoints, without = (sum(plan[key].values()) for key in ("activations_checkpointed", "activations"))
    all_else = 16 * plan["rank_parameters"]  # with their gradients and moments
    assert with_checkpoints < 20e9 < room < without + all_else  # which is why they checkpoint
    assert plan["tokens"] == pytest.approx(120e9, rel=1e-3)
    data, model = content["data"], content["model"]["config"]
    assert data["sequence_length"] <= model["max_position_embeddings"]
    assert data["tokenizer"]["vocab_size"] <= model["vocab_size"]


def test_plan_of_half_a_trillion_parameters(capsys):
    sizes = [
        "--model.config.hidden_size",
        "8192",
        "--model.config.num_hidden_layers",
        "80",
        "--model.config.num_experts",
    ]
    sizes += ["128", "--model.config.moe_intermediate_size", "2048", "--trainer.num_nodes", "256"]
    plan = plan_of(capsys, CLUSTER[0], *sizes, "--data.sources", "[{name: none, kind: files, path: missing.txt}]")
    assert plan["total_parameters"] > 500e9
    assert plan["ranks"] == [256, 8]


def test_table_says_the_same(capsys):
    plan = plan_of(capsys, TINY, "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(TINY), "--trainer.devices", "2", "--trainer.accelerator", "cpu", "--print_plan"])
    table = capsys.readouterr().out
    config = ModelConfig.from_dict(yaml.safe_load(TINY.read_text())["model"]["config"])
    count = sum(parameter.numel() for parameter in Decoder(config).parameters())
    assert plan["total_parameters"] == count
    assert plan["ranks"] == [2, 1]
    assert "DDP buckets" in table
    for shown in (f"{count / 1e6:.3g} M", f"{plan['tokens_per_step']:,}", f"{plan['peak_memory_total'] / 1e6:.3g} MB"):
        assert shown in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.devices", "6", "--parallel.expert", "4"], ("a multiple of 4 processes", "starts 6")),
        (
            ["--trainer.devices", "8", "--parallel.data", "3", "--parallel.expert", "2"],
            ("data 3 × expert 2 = 6", "starts 8"),
        ),
        (["--trainer.devices", "24", "--parallel.expert", "12"], ("layer 1", "32 experts", "parallel.expert is 12")),
        (["--trainer.devices", "2", "--trainer.precision", "64-true"], ("trainer.precision", "bf16-mixed")),
        (["--trainer.devices", "some"], ("trainer.devices 'some'",)),
        (["--print_plan", "xml"], ("print_plan",)),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, words, capsys):
    plan = [] if "--print_plan" in arguments else ["--print_plan"]
    assert main(["fit", "--config", str(TINY), *arguments, *plan]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    for word in words:
        assert word in line


def test_sbatch_script_asks_for_what_its_recipe_needs():
    (script,) = (ROOT / "recipes" / "cluster").glob("*.sbatch")
    text = script.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    command = next(line for line in text.splitlines() if line.startswith("srun ")).split()
    recipe = ROOT / command[command.index("--config") + 1]
    trainer = yaml.safe_load(recipe.read_text())["trainer"]
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == trainer["devices"]
    name, seconds = re.fullmatch(r"(SIG\w+)@(\d+)", asked["signal"]).groups()  # no B:, so that every task gets it
    assert name == "SIGUSR1"  # the signal at which Lightning requeues
    assert int(seconds) >= 300
    assert "requeue" in asked
    assert command[command.index("moebed") + 1] == "fit"
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in command[: command.index("moebed")]
    readme = (script.parent / "README.md").read_text()
    launch = " ".join(readme[readme.index("torchrun --nnodes") :].split("\n\n")[0].split())
    nodes, processes = (int(number) for number in re.findall(r"--(?:nnodes|nproc_per_node) (\d+)", launch))
    assert (nodes, processes) == (trainer["num_nodes"], trainer["devices"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--parallel.reshard_after_forward", "false"], "parallel.reshard_after_forward: false"),
        (["--model.config.router", "expert_norm"], "router expert_norm, which runs"),
        (["--model.config.router", "competesmoe"], "router competesmoe, which runs"),
        (["--model.config.router", "relu"], "no formula for router relu; the ones it knows are softmax_topk"),
    ],
)
def test_what_no_formula_knows_is_refused(arguments, why, capsys):
    """Instead of the numbers of something else."""
    recipe = ROOT / "recipes" / "cluster" / "moe_8gpu.yaml"
    assert main(["fit", "--config", str(recipe), *arguments, "--print_plan", "json"]) == 2
    assert why in capsys.readouterr().err


def test_parameters_gathered_in_bfloat16_leave_the_residual_stream_in_it(capsys):
    recipe = ROOT / "recipes" / "cluster" / "moe_8gpu.yaml"
    narrow = plan_of(capsys, recipe, "--parallel.gather_dtype", "bfloat16")
    wide = plan_of(capsys, recipe, "--parallel.gather_dtype", "float32")
    key = "kept inputs of blocks"
    assert narrow["activations_checkpointed"][key] < 0.6 * wide["activations_checkpointed"][key]
