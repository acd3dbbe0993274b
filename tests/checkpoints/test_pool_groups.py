"""The pool's own work grows with the groups of a plan, not with their square, and is done once."""

import threading
from collections import Counter

import pytest
import torch

from moebed.checkpoints.families.keys import TensorPart
from moebed.checkpoints.pool import Piece, WeightPool
from moebed.errors import UserError


class _Counted:
    """A checkpoint of made-up pieces that counts how often their size is asked for."""

    def __init__(self) -> None:
        self.asked = Counter()

    def num_bytes(self, part):
        self.asked[part.name] += 1
        return part.rows * part.columns * 4

    def stored_bytes(self, part):
        return part.rows * part.columns

    def dtype(self, part):
        return torch.float32

    def place(self, part):
        return "file", int(part.name), 0

    def cached(self, part):
        return None

    def read_into(self, part, out):
        out.zero_()

    def require_finite(self, part, values):
        pass


def test_entering_every_group_asks_for_each_size_a_few_times():
    checkpoint = _Counted()
    plan = [[Piece(checkpoint, TensorPart(str(number), (1, 64), 0, 1))] for number in range(400)]
    pool = WeightPool(plan, 8 * 64 * 4)
    for number, [piece] in enumerate(plan):
        pool.enter(number)
        pool.get(piece)
        assert pool.most <= pool.limit
    pool.close()
    assert max(checkpoint.asked.values()) < 60


class _Mapped(_Counted):
    """Parts that are mapped; what is looked at, by which thread, and NaN in some."""

    def __init__(self, bad=()) -> None:
        super().__init__()
        self.bad, self.looks, self.begun, self.go = bad, [], threading.Event(), threading.Event()

    def cached(self, part):
        return torch.zeros(part.rows, 64)

    def require_finite(self, part, values):
        reader = threading.current_thread().name.startswith("moebed-reader")
        self.looks.append((part.name, reader))
        if reader:
            self.begun.set()
            self.go.wait(10)
        if part.name in self.bad:
            raise UserError(part.name)


def test_what_is_mapped_is_looked_at_once_by_two_threads():
    checkpoint = _Mapped(bad={"0", "2"})
    group = [Piece(checkpoint, TensorPart(str(number), (1, 64), 0, 1)) for number in range(4)]
    pool = WeightPool([group], 1 << 20)
    pool.enter(0)
    assert checkpoint.begun.wait(10)  # the reader is at the first
    for _ in range(2):
        pool.get(group[1])
        with pytest.raises(UserError, match="2"):
            pool.get(group[2])
    checkpoint.go.set()
    with pytest.raises(UserError, match="0"):
        pool.get(group[0])
    pool.get(group[3])
    pool.close()
    by_name = [name for name, _ in checkpoint.looks]
    assert by_name.count("1") == by_name.count("0") == by_name.count("3") == 1
    assert by_name.count("2") == 2  # an error is told as often as one asks
    assert {name for name, reader in checkpoint.looks if reader} >= {"0"}
    assert {name for name, reader in checkpoint.looks if not reader} >= {"1", "2"}
