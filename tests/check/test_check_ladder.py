"""The ladder with planted steps: nothing that one does stops the next, and what is kept is not measured again."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from moebed.check import command, ranks, runner, table, worker
from moebed.check.contract import Finding, Found, Place, Row, Verdict
from moebed.check.record import Record
from moebed.cli import main
from tests.check import faulty, planted, tuning, waiting
from tests.test_architecture import ROOT

IDENTITY = {"gpu": None, "gpus": 0, "cores": 2, "versions": {"torch": "2.13.0"}, "source": "s"}


@pytest.fixture
def counts(tmp_path, monkeypatch):
    folder = tmp_path / "counts"
    folder.mkdir()
    monkeypatch.setenv("PLANTED_COUNTS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "find_identity", lambda: IDENTITY)
    return lambda: {path.name: len(path.read_text()) for path in folder.iterdir()}


def climb(out, module=planted, minutes=8.0, **options):
    return runner.climb(module.__name__, module.LADDER, out, minutes, **options)


def verdicts(record):
    return {each.name: each.verdict for each in record.all_findings()}


@pytest.fixture
def climbed(tmp_path, counts, capsys):
    records = climb(tmp_path / "out", minutes=5.0)
    return tmp_path / "out", records, counts, capsys.readouterr().err


def test_no_step_stops_the_next(climbed):
    out, records, counts, said = climbed
    assert verdicts(records["good"]) == {
        "first": Verdict.WORKS, "second": Verdict.WORKS, "on a GPU": Verdict.NOT_RUN,
    }  # fmt: skip
    assert records["good"].findings["on a GPU"].said == "no GPU"

    crash = records["crashes"].findings["crash"]
    assert crash.verdict == Verdict.WRONG
    assert "SIGSEGV" in crash.said
    assert verdicts(records["crashes"])["behind"] == Verdict.WORKS

    hang = records["hangs"].findings["hang"]
    assert hang.verdict == Verdict.SLOW
    assert re.fullmatch(r"had not ended after \d+ s, and was ended", hang.said)
    assert verdicts(records["hangs"])["after the hang"] == Verdict.WORKS

    raised = records["raises"].findings
    assert (raised["value"].verdict, raised["value"].said) == (Verdict.WRONG, "ValueError: no such value")
    assert "planted.py" in raised["value"].figures["traceback"]
    assert (raised["words"].verdict, raised["words"].said) == (Verdict.WRONG, "do this instead")
    assert (raised["absent"].verdict, raised["absent"].said) == (Verdict.NOT_RUN, "scipy is not installed")
    assert raised["own"].verdict == Verdict.WRONG
    assert (raised["not here"].verdict, raised["not here"].said) == (Verdict.NOT_RUN, "needs two GPUs")
    assert raised["not a number"].figures == {"rate": "nan"}

    (dead,) = records["dies_at_once"].all_findings()
    assert dead.verdict == Verdict.WRONG
    assert "exit code 9" in dead.said
    (refused,) = records["refuses"].all_findings()
    assert (refused.verdict, refused.said) == (Verdict.NOT_RUN, "Triton cannot interpret")
    (absent,) = records["on_gpus"].all_findings()
    assert (absent.verdict, absent.said) == (Verdict.NOT_RUN, "no GPU")
    assert records["uses_found"].findings["second"].said == "beside 3.0"
    assert "good: 2 works, 1 not run, in" in said

    before = counts()
    again = climb(out)
    assert {name: verdicts(record) for name, record in again.items()} == {
        name: verdicts(record) for name, record in records.items()
    }
    assert counts() == before  # nothing was measured twice, and dies_at_once was tried again


def test_what_was_measured_elsewhere_is_measured_again(tmp_path, counts, monkeypatch):
    chosen = {"only": ["good"]}
    climb(tmp_path / "out", **chosen)
    climb(tmp_path / "out", **chosen)
    assert counts() == {"first": 1, "second": 1}
    monkeypatch.setattr(runner, "find_identity", lambda: {**IDENTITY, "source": "another"})
    climb(tmp_path / "out", **chosen)
    assert counts() == {"first": 2, "second": 2}
    climb(tmp_path / "out", fresh=True, **chosen)
    assert counts() == {"first": 3, "second": 3}


def test_a_damaged_record_is_measured_again(tmp_path, counts):
    climb(tmp_path / "out", only=["good"])
    path = worker.record_path(tmp_path / "out", "good")
    path.write_text(path.read_text()[:-40])
    assert climb(tmp_path / "out", only=["good"])["good"].is_complete
    assert counts()["first"] == 2


def test_what_the_time_leaves_over_is_said_and_comes_the_next_time(tmp_path, counts, monkeypatch):
    monkeypatch.setenv("PLANTED_SECONDS", "600")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    records = climb(tmp_path / "out", waiting, minutes=0.15, only=["waits"])  # 9 s, all for the one that is asked for
    found = {each.name: each for each in records["waits"].all_findings()}
    assert found["quick"].verdict == Verdict.WORKS
    assert {found[name].verdict for name in ("long", "last")} == {Verdict.NOT_RUN}
    assert re.fullmatch(r"had not ended after \d s, as the step's 9 s were over; the same .*", found["long"].said)
    assert found["last"].said == "the step's 9 s were over; the same command goes on"
    log = (tmp_path / "out" / "logs" / "waits.log").read_text()
    assert "planted.py" in log  # where it was
    assert not list(tmp_path.glob("moebed_check_*"))  # folders of its rows
    monkeypatch.setenv("PLANTED_SECONDS", "0")
    assert climb(tmp_path / "out", waiting, only=["waits"])["waits"].is_complete
    assert counts() == {"quick": 1, "long": 1, "last": 1, "begun": 0}


def test_no_time_is_a_reason(tmp_path, counts):
    records = climb(tmp_path / "out", minutes=0.01)
    (finding,) = records["good"].all_findings()
    assert (finding.verdict, finding.said) == (
        Verdict.NOT_RUN,
        "too little time was left (0 s); the same command goes on",
    )
    assert counts() == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_and_continued(tmp_path, counts, monkeypatch, number):
    """The step's process ends with the one that started it; rows that had ended are kept."""
    monkeypatch.setenv("PLANTED_SECONDS", "600")
    code = (
        # A job in the background ignores Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from pathlib import Path; from moebed.check import runner; from tests.check import waiting;"
        f"runner.find_identity = lambda: {IDENTITY};"
        "runner.climb('tests.check.waiting', waiting.LADDER, Path(sys.argv[1]), 8.0)"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while "begun" not in counts():
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=30)
    end = time.monotonic() + 10
    while _workers(out):
        assert time.monotonic() < end, "a step's process outlives the check"
        time.sleep(0.05)
    monkeypatch.setenv("PLANTED_SECONDS", "0")
    records = climb(out, waiting)
    assert all(record.is_complete for record in records.values())
    assert counts() == {"first": 1, "second": 1, "quick": 1, "long": 1, "last": 1, "begun": 0}


def _workers(out):
    """Processes of steps of this check."""
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "moebed.check.worker" in line and str(out) in line]


def test_a_fresh_process_measures_on_where_cuda_gives_nothing_but_errors(tmp_path, monkeypatch):
    import torch

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert worker.work(planted.step("good"), Record(tmp_path / "without", {"gpus": 1}), tmp_path, 0.0) == 0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # a process that has asked nothing of it is well
    record = Record(tmp_path / "r.json", {"gpus": 1})
    step = planted.step("good")
    assert worker.work(step, record, tmp_path, 0.0) == worker.AGAIN
    assert list(record.findings) == ["first"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert worker.work(step, Record.load(record.path, None), tmp_path, 0.0) == 0
    assert Record.load(record.path, {"gpus": 1}).is_complete


def test_a_wrong_kernel_is_found(tmp_path, counts, monkeypatch, capsys):
    """The planted fault, from the interpreter to the exit code."""
    from triton_kernels.precision import interpreter_fault

    if (fault := interpreter_fault()) is not None:
        pytest.skip(fault)
    monkeypatch.setattr(command, "LADDER", faulty.LADDER)
    monkeypatch.setattr(command, "MODULE", faulty.__name__)
    out = tmp_path / "out"
    assert main(["check", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "2 wrong (wrong_kernels, T 100" in said.err
    assert "largest difference 5.0e-02 of" in said.out.replace("\n", "")
    page = (out / "check.md").read_text()
    assert "## wrong_kernels: 2 wrong" in page


@pytest.mark.slow
@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_fastest_right_tiles_go_into_the_table_once_the_kernels_are_right(tmp_path, counts, monkeypatch, is_wrong):
    import triton

    from triton_kernels import tuned
    from triton_kernels.configs import INTERPRETED
    from triton_kernels.precision import interpreter_fault

    if (fault := interpreter_fault()) is not None:
        pytest.skip(fault)
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path / "cache"))
    if is_wrong:
        monkeypatch.setenv("PLANTED_WRONG", "1")
    found = climb(tmp_path / "out", tuning)["tunes"].findings
    assert found["up"].verdict == Verdict.WORKS
    assert "0.500 of the shipped tile's time, of 3 tiles; 1 refused" in found["up"].said
    assert found["up"].figures["chosen"]["columns"] == 32
    assert "out of resource" in found["up"].figures["tried"][2]["error"]
    assert found["down"].figures["chosen"] is None  # as fast is not faster
    assert (found["grad_hidden"].verdict, found["grad_hidden"].said) == (
        Verdict.NOT_RUN, "no candidates for interpreted",
    )  # fmt: skip
    assert found["a wrong one"].verdict == Verdict.WRONG
    assert found["a wrong one"].figures["chosen"]["columns"] == 32  # not the fastest of all, which is wrong
    tuned.tuned.cache_clear()
    kept = tuned.tuned(INTERPRETED, "Planted GPU", triton.__version__)
    tuned.tuned.cache_clear()
    if is_wrong:
        assert found["the table"].verdict == Verdict.WRONG
        assert kept == INTERPRETED
    else:
        assert found["the table"].verdict == Verdict.WORKS, found["the table"].said
        assert kept == dataclasses.replace(INTERPRETED, up=dataclasses.replace(INTERPRETED.up, columns=32))


def test_the_page_and_the_table_say_everything(tmp_path, capsys):
    records = {step.name: Record(tmp_path / step.name, IDENTITY) for rung in planted.LADDER for step in rung}
    records["good"].names = ["first", "of | two", "third"]
    records["good"].findings = {
        "first": Finding("first", Verdict.WORKS, "is well", {}, 1.25),
        "of | two": Finding("of | two", Verdict.WRONG, "[red]1.5 off"),
    }
    records["good"].stopped, records["good"].start_seconds = "the time was over", 14.26
    records["crashes"].stopped, records["crashes"].is_broken = "it died", True
    records["hangs"].names, records["hangs"].stopped = [f"row {number}" for number in range(20)], "over"
    records["hangs"].findings = {"row 0": Finding("row 0", Verdict.WORKS, "is well")}
    table.show(planted.LADDER, records)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "wrong: of | two: [red]1.5 off",
        "not run: third: the time was over",
        "wrong: it died",
        "not asked for",
        f"not run: {'; '.join(f'row {number}' for number in range(1, 13))}; and 7 more, in check.md: over",
    ):
        assert words in shown
    page = table.write_page(planted.LADDER, records, tmp_path).read_text()
    for line in (
        "Does good end? 14.3 s until its first row began, 1.2 s for the rows that ended.",
        "Does crashes end?",
        "| first | works | is well | 1.25 |",
        "| of \\| two | wrong | [red]1.5 off |  |",
        "| third | not run | the time was over |  |",
        "| all | wrong | it died |  |",
        "## good: 1 works, 1 wrong, 1 not run",
        "- versions: torch 2.13.0",
    ):
        assert line in page.splitlines(), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "--minutes is '0'; give a number above 0"),
        (["--only", "nothing"], "--only nothing: choose among machine, kernels_bfloat16"),
        (["--out", __file__], "cannot be written (Not a directory)"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys):
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_two_checks_do_not_share_a_folder(tmp_path, capsys):
    from moebed.study.lock import RunLock

    lock = RunLock(tmp_path / ".lock")
    try:
        assert main(["check", "--out", str(tmp_path)]) == 2
    finally:
        lock.release()
    assert "is at work in" in capsys.readouterr().err


def test_an_installation_that_cannot_be_looked_at_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false" if os.path.exists("/bin/false") else "/usr/bin/false")
    assert main(["check", "--out", str(tmp_path)]) == 2
    assert "this machine cannot be looked at" in capsys.readouterr().err


def test_the_real_ladder_can_be_found_and_fits_its_minutes():
    names = [step.name for rung in command.LADDER for step in rung]
    assert len(set(names)) == len(names)
    assert sum(max(step.seconds for step in rung) for rung in command.LADDER) == pytest.approx(480)
    for rung in command.LADDER:
        for step in rung:
            assert step.row_seconds <= step.seconds
            module, _, function = step.rows.partition(":")
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            assert f"def {function}(place: Place)" in path.read_text(), step.name


def test_a_record_is_plain_data(tmp_path):
    record = Record(tmp_path / "r.json", {"gpus": 0})
    record.names = ["a"]
    record.end(Finding("a", Verdict.WORKS, "so", {"x": float("inf"), "y": (1, 2), "z": object}))
    kept = json.loads(record.path.read_text())
    assert kept["findings"][0]["figures"]["x"] == "inf"
    assert kept["findings"][0]["figures"]["y"] == [1, 2]
    assert Record.load(record.path, {"gpus": 0}).is_complete
    assert not Record.load(record.path, {"gpus": 1}).names


def test_rows_that_need_more_gpus_are_not_called_and_said_before_any_is(tmp_path):
    row = Row("x", lambda: pytest.fail("called"), gpus=2)
    found = [worker.measure(row, Place("cuda", gpus, tmp_path, {})) for gpus in (0, 1)]
    assert [(each.verdict, each.said) for each in found] == [
        (Verdict.NOT_RUN, "no GPU"), (Verdict.NOT_RUN, "needs 2 GPUs, has 1"),
    ]  # fmt: skip
    assert worker.measure(Row("y", lambda: Found("z")), Place("cpu", 0, tmp_path, {})).said == "z"
    record = Record(tmp_path / "r.json", {"gpus": 0})
    assert worker.work(planted.step("good"), record, tmp_path, time.time() - 9) == 0
    assert list(record.findings) == ["on a GPU", "first", "second"]
    assert [each.name for each in record.all_findings()] == ["first", "second", "on a GPU"]
    assert 9 <= Record.load(record.path, {"gpus": 0}).start_seconds < 60


@pytest.mark.parametrize(("gpus", "measured"), [(1, 2), (2, 5), (4, 10)])
def test_layouts_are_measured_as_far_as_there_are_gpus(tmp_path, gpus, measured):
    rows = ranks.rows(Place("cuda", gpus, tmp_path, {}))
    assert sum(row.gpus <= gpus for row in rows) == measured


@pytest.mark.parametrize("module", ["command", "ranks"])  # the check's own process, and one that waits for ranks
def test_nobody_imports_torch_but_who_measures(module):
    code = f"import sys, moebed.check.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
