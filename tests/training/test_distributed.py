"""Two processes train the run that one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from probes.registry import PROBES
from probes.running.tags import COST, is_of_probes

ROOT = Path(__file__).resolve().parents[2]


def is_probed(tag):
    """Whether a tag has what a probe found, which is the same in every layout, as times are not."""
    return is_of_probes(tag, PROBES) and not tag.startswith(f"{COST}/")


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "accumulate"), [("global", 1), ("window", 2)])
def test_two_processes_equal_one(scope, accumulate, tmp_path):
    """The same global batch, weights and data order: the same losses, balancing loss and validation, in float32.

    Of the window's scope even where the two accumulate what the one has at once.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = []
    for ranks, parts in ((1, 1), (2, accumulate)):
        content = yaml.safe_load((ROOT / "recipes" / "tiny_mixtral.yaml").read_text())
        run = tmp_path / f"ranks{ranks}"
        content["trainer"] |= {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp",
            "precision": 32,
            "accumulate_grad_batches": parts,
            "max_steps": 8,
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        }
        content["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 4, "num_sequences": 3}
        content["model"]["config"] |= {"hidden_size": 64, "router_aux_loss_scope": scope, "router_aux_loss_coef": 0.1}
        content["data"] |= {
            "sources": [{"name": domain, "max_bytes": 200_000} for domain in ("code", "prose", "math")],
            "sequence_length": 64,
            "batch_size": 4 // (ranks * parts),
            "max_validation_windows": 4,
            "cache_dir": str(tmp_path / "cache"),
        }
        path = tmp_path / f"{ranks}.yaml"
        path.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "moebed.cli", "fit", "--config", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("val/", "train/l")) or is_probed(tag)]
        curves.append({tag: [event.value for event in events.Scalars(tag)] for tag in tags})
    assert curves[0].keys() == curves[1].keys()
    assert {"train/loss", "train/load_balancing_loss", "val/bits_per_byte/math"} <= curves[0].keys()
    assert any(tag.startswith("norm_vs_score") for tag in curves[0])
    for tag, values in curves[0].items():
        tolerance = 1e-5 if tag.startswith(("train/", "val/")) else 1e-3
        assert curves[1][tag] == pytest.approx(values, rel=tolerance, abs=1e-5), tag
