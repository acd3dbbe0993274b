"""Steps that are not finite: how many are skipped, what is said of where it began, and what is forgotten after it."""

from types import SimpleNamespace

import pytest
import torch

from moebed.errors import DivergedError
from moebed.training.not_finite import MOST_IN_A_ROW, NotFinite

NAN, FINITE = torch.tensor(float("nan")), torch.tensor(1.0)
TRAINER = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True, global_step=7, precision_plugin=None)


def test_ten_in_a_row_are_too_many():
    """A finite step between begins the count again."""
    watcher = NotFinite("skip", [])
    for _ in range(2):
        assert not watcher.skips(TRAINER, FINITE)
        assert all(watcher.skips(TRAINER, NAN) for _ in range(MOST_IN_A_ROW - 1))
    with pytest.raises(DivergedError, match="the loss is finite but the gradient's norm is nan, at step 7; lower"):
        watcher.skips(TRAINER, NAN)


def test_the_last_loss_that_is_not_finite_says_where_it_began(capsys):
    watcher = NotFinite("skip", [1, 4, 6])
    inf = FINITE / 0
    for loss, z_losses in ((NAN, [NAN, NAN, NAN]), (inf, [FINITE, inf, inf]), (FINITE, [FINITE] * 3)):
        watcher.watch(loss, z_losses)
    assert watcher.skips(TRAINER, NAN)
    assert (
        capsys.readouterr().err == "step 7 is skipped: the loss is inf, first seen at the router of layer 4 on rank 0\n"
    )
    watcher.watch(NAN, [FINITE] * 3)
    watcher.skips(TRAINER, NAN)
    assert "the loss is nan, first seen after the last router on rank 0" in capsys.readouterr().err
    watcher.skips(TRAINER, NAN)  # nothing was watched since
    assert "the loss is finite" in capsys.readouterr().err
    dense = NotFinite("stop", [])
    dense.watch(NAN, [])
    with pytest.raises(DivergedError, match="the loss is nan, in a model without routers on rank 0, at step 7"):
        dense.skips(TRAINER, NAN)
