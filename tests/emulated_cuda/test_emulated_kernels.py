"""The steps of ``moebed check`` that launch kernels, as a GPU goes through them: every row, every candidate's tile."""

import json
import shutil

import pytest

from tests.emulated_cuda.test_emulated_cuda import python
from triton_kernels.configs import CANDIDATES
from triton_kernels.precision import interpreter_fault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the device"),
    pytest.mark.skipif(interpreter_fault() is not None, reason=str(interpreter_fault())),
]


def test_every_row_works_and_every_candidate_gives_what_the_shipped_tile_gives(tmp_path):
    """What is slow is the interpreter; sums over the same depth in other tiles differ by float32's rounding at most."""
    told = {"TRITON_INTERPRET": "1", "MOEBED_CACHE": str(tmp_path)}
    lines = python("-m", "tests.emulated_cuda.kernel_steps", **told).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert not [row for row in rows if row["verdict"] not in ("works", "slow")]
    assert {row["step"] for row in rows if row["verdict"] == "slow"} <= {"speed"}
    assert all(each["agrees"] for row in rows if row["step"] == "speed" for each in row["rows"] if each["difference"])
    candidates = CANDIDATES["hopper"]
    tried = {row["row"]: row["tried"] for row in rows if "tried" in row}
    assert {op: len(tiles) - 1 for op, tiles in tried.items()} == {op: len(tiles) for op, tiles in candidates.items()}
    assert all(tile["difference"] < 1e-3 for tiles in tried.values() for tile in tiles)
    (table,) = (row for row in rows if row["row"] == "the table")
    assert table["tiles"].keys() == candidates.keys()
    assert len(list((tmp_path / "expert_mlp_tiles").iterdir())) == 1
