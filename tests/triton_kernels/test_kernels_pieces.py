"""Pieces of crowded experts by hand: how many, how large, which rows, and what is added."""

import pytest
import torch
from kernels_interpreted import configs, interpreter, pieces, shuffled  # noqa: F401

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "tiles", "most"),
    [(2**20, 10, 13), (2**20, 132, 1), (2**20, 133, 0), (3 * 4096 - 1, 10, 2), (4095, 1, 0)],
)
def test_pieces_are_no_more_than_fill_the_device_and_no_smaller_than_serves(monkeypatch, rows, tiles, most):
    monkeypatch.setattr(pieces, "processors", lambda device: 132)
    assert pieces.most_pieces(rows, tiles, CPU, configs.HOPPER) == most


@pytest.mark.parametrize("most", [1, 2, 7])
def test_sizes_are_those_of_the_most_pieces_that_loads_can_make(monkeypatch, most):
    """The worst loads: as many experts as there can be with one row more than a piece, each of which is two."""
    monkeypatch.setattr(pieces, "most_pieces", lambda *args: most)
    monkeypatch.setattr(pieces, "launch", lambda *args, **sizes: None)
    made = pieces.cut(torch.zeros(6, dtype=torch.int32), 10_000, 40, 3, configs.HOPPER.grad_up, configs.HOPPER)
    if most == 1:
        assert made is None
        return
    assert made.rows == {2: 5056, 7: 1472}[most]  # the least multiples of BK of which so many are all rows
    assert made.partial.shape == (2 * most, 40)
    assert made.unit_expert.shape == made.unit_start.shape == ({2: 8, 7: 12}[most],)  # 5 + P, to a multiple of 4
    assert made.first_slot.shape == (5,)


def test_pieces_and_their_sums_by_hand(shuffled, monkeypatch):  # noqa: F811
    """Experts of S rows, of two S, of none, and of a little more than S; in several steps of the scan."""
    monkeypatch.setattr(pieces, "most_pieces", lambda *args: 9)
    monkeypatch.setattr(pieces, "SCAN", 4)
    monkeypatch.setattr(pieces, "BLOCK", 16)
    loads = torch.tensor([0, 128, 256, 0, 129, 0, 130])
    offsets = loads.cumsum(0).to(torch.int32)
    made = pieces.cut(offsets, 643, 40, 1, configs.WeightTile(64, 64, 64), configs.INTERPRETED)
    assert made.rows == 128
    assert made.unit_expert.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5] + [-1] * 7
    assert made.unit_start[:9].tolist() == [0, 128, 256, 384, 384, 512, 513, 513, 641]
    assert made.first_slot.tolist() == [-1, 0, -1, 2, -1, 4]
    made.partial.copy_(torch.rand(18, 40))
    out = torch.full((6, 5, 8), 7.0)
    pieces.add(made, offsets, out)
    assert torch.equal(out[[0, 2, 4]], torch.full((3, 5, 8), 7.0))
    assert torch.equal(out[[1, 3, 5]].view(3, 40), made.partial[0:6:2] + made.partial[1:6:2])
