"""Runs with the locality loss, and with experts that choose tokens: what is logged, refused and said."""

import pytest
import yaml

from moebed.cli import main
from tests.parallel.forked import run
from tests.parallel.parallel_runs import curves, fit, recipe

NEAR = {"num_experts": 8, "expert_ranks": 2, "locality_loss_coef": 0.1}
TAGS = ("train/loss", "train/grad_norm", "train/load_balancing_loss", "train/locality_loss", "val/bits_per_byte")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Writes a recipe into a folder; all have one cache, as gathering the text takes longer than a run."""
    cache = tmp_path_factory.mktemp("cache")

    def write(folder, steps, **model):
        path = recipe(folder, steps, **model)
        content = yaml.safe_load(path.read_text())
        content["trainer"] |= {"callbacks": [], "val_check_interval": steps}
        content["data"] |= {"rows_by_domain": True, "cache_dir": str(cache)}
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def ran(make):
    """Trains in a layout; gives the curves."""

    def train(folder, layout, steps=4, **model):
        folder.mkdir(exist_ok=True)
        arguments, ranks = fit(make(folder, steps, **model), folder / layout, layout)
        run(arguments, ranks, folder / "logs" / layout)
        return curves(folder / layout)

    return train


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"router": "grap", "router_options": {"jitter": 0.1}, "num_experts_per_tok": 1},
        {"router": "locmoe_plus", "router_options": {"affinity_share": 0.8}},
    ],
    ids=["softmax_topk", "grap", "locmoe_plus"],
)
def test_two_ranks_are_one_process_that_stands_for_two(tmp_path, ran, model):
    found = {layout: ran(tmp_path, layout, **NEAR, **model) for layout in ("1 process", "DDP-2", "FSDP2-2", "EP-2")}
    wanted = found["1 process"]
    tags = [*TAGS]
    if model.get("router") == "locmoe_plus":
        tags += ["train/dropped_share", "val/loss_by_expert_choice", "val/loss"]
        assert all(0 < share < 1 for share in wanted["train/dropped_share"].values())
        assert wanted["val/loss_by_expert_choice"] != wanted["val/loss"]
    assert all(0 < loss < 1 for loss in wanted["train/locality_loss"].values())
    for layout, logged in found.items():
        for tag in tags:
            assert logged[tag] == pytest.approx(wanted[tag], rel=1e-5), (layout, tag)


def test_the_language_model_s_loss_has_no_part_of_it(tmp_path, ran):
    """The first step's loss is the same, with and without."""
    plain = ran(tmp_path / "plain", "1 process", steps=2, num_experts=8, expert_ranks=2)
    near = ran(tmp_path / "near", "1 process", steps=2, **NEAR)
    first, second = sorted(near["train/loss"])
    assert near["train/loss"][first] == plain["train/loss"][first]
    assert near["train/loss"][second] != plain["train/loss"][second]
    assert "train/locality_loss" not in plain


def test_a_batch_that_the_ranks_do_not_divide_is_one_line(tmp_path, make, capsys):
    path = make(tmp_path, 2, num_experts=8, expert_ranks=8, locality_loss_coef=0.1)
    arguments = ["--trainer.default_root_dir", str(tmp_path / "run"), "--data.batch_size", "4"]
    assert main(["fit", "--config", str(path), *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "data.batch_size is 4, and a process stands for 8 of the 8 ranks of model.config.expert_ranks" in line
    assert not (tmp_path / "run" / "tensorboard").exists()
