"""The three ways to start a run of several processes, with two of them on a CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm_variables import task
from tests.small_run import small_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
FIT = ["-m", "moebed.cli", "fit"]


def two_ranks(folder: Path, **trainer) -> Path:
    trainer = {"strategy": "ddp", "devices": 2, **trainer}
    return write_recipe(folder, small_recipe(folder, trainer=trainer))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def slurm_tasks(command: list[str], folder: Path) -> list[subprocess.Popen]:
    """Two tasks as srun starts them, on one host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tasks = []
    for rank in range(2):
        variables = task(rank, per_node=2, nodes=1, SLURM_STEP_NODELIST="localhost")
        variables |= {"MASTER_PORT": port, "PATH": f"{folder}:{os.environ['PATH']}"}
        with open(folder / f"task{rank}.log", "a") as log:
            tasks.append(subprocess.Popen(command, env=environment(**variables), stdout=log, stderr=log))
    return tasks


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "run_summary.json").read_text())


@pytest.mark.slow
def test_three_ways_to_start_give_the_same_run(tmp_path):
    """trainer.devices, torchrun and SLURM: the same two ranks, so the same losses to the last bit."""
    found = {}
    for way in ("devices", "torchrun", "slurm"):
        folder = tmp_path / way
        folder.mkdir()
        path = two_ranks(folder)
        if way == "devices":
            run([PYTHON, *FIT, "--config", str(path), "--trainer.devices", "2"])
        elif way == "torchrun":
            torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            run([*torchrun, *FIT, "--config", str(path)])
        else:
            tasks = slurm_tasks([PYTHON, *FIT, "--config", str(path)], folder)
            codes = [task.wait(300) for task in tasks]
            assert codes == [0, 0], (folder / "task0.log").read_text()[-3000:]
        found[way] = {name: value for name, value in summary(folder).items() if "second" not in name}
        assert found[way]["step"] == 4
    assert found["devices"] == found["torchrun"] == found["slurm"]


@pytest.mark.slow
def test_slurm_signal_saves_and_requeues_and_the_run_goes_on(tmp_path):
    """What the sbatch script asks for: SIGUSR1 before the time limit, a checkpoint, scontrol requeue, continuation."""
    path = two_ranks(tmp_path, max_steps=100_000)
    requeued = tmp_path / "requeued"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {requeued}\n')
    scontrol.chmod(0o755)
    command = [PYTHON, *FIT, "--config", str(path), "--ckpt_path", "last"]
    tasks = slurm_tasks(command, tmp_path)
    try:
        _wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt", tasks)
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        assert [task.wait(120) for task in tasks] == [143, 0]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert requeued.read_text().split() == ["requeue", "12345"]
    import torch

    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert step > 0
    tasks = slurm_tasks([*command, "--trainer.max_steps", str(step + 3)], tmp_path)
    assert [task.wait(300) for task in tasks] == [0, 0], (tmp_path / "task0.log").read_text()[-3000:]
    assert summary(tmp_path)["step"] == step + 3
    assert "continuing the run" in (tmp_path / "task0.log").read_text()


def _wait_for(path: Path, tasks: list[subprocess.Popen]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert all(task.poll() is None for task in tasks), f"a task ended before {path.name} was there"
        time.sleep(0.1)
    raise AssertionError(f"{path.name} did not come")
