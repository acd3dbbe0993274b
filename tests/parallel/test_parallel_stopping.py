"""Runs that are stopped in the middle of a step, again and again, end as the run that never stopped, bit for bit."""

import os
import random
import signal
from functools import cache

import pytest
import torch

from moebed.checkpoints.sharded import is_sharded, read_whole
from tests.parallel.forked import run, start
from tests.parallel.parallel_runs import fit, recipe

STEPS, ACCUMULATE = 12, 4
OPTIONS = ["--trainer.accumulate_grad_batches", str(ACCUMULATE), "--trainer.limit_val_batches", "0"]
WAYS = {
    "SIGTERM": ["--checkpoint.every_n_train_steps", "1000"],
    "clock": ["--checkpoint.train_time_interval", "0:00:00"],
    "kill -9": ["--checkpoint.every_n_train_steps", "1"],
}


def _load(folder):
    path = folder / "checkpoints" / "last.ckpt"
    return read_whole(path) if is_sharded(path) else torch.load(path, weights_only=True)


def _at(batch, number, rank):
    """This rank, or all of them if it is None, gets a signal within a micro-batch."""

    def before(own):
        from moebed.training.module import MoEModule

        original, seen = MoEModule.training_step, [0]

        def step(self, *arguments):
            seen[0] += 1
            if seen[0] == batch and rank in (None, own):
                os.kill(os.getpid(), number)
            return original(self, *arguments)

        MoEModule.training_step = step

    return before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a layout's run that nothing stopped; each is trained once."""

    @cache
    def of(layout):
        folder = tmp_path_factory.mktemp("whole")
        run(*fit(recipe(folder, STEPS), folder / "run", layout, *OPTIONS), folder / "logs")
        return _load(folder / "run")

    return of


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["1 process", "DDP-2", "EP-2"])
def test_runs_stopped_at_random_micro_batches_end_as_the_whole_run(tmp_path, whole, layout, way):
    path, draw = recipe(tmp_path, STEPS), random.Random(f"{layout} {way}")
    arguments, ranks = fit(path, tmp_path / "run", layout, *OPTIONS, *WAYS[way], "--ckpt_path", "last")
    number = signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL
    done, stops = 0, 0
    while stops < 4:
        # Not before the second step, so that something is saved; ranks hear of a SIGTERM one step later.
        batch = draw.randint(2 * ACCUMULATE + 1, 4 * ACCUMULATE)
        if done + batch // ACCUMULATE + 2 >= STEPS:
            break
        one = draw.randrange(ranks) if way == "SIGTERM" else None
        started = start(arguments, ranks, tmp_path / "logs" / f"stop{stops}", before=_at(batch, number, one))
        codes = started.wait(120)
        assert codes == ([143] + [0] * (ranks - 1) if way == "SIGTERM" else [-9] * ranks), started.said
        done, stops = _load(tmp_path / "run")["global_step"], stops + 1
    assert stops >= 2
    run(arguments, ranks, tmp_path / "logs" / "last")
    found, wanted = _load(tmp_path / "run"), whole(layout)
    assert found["global_step"] == wanted["global_step"] == STEPS
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    for parameter, state in wanted["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(found["optimizer_states"][0]["state"][parameter][key], value), (parameter, key)
