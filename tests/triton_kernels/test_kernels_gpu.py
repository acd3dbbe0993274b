"""The kernels on a GPU: real bfloat16, the large tiles, sizes past 2^31, and what only a device can show.

The rows are those of ``moebed check``. Run with ``pytest -m gpu tests/triton_kernels`` on a machine with one.
"""

import functools
from pathlib import Path

import pytest
import torch

from moebed.check import kernels, launches
from moebed.check.contract import NotRun, Place, Verdict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device: torch sees none"),
]

PLACE = Place("cuda", 1, Path("."), {})
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def _kernels_alone(monkeypatch):
    monkeypatch.setenv("EXPERT_MLP_KERNELS", "require")


def _works(measure):
    try:
        found = measure()
    except NotRun as reason:
        pytest.skip(str(reason))
    assert found.verdict == Verdict.WORKS, found.said


@pytest.mark.parametrize("row", launches.rows(PLACE), ids=lambda row: row.name)
def test_gpu_launches(row):
    _works(row.measure)


@pytest.mark.parametrize("row", range(len(kernels.bfloat16(PLACE))), ids=lambda n: kernels.bfloat16(PLACE)[n].name)
@pytest.mark.parametrize("dtype", TYPES)
def test_gpu_rows_of_check(dtype, row):
    _works(kernels.rows_of(PLACE, TYPES[dtype])[row].measure)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("size", kernels.SIZES["cuda"], ids=str)
def test_gpu_values_and_gradients(size, activation, dtype):
    _works(functools.partial(kernels.values, "cuda", size, activation, TYPES[dtype]))
