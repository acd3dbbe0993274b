"""The pool's own work grows with the groups of a plan, not with their square."""

from collections import Counter

import torch

from moebed.checkpoints.families.keys import TensorPart
from moebed.checkpoints.pool import Piece, WeightPool


class _Counted:
    """A checkpoint of made-up pieces that counts how often their size is asked for."""

    def __init__(self) -> None:
        self.asked = Counter()

    def num_bytes(self, part):
        self.asked[part.name] += 1
        return part.rows * part.columns * 4

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
