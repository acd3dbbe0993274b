"""Layouts that cannot be are refused in one line before anything starts."""

import pytest

from moebed.cli import main
from moebed.errors import ConfigError
from moebed.parallel.config import ParallelConfig
from moebed.parallel.strategy import MeshStrategy
from moebed.training.trainer import AutoTrainer
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("parallel", "world_size", "said"),
    [
        ({"data": 2, "expert": 2}, 2, "data 2 × expert 2 = 4 processes but the trainer starts 2"),
        ({"expert": 2}, 3, "a multiple of 2 processes but the trainer starts 3"),
        ({"expert": 4}, 2, "a multiple of 4 processes but the trainer starts 2"),
        ({"expert": 3}, 3, "parallel.expert is 3 but layer 0 has 4 experts"),
        ({"data": 5}, 5, "the experts' gate_up_proj has 96 rows in layer 0 .*, which 5 data ranks do not divide"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(parallel, world_size, said):
    with pytest.raises(ConfigError, match=said):
        ParallelConfig(**parallel).check(world_size, tiny_config())


def test_gate_and_up_that_are_apart_are_each_divided():
    """An odd width: the two together are even, which is enough only where they are one matrix."""
    parallel, apart = ParallelConfig(data=2), {"router": "autonomy", "router_options": {"d_low": 8}}
    with pytest.raises(ConfigError, match=r"gate_proj has 49 rows in layer 0 .*, which 2 data ranks do not divide"):
        parallel.check(2, tiny_config(moe_intermediate_size=49, **apart))
    parallel.check(2, tiny_config(moe_intermediate_size=49))
    parallel.check(2, tiny_config(**apart))


def test_every_layer_is_checked():
    config = tiny_config(num_experts=[4, 6], num_hidden_layers=2)
    with pytest.raises(ConfigError, match="layer 1 has 6 experts"):
        ParallelConfig(expert=4).check(4, config)
    ParallelConfig(expert=2).check(4, config)
    ParallelConfig(expert=4).check(4, tiny_config(num_experts=[4, 0], intermediate_size=64))


def test_a_layout_that_fits():
    assert ParallelConfig().data_size(8) == 8
    assert ParallelConfig(expert=4).data_size(8) == 2
    ParallelConfig(data=5, shard=False).check(5, tiny_config())


@pytest.mark.parametrize("bad", [{"data": -1}, {"expert": 0}, {"timeout_minutes": 0}])
def test_numbers_out_of_range(bad):
    with pytest.raises(ConfigError, match="parallel: "):
        ParallelConfig(**bad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parallel.expert", "2"], "a multiple of 2 processes but the trainer starts 1"),
        (["--parallel.data", "1", "--trainer.strategy", "ddp"], "parallel and trainer.strategy exclude each other"),
    ],
)
def test_the_command_refuses_before_it_starts(options, said, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = ["--config", "recipes/tiny_mixtral.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert main(["fit", *recipe, "--trainer.default_root_dir", str(run), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert not run.exists()


def test_no_layout_runs_in_inference_mode():
    """Over NCCL Lightning would take it, in which FSDP2 cannot gather a shard of one rank."""
    made = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "inference_mode": True}
    for strategy, expected in ((MeshStrategy(ParallelConfig(expert=2)), False), ("auto", True)):
        trainer = AutoTrainer(strategy=strategy, devices=1, **made)
        loops = trainer.validate_loop, trainer.test_loop, trainer.predict_loop
        assert {loop.inference_mode for loop in loops} == {expected}
