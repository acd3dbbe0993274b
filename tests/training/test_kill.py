"""A run that is killed at any moment goes on as if it had never stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
KILLS = 6
LEAST_KILLS = 3  # a fast machine may have ended its run before the last ones


def _recipe(folder: Path, name: str) -> Path:
    content = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    content["trainer"] |= {
        "default_root_dir": str(folder / name),
        "max_steps": STEPS,
        "val_check_interval": 15,
        "enable_progress_bar": False,
    }
    content["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 10, "num_sequences": 3}
    content["checkpoint"]["every_n_train_steps"] = 3
    content["model"]["config"] |= {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 64}
    content["data"] |= {"sequence_length": 64, "max_validation_windows": 4, "cache_dir": str(folder / "cache")}
    content["data"]["sources"] = [{"name": domain, "max_bytes": 200_000} for domain in ("code", "prose", "math")]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "moebed.cli", "fit", "--config", str(path), "--ckpt_path", "last"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _wait_for_a_checkpoint(path: Path, process: subprocess.Popen) -> None:
    """Return when this process has written one; the moment of the kill after that is random, saving included."""
    before = path.stat().st_mtime_ns if path.exists() else None
    for _ in range(6000):
        if process.poll() is not None or (path.exists() and path.stat().st_mtime_ns != before):
            return
        time.sleep(0.01)
    raise AssertionError("no checkpoint within a minute")


def _curve(run: Path, tag: str) -> dict[int, float]:
    """The last value written for each step; a resumed run writes the steps after its checkpoint once more."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for file in sorted((run / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values


def _probes(run: Path) -> str:
    return (run / "results" / "history.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_runs_continue_bit_for_bit(tmp_path):
    whole = _start(_recipe(tmp_path, "whole"))
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    draw, path, run = random.Random(0), _recipe(tmp_path, "killed"), tmp_path / "killed"
    for kills in range(KILLS):
        process = _start(path)
        _wait_for_a_checkpoint(run / "checkpoints" / "last.ckpt", process)
        time.sleep(draw.uniform(0.0, 0.5))
        if process.poll() == 0:
            assert kills >= LEAST_KILLS
            break
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = _start(path)
    assert last.wait(timeout=300) == 0, last.stderr.read()
    for tag in ("train/loss", "train/grad_norm", "train/load_balancing_loss", "val/bits_per_byte"):
        expected = _curve(tmp_path / "whole", tag)
        assert len(expected) >= 2
        assert _curve(run, tag) == expected
    assert len(_curve(run, "train/loss")) == STEPS
    assert _probes(run) == _probes(tmp_path / "whole")
