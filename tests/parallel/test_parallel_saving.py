"""What is kept of a run's checkpoints, and when they are written."""

import pytest

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.sharded import is_sharded
from moebed.cli import main
from tests.parallel.forked import run
from tests.parallel.parallel_runs import curves, fit, recipe


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_best_are_kept_and_can_be_validated(tmp_path):
    """Folders of parts: the two of lowest loss and the last one, none of the others."""
    path, folder = recipe(tmp_path, 12), tmp_path / "run"
    best = ["--checkpoint.save_top_k", "2", "--checkpoint.monitor", "val/loss", "--checkpoint.every_n_train_steps", "3"]
    arguments, ranks = fit(path, folder, "EP-2", *best, "--trainer.val_check_interval", "3")
    run(arguments, ranks, tmp_path / "logs" / "fit")
    kept = sorted(file.name for file in (folder / "checkpoints").iterdir())
    losses = curves(folder)["val/loss"]
    wanted = sorted(losses, key=losses.get)[:2]
    assert kept == sorted(["last.ckpt", *(f"epoch=0-step={step + 1}.ckpt" for step in wanted)])
    assert all(is_sharded(folder / "checkpoints" / name) for name in kept)
    assert Checkpoint.open(folder / "checkpoints" / kept[0]).config.num_experts == 8
    last = str(folder / "checkpoints" / "last.ckpt")
    assert main(["export", last, "--out", str(tmp_path / "exported")]) == 0
    assert main(["probe", last, "--out", str(tmp_path / "probed"), "--probes", "gate_similarity"]) == 0
    validate = ["validate", *arguments[1:], "--ckpt_path", str(folder / "checkpoints" / kept[0])]
    for option in (*best[::2], "--trainer.val_check_interval"):
        at = validate.index(option)
        del validate[at : at + 2]
    said = run(validate, ranks, tmp_path / "logs" / "validate")
    assert "val/bits_per_byte" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_by_the_clock(tmp_path):
    path, folder = recipe(tmp_path, 40), tmp_path / "run"
    arguments, ranks = fit(path, folder, "1 process", "--checkpoint.train_time_interval", "0:00:01")
    run(arguments, ranks, tmp_path / "logs")
    assert (folder / "checkpoints" / "last.ckpt").is_file()
