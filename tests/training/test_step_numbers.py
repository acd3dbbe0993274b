"""Whatever a run stops at, it goes on with the numbers of the run that never stopped, each under its own step."""

import json

import pytest

from tests.training.saving_runs import ACCUMULATE, call, callback, curves, last, require_same_model

SIX = ["--trainer.max_steps", 6, "--model.optimizer.schedule", "constant"]
ONCE = ["--trainer.accumulate_grad_batches", 1]
ALWAYS = ["--trainer.val_check_interval", "00:00:00:00"]
EPOCHS = ["--trainer.max_steps", -1, "--model.optimizer.schedule", "constant", "--trainer.limit_train_batches", 4]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ONCE, id="one micro-batch", marks=pytest.mark.slow),
        pytest.param(ACCUMULATE, id="four micro-batches"),
    ],
)
def never_stopped(request, recipe, tmp_path_factory):
    """Options, and the folder of a run that is validated after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("never_stopped") / "run"
    assert call(recipe, folder, *SIX, *request.param) == 0
    return request.param, folder


def _stopped_by(kind, step, micro_batches):
    """Options of a run that ends with a step."""
    if kind == "max_steps":
        return ["--trainer.max_steps", step]
    stops = callback("Stop", step=step) if kind == "callback" else callback("Signal", batch=micro_batches * step - 1)
    return ["--trainer.callbacks", json.dumps(stops)]


def _require_same_curves(folder, whole, stopped_at):
    """But for the validation of a step that a callback stopped the run at, which the whole one need not have."""
    found, wanted = curves(folder), curves(whole)
    assert found.keys() == wanted.keys()
    assert {"train/loss", "train/grad_norm", "val/loss"} <= wanted.keys()
    for tag, points in wanted.items():
        steps = {step for step, _ in points}
        assert [point for point in found[tag] if point[0] in steps] == points, tag
        assert {step for step, _ in found[tag]} - steps <= ({stopped_at - 1} if tag.startswith("val/") else set()), tag


@pytest.mark.parametrize(
    ("kind", "step"),  # the fourth of which is validated
    [
        *(("signal", 3), ("signal", 4), ("max_steps", 3), ("callback", 4)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("max_steps", 4), ("callback", 3))),
    ],
)
def test_a_step_has_its_own_number_whatever_stopped_the_run(run, never_stopped, kind, step):
    micro, whole = never_stopped
    code, said, folder = run("run", *SIX, *micro, *_stopped_by(kind, step, micro[1]))
    assert code == (143 if kind == "signal" else 0), said
    assert last(folder)["global_step"] == step
    code, said, _ = run("run", *SIX, *micro, "--ckpt_path", "last")
    assert code == 0, said
    require_same_model(last(folder), last(whole))
    _require_same_curves(folder, whole, step)


def test_nor_does_it_matter_how_often(run, never_stopped):
    micro, whole = never_stopped
    for step in (2, 4):
        run("run", *SIX, *micro, *_stopped_by("callback", step, micro[1]), "--ckpt_path", "last")
    _, _, folder = run("run", *SIX, *micro, "--ckpt_path", "last")
    assert curves(folder) == curves(whole)


@pytest.mark.parametrize("kind", ["signal", "callback"])
def test_nor_where_validation_is_by_the_clock(run, kind):
    """Every step is time to validate; a signal's step is saved before that, and it is not known that it was due."""
    _, _, whole = run("whole", *SIX, *ALWAYS)
    _, _, folder = run("run", *SIX, *ALWAYS, *_stopped_by(kind, 3, 1))
    assert run("run", *SIX, *ALWAYS, "--ckpt_path", "last")[0] == 0
    found, wanted = curves(folder), curves(whole)
    assert found["train/loss"] == wanted["train/loss"]
    missed = {2} if kind == "signal" else set()
    assert found["val/loss"] == [point for point in wanted["val/loss"] if point[0] not in missed]


def test_nor_at_the_end_of_an_epoch(run):
    """Three epochs of four steps, each validated twice."""
    _, _, whole = run("whole", *EPOCHS, "--trainer.max_epochs", 3)
    _, _, folder = run("run", *EPOCHS, "--trainer.max_epochs", 2)
    assert last(folder)["global_step"] == 8
    assert run("run", *EPOCHS, "--trainer.max_epochs", 3, "--ckpt_path", "last")[0] == 0
    require_same_model(last(folder), last(whole))
    assert curves(folder) == curves(whole)
