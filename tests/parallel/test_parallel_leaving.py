"""A signal to any rank of a run whose last step is saved ends all of them at once, wherever each of them is."""

import json
import os
import signal
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

from moebed.machine import slurm
from moebed.parallel.gathered import GatheredModel
from moebed.training import leaving
from moebed.training.save_requests import Requests
from tests.parallel.forked import Ranks, begin, call, run, start
from tests.small_run import probing, small_recipe, write_recipe

LONG = 60.0  # seconds; what takes so long is ended before


def _wait_for(paths: list[Path], ranks: Ranks) -> None:
    end = time.monotonic() + LONG
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, ranks.said
        time.sleep(0.01)


def _trainer(rank: int, world_size: int) -> SimpleNamespace:
    """What is asked of one; SLURM has started it."""
    started_by = SimpleNamespace(cluster_environment=SLURMEnvironment())
    place = {"world_size": world_size, "global_rank": rank, "is_global_zero": rank == 0}
    return SimpleNamespace(**place, _accelerator_connector=started_by)


def _at_the_end(rank: int, world_size: int, folder: Path, stuck: bool = False) -> None:
    """The first rank works alone; the other one waits for it in a collective, or for what never comes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    slurm.requeue = lambda: (folder / f"requeued by {rank}").touch()
    trainer = _trainer(rank, world_size)
    requests = Requests()
    requests.take_over(trainer)
    requests.last_step_saved(trainer)
    (folder / f"ready {rank}").touch()
    if rank == 0:
        time.sleep(LONG)
    elif stuck:
        leaving.PATIENCE = 0.2
        dist.distributed_c10d._get_default_store().get("what never comes")
    dist.barrier()


@pytest.mark.parametrize(
    ("number", "rank", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 0, 130), (signal.SIGUSR1, 1, 143)]
)
def test_a_signal_to_one_rank_ends_both(tmp_path, number, rank, code):
    ranks = begin(_at_the_end, 2, tmp_path, tmp_path)
    _wait_for([tmp_path / f"ready {one}" for one in range(2)], ranks)
    os.kill(ranks.pids[rank], number)
    assert ranks.wait(LONG / 2) == [code, 0], ranks.said
    assert ranks.said.count("the last step is saved; --ckpt_path last does what is left") == 1
    requeued = [path.name for path in tmp_path.glob("requeued*")]
    assert requeued == (["requeued by 0"] if number == signal.SIGUSR1 else [])


def test_a_rank_that_does_not_come_back_is_ended_where_it_is(tmp_path):
    """As one that waits for a device, which waits for a rank that has left."""
    ranks = begin(_at_the_end, 2, tmp_path, tmp_path, True)
    _wait_for([tmp_path / f"ready {one}" for one in range(2)], ranks)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.wait(LONG / 2) == [143, 0], ranks.said


def _through(rank: int, world_size: int, folder: Path) -> None:
    """The second rank has nothing more to do; the first one is asked to end then."""
    trainer = _trainer(rank, world_size)
    requests = Requests()
    requests.take_over(trainer)
    before = signal.getsignal(signal.SIGTERM)
    requests.last_step_saved(trainer)
    dist.barrier()
    if rank == 1:
        requests.give_back(is_last=True)
        assert signal.getsignal(signal.SIGTERM) is not before
        (folder / "through").touch()
        return
    while not (folder / "through").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LONG)


def test_who_leaves_does_not_wait_for_a_rank_that_is_through(tmp_path, monkeypatch):
    monkeypatch.setattr(leaving, "PATIENCE", LONG)
    ranks = begin(_through, 2, tmp_path, tmp_path)
    assert ranks.wait(LONG / 2) == [143, 0], ranks.said


def _with_a_child(rank: int, world_size: int) -> None:
    """A process that the first rank has forked is ended, as a loader's workers are."""
    trainer = _trainer(rank, world_size)
    requests = Requests()
    requests.take_over(trainer)
    requests.last_step_saved(trainer)
    if rank == 0:
        begun, begins = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begins, b"1")
            time.sleep(LONG)
        os.read(begun, 1)
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
    time.sleep(5 * leaving.SECONDS)
    dist.barrier()
    requests.give_back(is_last=True)


def test_a_signal_to_a_process_that_a_rank_has_forked_is_none_to_the_rank(monkeypatch):
    monkeypatch.setattr(leaving, "SECONDS", 0.05)
    call(_with_a_child, 2)


@pytest.mark.parametrize(("error", "told"), [(SystemExit, 0), (KeyboardInterrupt, 0), (ValueError, 1), (None, 1)])
def test_a_rank_that_ends_amid_a_probing_does_not_wait_to_tell_the_others(monkeypatch, error, told):
    """They are ending too; of an error of its own, and of the walk's end, it tells them."""
    said = []
    monkeypatch.setattr(GatheredModel, "_tell", lambda self, part: said.append(part))
    with pytest.raises(error) if error else nullcontext(), GatheredModel.__new__(GatheredModel).leading():
        if error:
            raise error
    assert len(said) == told


def _recipe(folder: Path, layout: dict, val_check_interval: int = 2) -> Path:
    content = small_recipe(
        folder,
        trainer={
            "precision": "32-true",
            "devices": 2,
            "val_check_interval": val_check_interval,
            "callbacks": probing(2, probes=["balance"], at_start=False),
            **layout.get("trainer", {}),
        },
    )
    if "parallel" in layout:
        content["parallel"] = layout["parallel"]
    return write_recipe(folder, content)


def _pressed(hook: str, step: int, number: int):
    """The second rank gets a signal in a hook; the first one works on for long, if it is the end of the run."""

    def before(rank: int) -> None:
        import probes.report.page
        from moebed.training.callbacks import SampleText

        probes.report.page.write_report = lambda runs, path: path  # drawing it takes longer than the run

        def press(self, trainer, *_, **__):
            if trainer.global_step < step or self.__dict__.setdefault("is_pressed", False):
                return
            self.is_pressed = True
            if rank == 1:
                os.kill(os.getpid(), number)
            elif hook == "on_train_end":
                time.sleep(LONG)

        setattr(SampleText, hook, press)

    return before


DDP = {"trainer": {"strategy": "ddp"}}
EXPERTS = {"parallel": {"expert": 2}}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [DDP, EXPERTS], ids=["DDP-2", "EP-2"])
@pytest.mark.parametrize(
    ("hook", "step", "val_check_interval", "said"),
    [
        ("on_train_start", 0, 2, "stopped at step"),  # in what comes before the first step
        ("on_validation_start", 4, 2, "the last step is saved"),
        ("on_train_end", 4, 2, "the last step is saved"),
        ("on_validation_batch_end", 4, 3, "the last step is saved"),  # of the closing numbers
    ],
)
def test_a_run_ends_and_goes_on_wherever_one_rank_hears_the_signal(
    tmp_path, layout, hook, step, val_check_interval, said
):
    arguments = ["fit", "--config", str(_recipe(tmp_path, layout, val_check_interval))]
    ranks = start(arguments, 2, tmp_path / "first", before=_pressed(hook, step, signal.SIGTERM))
    assert ranks.wait(120) == [143, 0], ranks.said
    assert said in ranks.said
    summary = tmp_path / "run" / "run_summary.json"
    assert not summary.exists()
    run([*arguments, "--ckpt_path", "last"], 2, tmp_path / "second")
    assert json.loads(summary.read_text())["step"] == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 4


def _elsewhere(rank: int, world_size: int) -> None:
    os.environ.pop("MASTER_ADDR", None)
    together, heard = leaving.LeavingTogether(rank, 2, [signal.SIGUSR1], lambda number: 1), []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(together.wait()))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_a_rank_that_met_the_others_elsewhere_acts_on_its_own_signals():
    call(_elsewhere, 1)


def _silent(rank: int, world_size: int) -> None:
    """The port of the store takes connections, and nobody answers: as of a first rank that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        begin = time.monotonic()
        leaving.LeavingTogether(rank, 2, [signal.SIGUSR1], lambda number: 1).stop(is_last=True)
        assert time.monotonic() - begin < leaving.PATIENCE / 2
        os._exit(0)  # not to wait for the thread that still connects


def test_a_store_that_is_silent_holds_up_no_run(tmp_path):
    ranks = begin(_silent, 1, tmp_path)
    assert ranks.wait(LONG) == [0], ranks.said


def _silent_as_a_signal_comes(rank: int, world_size: int) -> None:
    leaving.PATIENCE = 1.0
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        together = leaving.LeavingTogether(rank, 2, [signal.SIGUSR1], lambda number: 1)
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(together.wait()))
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(LONG)


def test_a_store_that_is_silent_holds_up_no_signal(tmp_path):
    """The rank waited for its connection, which gives up far later than it is told to."""
    ranks = begin(_silent_as_a_signal_comes, 1, tmp_path)
    assert ranks.wait(LONG / 3) == [int(signal.SIGUSR1)], ranks.said


def _judging(rank: int, world_size: int, folder: Path) -> None:
    """A validation, say, of a rank that Lightning started as the one that has started the others."""
    launcher = SimpleNamespace(kill=lambda number: (folder / f"passed on {number}").touch())
    ending = leaving.EndingStartedRanks(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    ending.take_over()
    ending.give_back()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    ending.take_over()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LONG)


def test_who_has_started_ranks_ends_them_with_itself(tmp_path):
    ranks = begin(_judging, 1, tmp_path, tmp_path)
    assert ranks.wait(LONG / 2) == [-signal.SIGTERM], ranks.said
    assert (tmp_path / f"passed on {int(signal.SIGTERM)}").exists()
