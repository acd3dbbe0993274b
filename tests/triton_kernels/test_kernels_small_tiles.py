"""The kernels of large GPUs in tiles so small that a product has several tiles either way, and a group is not whole.

In the tiles that ship, a matrix of a size that the interpreter can take has one column of tiles, or two.
"""

import dataclasses

import pytest
import torch
from kernels_interpreted import configs, errors, interpreter, make_case, op, shuffled  # noqa: F401

OPS = ("up", "down", "grad_hidden", "grad_rows")
SMALL = {"columns": 32, "depth": 32, "group": 4}


@pytest.mark.parametrize("name", ["hopper", "hopper sorted"])
def test_several_tiles_either_way(shuffled, monkeypatch, name):  # noqa: F811
    config = configs.BY_NAME[name]
    tiles = {op: dataclasses.replace(getattr(config, op), **SMALL) for op in OPS}
    small = dataclasses.replace(config, rows=32, gather_rows=32, gather_columns=32, **tiles)
    monkeypatch.setattr(op, "choose", lambda *device: small)
    index = torch.tensor([[0, 1]] * 25 + [[0, 2]] * 15 + [[1, 2]] * 10)  # two, two and one tile of rows
    assert max(errors(make_case(50, 3, 2, 72, 40, index=index))) < 2e-6
