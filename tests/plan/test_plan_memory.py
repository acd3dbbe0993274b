"""The plan's memory against a run of ``moebed fit`` in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebed.cli import main
from tests.small_run import made_up_text, small_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1536,
}


def large_recipe(folder: Path, trainer: dict, checkpointing: bool) -> Path:
    """A run of three steps of 88 M parameters."""
    content = small_recipe(
        folder,
        made_up_text(200),
        trainer={"max_steps": 3, "limit_val_batches": 0, "logger": False, **trainer},
        checkpoint={"every_n_train_steps": 1000, "save_last": False},
        config=MODEL,
        model={"activation_checkpointing": checkpointing},
        data={"sequence_length": 256, "batch_size": 3},
    )
    return write_recipe(folder, content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "checkpointing"),
    [
        ({"precision": "32-true"}, False),
        ({"precision": "bf16-mixed"}, False),
        ({"precision": "32-true"}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"precision": "32-true", "devices": 2, "strategy": "ddp"}, False),
    ],
)
def test_plan_is_what_a_run_takes(trainer, checkpointing, tmp_path, capsys):
    """What the C library hands out at the peak is within 5 % of the plan; what is resident, within 20 %.

    What the heap keeps of what is freed does not grow with the run: .2 to .4 GB here. Activation checkpointing is left
    out of the second: it then keeps more than that above what is in use, since the recomputed blocks' tensors of many
    sizes come and go among gradients that stay.
    """
    path = large_recipe(tmp_path, trainer, checkpointing)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--print_plan", "json"])
    planned = json.loads(capsys.readouterr().out)["peak_memory_total"]
    command = [sys.executable, str(Path(__file__).with_name("measure_fit.py")), str(tmp_path / "peak")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--config", str(path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(trainer.get("devices", 1)):
        measured = json.loads((tmp_path / f"peak.{rank}").read_text())
        print(f"{trainer} checkpointing {checkpointing} rank {rank}: plan {planned / 1e9:.3f} GB, measured", end=" ")
        print(", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in measured.items()))
        assert planned == pytest.approx(measured["in_use"], rel=0.05)
        assert planned <= 1.02 * measured["resident"]
        if not checkpointing:
            assert planned == pytest.approx(measured["resident"], rel=0.2)
