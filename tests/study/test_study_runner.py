"""Processes of a study: shared out, in order, continued, and never run twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_runs import FakeRun, program

from moebed.errors import UserError
from moebed.machine.termination import StoppedError
from moebed.study import lock
from moebed.study.lock import RunLock
from moebed.study.progress import StudyBar, status_path
from moebed.study.runner import Outcome, run_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("moebed.study.runner.POLL_SECONDS", 0.01)


def _starts(out, name):
    path = out / name / "starts"
    return len(path.read_text()) if path.exists() else 0


def _seconds(out, name):
    return json.loads((out / "status" / f"{name}.json").read_text(encoding="utf-8"))["seconds"]


def test_everything_runs_once_and_a_second_call_runs_nothing(tmp_path):
    runs = [FakeRun(f"runs/{arm}/seed_{seed}") for seed in (1, 2) for arm in ("a", "b")]
    for _ in range(2):
        outcome = run_all(runs, tmp_path, jobs=2, command=program(tmp_path))
        assert sorted(outcome.finished) == sorted(run.name for run in runs)
        assert [_starts(tmp_path, run.name) for run in runs] == [1, 1, 1, 1]
    assert "OMP_NUM_THREADS" in os.environ  # or the runs would share the cores as jobs ask


def test_each_run_keeps_which_code_it_was_computed_by(tmp_path, monkeypatch):
    """A study is continued by what lies there then, and a folder of before this was kept says that it is not known."""
    runs = [FakeRun("runs/a/seed_1", behaviour="fails"), FakeRun("runs/a/seed_2", behaviour="fails")]
    for source, last in (("one", 0), ("one", 0), ("two", 1)):
        monkeypatch.setattr("moebed.study.code.source_now", lambda *_, source=source, **__: source)
        run_all(runs[last:], tmp_path, command=program(tmp_path))
    kept = [json.loads(status_path(tmp_path, run.name, "json").read_text()) for run in runs]
    assert [[code["source"] for code in record["code"]] for record in kept] == [["one"], ["one", "two"]]
    del kept[0]["code"]
    status_path(tmp_path, runs[0].name, "json").write_text(json.dumps(kept[0]))
    run_all(runs[:1], tmp_path, command=program(tmp_path))
    record = json.loads(status_path(tmp_path, runs[0].name, "json").read_text())
    assert [code["source"] for code in record["code"]] == ["not recorded", "two"]


def test_a_failed_run_stops_only_what_needs_it_and_is_tried_again(tmp_path):
    first = FakeRun("stages/fit/seed_1", behaviour="fails")
    runs = [first, FakeRun("runs/b/seed_1", needs=first.name), FakeRun("runs/c/seed_1"), FakeRun("runs/d/seed_1")]
    runs[3].behaviour = "ends early"
    outcome = run_all(runs, tmp_path, command=program(tmp_path))
    assert outcome.finished == ["runs/c/seed_1"]
    assert outcome.failed[first.name] == "exit code 1: no space on the disk"
    assert outcome.failed["runs/b/seed_1"] == f"not started: it needs {first.name}"
    assert "exit code 0" in outcome.failed["runs/d/seed_1"]
    assert _starts(tmp_path, "runs/b/seed_1") == 0
    first.behaviour = runs[3].behaviour = "works"
    assert len(run_all(runs, tmp_path, command=program(tmp_path)).finished) == 4
    assert _starts(tmp_path, "runs/c/seed_1") == 1


def test_the_time_that_is_left_counts_no_steps_of_a_run_that_has_stopped(tmp_path):
    """Neither as done, which they are not, nor as to be done, which they will not be."""
    with StudyBar(tmp_path, {f"runs/{arm}/seed_1": 100 for arm in "abcd"}) as bar:
        for arm, steps in zip("abc", (100, 3, 20), strict=True):
            path = status_path(tmp_path, f"runs/{arm}/seed_1", "step")
            path.parent.mkdir(parents=True)
            path.write_text(str(steps))
        bar.end("runs/a/seed_1", finished=True)
        bar.end("runs/b/seed_1", finished=False)
        bar.show(["runs/c/seed_1"])
        said = bar.standing()
    assert said.startswith("1 of 4 runs, 1 stopped: 123 of 303 steps, ")
    assert said.endswith(", c/seed_1 20/100")


def test_a_fault_of_many_runs_is_said_once():
    """With how many it stopped, be it that each names itself, or what it waited for."""
    failed = {f"runs/{arm}/seed_{seed}": "exit code 2: no text" for arm in "ab" for seed in (1, 10)}
    failed |= {f"stages/fit_1/seed_{seed}": f"exit code 1: out/stages/fit_1/seed_{seed}: full" for seed in (1, 10)}
    failed |= {f"runs/c/seed_{seed}": f"not started: it needs stages/fit_1/seed_{seed}" for seed in (1, 10)}
    failed["runs/d/seed_1"] = "exit code 1: another"
    assert Outcome(failed=failed).why_failed() == (
        "runs/a/seed_1 and 3 more (exit code 2: no text); "
        "stages/fit_1/seed_1 and 1 more (exit code 1: out/stages/fit_1/seed_1: full); "
        "runs/c/seed_1 and 1 more (not started: it needs stages/fit_1/seed_1); runs/d/seed_1 (exit code 1: another)"
    )


def test_a_diverged_run_is_told_from_a_failed_one_and_not_tried_again(tmp_path):
    runs = [FakeRun("runs/a/seed_1", behaviour="diverges"), FakeRun("runs/b/seed_1")]
    for _ in range(2):
        outcome = run_all(runs, tmp_path, command=program(tmp_path))
        assert outcome.diverged == {"runs/a/seed_1": "the loss is nan at step 3"}
        assert (outcome.finished, outcome.failed) == (["runs/b/seed_1"], {})
    assert _starts(tmp_path, "runs/a/seed_1") == 1


def test_a_changed_config_is_an_error_that_names_what_changed(tmp_path):
    run = FakeRun("runs/a/seed_1", identity={"model.config.num_experts": 8, "seed": 1})
    run_all([run], tmp_path, command=program(tmp_path))
    run.identity = {"model.config.num_experts": 16, "seed": 1}
    with pytest.raises(
        UserError, match=r"seed_1 was begun with another config \(model.config.num_experts was 8 and is"
    ):
        run_all([run], tmp_path, command=program(tmp_path))
    (tmp_path / "status" / "runs" / "a" / "seed_1.json").unlink()
    with pytest.raises(UserError, match="was not begun by this study"):
        run_all([run], tmp_path, command=program(tmp_path))


def test_a_signal_ends_the_processes_and_the_next_call_continues(tmp_path):
    runs = [FakeRun("runs/a/seed_1", steps=400), FakeRun("runs/b/seed_1", steps=400), FakeRun("runs/c/seed_1")]
    step = tmp_path / "runs/b/seed_1/step"

    def interrupt():
        while not (step.exists() and step.read_text() and (tmp_path / "runs/a/seed_1/step").exists()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(StoppedError, match="same command continues") as caught:
        run_all(runs, tmp_path, jobs=2, command=program(tmp_path))
    thread.join()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    took = [_seconds(tmp_path, run.name) for run in runs[:2]]
    assert all(0 < seconds <= time.monotonic() - begin for seconds in took)  # which a pilot counts, and who goes on
    reached = int(step.read_text())
    time.sleep(0.1)
    assert int(step.read_text()) == reached  # nothing goes on
    for run in runs:
        run.steps = reached + 5
    assert len(run_all(runs, tmp_path, jobs=2, command=program(tmp_path)).finished) == 3
    assert [_starts(tmp_path, run.name) for run in runs] == [2, 2, 1]
    assert all(_seconds(tmp_path, run.name) > seconds for run, seconds in zip(runs, took, strict=False))


def test_a_run_that_heard_the_signal_too_has_not_failed(tmp_path, capsys):
    """SLURM sends it to every process of a job at once, and one that loads its libraries ends before the study does."""
    tells = "import os, signal; os.kill(os.getppid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)"
    run = FakeRun("runs/a/seed_1")
    with pytest.raises(StoppedError):
        run_all([run], tmp_path, command=lambda _: [sys.executable, "-c", tells])
    assert "exit_code" not in json.loads(status_path(tmp_path, run.name, "json").read_text(encoding="utf-8"))
    assert "failed" not in capsys.readouterr().err


def test_a_signal_that_comes_as_the_last_run_ends_is_heard(tmp_path, monkeypatch):
    """It was lost, and the study went on to its tables."""
    show = lambda _, running: running or os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr("moebed.study.runner.StudyBar.show", show)
    with pytest.raises(StoppedError):
        run_all([FakeRun("runs/a/seed_1")], tmp_path, command=program(tmp_path))


def test_a_run_that_outlived_its_study_is_waited_for(tmp_path):
    """The process holds the lock itself, so a study that was killed outright cannot lead to a second one beside it."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/study')\n"
        "from study_runs import FakeRun, program\n"
        "from moebed.study.runner import run_all\n"
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "run_all([FakeRun('runs/a/seed_1', steps=150)], out, command=program(out))\n"
    )
    study = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    step = tmp_path / "runs/a/seed_1/step"
    while not step.exists():
        assert study.poll() is None
        time.sleep(0.01)
    study.kill()
    study.wait()
    outcome = run_all([FakeRun("runs/a/seed_1", steps=150)], tmp_path, command=program(tmp_path))
    assert outcome.finished == ["runs/a/seed_1"]
    assert _starts(tmp_path, "runs/a/seed_1") == 1


def test_the_status_file_keeps_config_and_last_words(tmp_path):
    run = FakeRun("runs/a/seed_1", behaviour="fails", identity={"seed": 1})
    run_all([run], tmp_path, command=program(tmp_path))
    record = json.loads((tmp_path / "status/runs/a/seed_1.json").read_text())
    assert record["identity"] == {"seed": 1}
    assert (record["exit_code"], record["said"]) == (1, "no space on the disk")


def test_a_run_of_another_process_is_waited_for_aloud(tmp_path, capsys):
    name = "runs/a/seed_1"
    path = status_path(tmp_path, name, "lock")
    path.parent.mkdir(parents=True)
    held = RunLock(path)
    threading.Timer(0.3, held.release).start()
    outcome = run_all([FakeRun(name)], tmp_path, command=program(tmp_path))
    assert outcome.finished == [name]
    assert capsys.readouterr().err.count(f"waiting: another process has {name}") == 1


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_a_study_says_so_and_goes_on(missing, tmp_path, capsys, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    kernel = SimpleNamespace(flock=unsupported, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(lock, "fcntl", None if missing == "module" else kernel)
    runs = [FakeRun(f"runs/a/seed_{seed}") for seed in (1, 2)]
    assert len(run_all(runs, tmp_path, command=program(tmp_path)).finished) == 2
    assert capsys.readouterr().err.count("has no locks") == 1
