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
        self.asked, self.placed = Counter(), Counter()

    def num_bytes(self, part):
        self.asked[part.name] += 1
        return part.rows * part.columns * 4

    def stored_bytes(self, part):
        return part.rows * part.columns

    def dtype(self, part):
        return torch.float32

    def place(self, part):
        self.placed[part.name] += 1
        return "file", int(part.name), 0

    def cached(self, part):
        return None

    def read_into(self, part, out):
        out.zero_()

    def require_finite(self, part, values):
        pass


def pieces_of(checkpoint, count):
    return [Piece(checkpoint, TensorPart(str(number), (1, 64), 0, 1)) for number in range(count)]


@pytest.mark.parametrize("budget", [8 * 64 * 4, 1 << 20], ids=["some fit", "all fit"])
def test_entering_every_group_asks_for_each_piece_a_few_times(budget):
    checkpoint = _Counted()
    plan = [[piece] for piece in pieces_of(checkpoint, 400)]
    pool = WeightPool(plan, budget)
    for number, [piece] in enumerate(plan):
        pool.enter(number)
        pool.get(piece)
        assert pool.most <= pool.limit
    pool.close()
    assert max(checkpoint.asked.values()) < 60
    assert max(checkpoint.placed.values()) < 5


def test_what_is_told_is_what_is_done_with_not_what_is_read():
    """A group's bytes are read before the work on it, of which nothing is done then."""
    done = []
    pieces = pieces_of(_Counted(), 4)
    pool = WeightPool([pieces[:2], pieces[2:3], pieces[3:]], 1 << 20, done.append)
    for number, group in enumerate(pool.plan):
        pool.enter(number)
        for piece in group:
            pool.get(piece)
    pool.enter(0)  # what is asked for again takes nothing back
    pool.close()
    assert done == [0, 128, 192, 192]
    assert pool.total == 256


def test_what_follows_is_read_ahead_once_and_kept_until_its_last_group():
    checkpoint = _Read()
    one, two, three = pieces_of(checkpoint, 3)
    pool = WeightPool([[one], [two], [one, three], [one]], 1 << 20)
    for number, wanted in enumerate(([one], [two], [three, one], [one])):
        pool.enter(number)
        for piece in wanted:
            pool.get(piece)
    pool.close()
    assert checkpoint.read == Counter("012")


def test_after_a_group_that_takes_all_room_the_next_ones_are_read_ahead_again():
    checkpoint = _Read()
    pieces = pieces_of(checkpoint, 9)
    pool = WeightPool([pieces[:1], pieces[3:], pieces[1:2], pieces[2:3]], 6 * 64 * 4)
    assert [pool.fits(number) for number in range(4)] == [True, False, True, True]
    pool.enter(0)
    pool.enter(1)
    for piece in pieces[3:]:
        pool.get(piece)  # each takes the room of one that was read ahead
    pool.enter(2)
    assert checkpoint.two_again.wait(10)
    pool.close()


class _Read(_Counted):
    """Counts how often each is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.two_again = Counter(), threading.Event()

    def read_into(self, part, out):
        self.read[part.name] += 1
        if self.read["2"] > 1:
            self.two_again.set()
        out.zero_()


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
