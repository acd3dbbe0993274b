"""NaN and Inf are found wherever they stand, in every type that a checkpoint has; nothing else is taken for them."""

import numpy as np
import pytest
import torch

from moebed.checkpoints.files import DTYPES
from moebed.machine import finite
from moebed.machine.finite import all_finite
from moebed.views.text_pass import require_finite

TYPES = [*DTYPES.values(), torch.float64]
INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), "-nan", "signalling"])
@pytest.mark.parametrize("rest", [0.0, -0.0, 1.0, -1.0, "max", "min", "tiny"])
def test_one_bad_number_is_found_among_any_others(dtype, bad, rest):
    rest = rest if isinstance(rest, float) else getattr(torch.finfo(dtype), rest)
    values = torch.full((3, 7), rest, dtype=dtype)
    assert all_finite(values)
    assert all_finite(-values)
    integer, infinity = INTEGERS[dtype], torch.tensor(float("inf"), dtype=dtype)
    if bad == "-nan":  # all bits
        wrong = torch.tensor(-1, dtype=integer).view(dtype)
    elif bad == "signalling":  # +Inf and the last bit
        wrong = (infinity.view(integer) + 1).view(dtype)
    else:
        wrong = torch.tensor(bad, dtype=dtype)
    assert not wrong.isfinite()
    for place in range(values.numel()):
        spoilt = values.clone()
        spoilt.view(-1)[place] = wrong
        assert not all_finite(spoilt), place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_all_numbers_of_16_bits_those_that_torch_says_are_found(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    found = torch.tensor([all_finite(one) for one in every.split(1)])
    assert torch.equal(found, every.isfinite())
    assert 0 < found.sum() < len(found)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_piece_of_a_large_tensor_is_looked_at(dtype):
    size = finite._CACHED_BYTES // dtype.itemsize
    values = torch.zeros(2 * size + 5, dtype=dtype)
    assert all_finite(values)
    for place in (0, size - 1, size, 2 * size - 1, 2 * size, 2 * size + 4):
        for bad in (np.nan, -np.inf):
            values[place] = bad
            assert not all_finite(values), place
        values[place] = 0
    assert all_finite(values)


def test_no_numbers_are_finite():
    assert all_finite(torch.empty(0, 3))
    assert not all_finite(torch.tensor(float("nan")))  # no axis


def test_numbers_that_do_not_follow_one_another():
    values = torch.ones(5, 6)[:, ::2].T
    assert all_finite(values)
    values[2, 3] = float("inf")
    assert not all_finite(values)


@pytest.mark.parametrize(
    "look", [all_finite, lambda values: require_finite(values, "these numbers")], ids=["weights", "text"]
)
def test_pytorchs_threads_take_no_part(look):
    """They wait for each other at the end of every operation, however small."""
    ran = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    values = torch.ones(4, 5, dtype=torch.bfloat16)
    with Watch():
        assert look(values) is not False
    assert set(ran) <= {"view", "detach", "alias"}
