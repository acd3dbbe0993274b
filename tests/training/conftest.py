"""Runs of a second that are stopped and continued; each file of tests has its own."""

import signal

import pytest

from tests.small_run import made_up_text, small_recipe, write_recipe
from tests.training.saving_runs import ACCUMULATE, call


@pytest.fixture(autouse=True)
def _hears_ctrl_c():
    """Which a job in the background ignores, and so would the runs in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def _without_reports():
    """Drawing a report's figures takes longer than the run that it is of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probes.report.page.write_report", lambda runs, path: path)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, _without_reports):
    """Of a run of a second; all runs share its text."""
    folder = tmp_path_factory.mktemp("recipe")
    content = small_recipe(
        folder,
        made_up_text(90),
        trainer={"precision": "32-true", "max_steps": 6},
        checkpoint={"every_n_train_steps": 1000},
        samples={"prompt_tokens": 2, "new_tokens": 1},
        config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 16},
        model={"optimizer": {"warmup_steps": 2, "learning_rate": 0.01}},
        data={"sequence_length": 16, "max_validation_windows": 2},
    )
    del content["trainer"]["default_root_dir"]
    return write_recipe(folder, content)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of a run of four micro-batches a step that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert call(recipe, folder, *ACCUMULATE) == 0
    return folder


@pytest.fixture
def run(recipe, tmp_path, capfd):
    """Calls a training command; gives its exit code, what it said, and the run's folder."""

    def run_of(name, *options, command="fit", config=recipe, folder=True):
        capfd.readouterr()
        code = call(config, tmp_path / name if folder else None, *options, command=command)
        return code, "".join(capfd.readouterr()), tmp_path / name

    return run_of
