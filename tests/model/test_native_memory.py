"""The compiled library touches no memory but its own: built with addresses checked, its tests find nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebed.model import native
from moebed.model.native import compiled

HERE = Path(__file__).parent
START = """
import sys
from moebed.model.native import compiled
compiled._COMMON = (*compiled._COMMON, "-O1", "-fsanitize=address")
"""
TESTS = START + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
# A call whose last row, given or made, or whose workspace's last line, is not there.
ROWS = """
import torch
from moebed.model.native import rowwise
given, made = map(int, sys.argv[1:])
rowwise.call("moebed_log_sums", torch.zeros(given, 16), torch.zeros(made), 8, 16, 0)
"""
WORKSPACE = """
import torch
from moebed.model.native import attention
invoke = compiled.invoke
compiled.invoke = lambda function, *rest: invoke(lambda *given: function(*given) - 64, *rest)
attention.causal_attention(*(torch.zeros(1, 48, 1, 16) for _ in range(3)), 1.0)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program in a process that checks addresses: its exit code, and what was found."""
    if (reason := native.load()) is not None:
        pytest.skip(reason)
    # The first is to be loaded before all others, and looks for C++'s exceptions in the second.
    names = ("libasan.so", "libstdc++.so")
    commands = ([compiled.COMPILER, f"-print-file-name={name}"] for name in names)
    found = [subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip() for command in commands]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"the compiler has no {' or '.join(names)}")
    folder = tmp_path_factory.mktemp("checked")

    def program(text, *arguments):
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(found),
            "MOEBED_CACHE": str(folder / "cache"),
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder / 'report'}",
            "OMP_NUM_THREADS": "1",  # the last thread's part, beyond which something is noticed, is then the only one
        }
        process = subprocess.run([sys.executable, "-c", text, *arguments], env=environment, capture_output=True)
        reports = list(folder.glob("report.*"))
        said = "".join(each.read_text(encoding="utf-8") for each in reports)
        for each in reports:
            each.unlink()
        return process.returncode, said or (process.stdout + process.stderr).decode(errors="replace")

    return program


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (START + ROWS, ("8", "8"), None),
        (START + ROWS, ("7", "8"), "READ of size"),
        (START + ROWS, ("8", "7"), "WRITE of size"),
        (START + WORKSPACE, (), "WRITE of size"),
    ],
)
def test_what_is_beyond_is_noticed(run, program, arguments, words):
    code, said = run(program, *arguments)
    assert (code == 0) == (words is None), said
    assert (words or "") in said


def test_its_tests_touch_nothing_else(run):
    """The one that is left out compiles anew, for a machine that is made smaller."""
    files = sorted(str(path) for path in HERE.glob("test_native_*.py") if path != Path(__file__))
    options = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "not environment_that_limits")
    code, said = run(TESTS, *options, *files)
    assert code == 0, said
