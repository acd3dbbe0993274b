"""What becomes of a run's folder in study.json: finished, diverged, failed or not run, each for its reason."""

import json
from types import SimpleNamespace

import pytest
from study_runs import FakeRun
from torch.utils.tensorboard import SummaryWriter

from moebed.study.collecting import _code, _tasks, collect
from moebed.study.files import load_study
from moebed.study.progress import status_path
from moebed.study.recipe import Step, StudyRecipe
from moebed.study.runs import Arm, StudyPlan
from tests.conftest import tiny_config

STEPS = 40
SHORT = {"step": STEPS, "val/loss": 4.6}


@pytest.fixture
def collected(tmp_path):
    """Lays out a run's folder and reads it."""

    def read(numbers=None, record=None, first_loss=4.6, from_random=True, step=None, curve=((19, 4.1), (39, 3.9))):
        run, out = FakeRun("runs/topk/seed_1", steps=STEPS, from_random=from_random), tmp_path
        (out / run.name).mkdir(parents=True)
        (out / "status/runs/topk").mkdir(parents=True)
        if numbers is not None:
            (out / run.name / "run_summary.json").write_text(json.dumps(numbers))
        (out / "status/runs/topk/seed_1.json").write_text(json.dumps({"hash": "", "identity": {}, **(record or {})}))
        if step is not None:
            (out / "status/runs/topk/seed_1.step").write_text(str(step))
        with SummaryWriter(out / run.name / "tensorboard") as writer:
            if first_loss is not None:
                writer.add_scalar("train/loss", first_loss, 4)
            for logged, loss in curve:
                writer.add_scalar("val/loss", loss, logged)
                writer.add_scalar("val/bits_per_byte", loss / 2, logged)
            for logged, speed in enumerate((10.0, 100.0, 110.0)):
                writer.add_scalar("train/tokens_per_second", speed, logged)
        steps = {"topk": [Step("fit", {})]}
        recipe = StudyRecipe("try", tmp_path / "base.yaml", steps, "topk", [1])
        arm = Arm(tiny_config(), {}, STEPS, 640, 100, 60, 200)
        plan = StudyPlan(recipe, {"topk": arm}, {run.name: run}, {("topk", 1): run.name})
        return load_study(collect(plan, out))["arms"]["topk"]["runs"]["1"]

    return read


def test_a_finished_run(collected):
    summary = {"step": STEPS, "val/loss": 3.9, "val/bits_per_byte": 1.95, "val/bits_per_byte/code": 1.5}
    found = collected(summary)
    assert (found["status"], found["why"]) == ("finished", "")
    assert (found["loss"], found["bits_per_byte"], found["domains"]) == (3.9, 1.95, {"code": 1.5})
    assert found["curve"]["step"] == [20, 40]
    assert found["curve"]["loss"] == pytest.approx([4.1, 3.9])
    assert found["tokens_per_second"] == 100.0  # the median: the first steps are slow
    assert found["guessing_loss"] == pytest.approx(4.564, abs=1e-3)  # ln 96
    assert found["code"] == []  # of a folder of before this was kept


def test_the_code_of_a_run_is_kept(collected):
    code = [{"source": "3fa2", "torch": "2.9"}]
    assert collected({"step": STEPS, "val/loss": 3.9}, record={"code": code})["code"] == code


def test_the_code_of_the_steps_before_comes_first_and_once(tmp_path):
    """Two steps of one code, a third of another."""
    old, new = ({"source": source, "torch": "2.9"} for source in ("3fa2", "77c0"))
    runs = {}
    for name, needs, code in (("dense", None, [old]), ("moe", "dense", [new]), ("longer", "moe", [old, new])):
        runs[name] = FakeRun(name, needs=needs)
        path = status_path(tmp_path, name, "json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"code": code}))
    found = {name: _code(SimpleNamespace(runs=runs), name, tmp_path) for name in runs}
    assert found == {"dense": [old], "moe": [old, new], "longer": [old, new]}


def test_of_tasks_neither_errors_nor_counts_are_compared(tmp_path):
    run = FakeRun("tasks/topk/seed_1", steps=0)
    (tmp_path / run.name).mkdir(parents=True)
    numbers = {"tasks/recall/acc": 0.5, "tasks/recall/acc_stderr": 0.1, "tasks/recall/items": 20}
    (tmp_path / run.name / run.finished).write_text(json.dumps(numbers))
    assert _tasks(run, 40, tmp_path) == {"tasks/recall/acc": {"step": [40], "value": [0.5]}}


@pytest.mark.parametrize(
    ("numbers", "options", "status", "why"),
    [
        ({"step": STEPS, "val/loss": float("nan")}, {}, "diverged", "its loss on held-out text is nan"),
        ({"step": STEPS, "val/loss": 4.7}, {}, "diverged", "rose from 3.900 to 4.700, above the 4.564 of guessing"),
        # A few steps, which have taught it nothing: random weights are a little worse than guessing.
        (SHORT, {"first_loss": None, "curve": [(39, 4.6)]}, "finished", ""),
        (SHORT, {"first_loss": 4.57, "curve": [(19, 4.59), (39, 4.6)]}, "finished", ""),
        # Widely drawn weights begin far above guessing, and come down.
        ({"step": STEPS, "val/loss": 6.9}, {"first_loss": 7.4, "curve": [(39, 6.9)]}, "finished", ""),
        (
            {"step": STEPS, "val/loss": 6.9},
            {"first_loss": 4.6, "curve": [(39, 6.9)]},
            "diverged",
            "from 4.600 to 6.900",
        ),
        ({"step": STEPS, "val/loss": 6.9}, {"first_loss": None, "curve": [(39, 6.9)]}, "diverged", "from 4.564 to 6.9"),
        # It came down, and lost what it had.
        ({"step": STEPS, "val/loss": 4.57}, {"first_loss": 4.9}, "diverged", "from 3.900 to 4.570"),
        ({"step": STEPS, "val/loss": 4.5}, {}, "finished", ""),
        # What was trained before may be far from its text, and get nearer.
        ({"step": STEPS, "val/loss": 4.7}, {"from_random": False}, "finished", ""),
        ({"step": STEPS, "val/loss": float("nan")}, {"from_random": False}, "diverged", "its loss on held-out text"),
        (None, {"record": {"exit_code": 3, "said": "the loss is nan"}}, "diverged", "the loss is nan"),
        (None, {"record": {"exit_code": 1, "said": "no space"}}, "failed", "exit code 1: no space"),
        (None, {"step": 17}, "not run", "stopped at step 17 of 40"),
        ({"step": 17, "val/loss": 4.0}, {"step": 17}, "not run", "stopped at step 17 of 40"),
    ],
)
def test_a_run_that_does_not_count_says_why(collected, numbers, options, status, why):
    found = collected(numbers, **options)
    assert found["status"] == status
    assert why in found["why"]
