"""A run that is asked to end writes a checkpoint first, all ranks at the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_NOTHING, _END, _REQUEUE = 0, 1, 2


class Termination(Callback):
    """On SIGTERM, and on SLURM's signal before the time limit, end at the next step with a checkpoint.

    Lightning acts within its signal handlers, each rank wherever it happens to be; ranks that are about to
    work together would then wait for each other forever. Here a handler takes a note, and the ranks agree on it at the
    end of a step. SLURM's signal (Lightning's SLURMEnvironment names it, or it is SIGUSR1) also requeues the job.

    The run ends with exit code 143, and ``--ckpt_path last`` continues it.
    """

    def __init__(self) -> None:
        self._asked = _NOTHING
        self._lightnings: dict[int, Any] = {}
        self._agreed: tuple[torch.Tensor, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning."""
        wanted = {signal.SIGTERM: _END}
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            wanted[environment.requeue_signal or signal.SIGUSR1] = _REQUEUE  # SLURM is on Linux alone
        for number, meaning in wanted.items():
            self._lightnings[number] = signal.getsignal(number)
            signal.signal(number, lambda *_, meaning=meaning: setattr(self, "_asked", max(self._asked, meaning)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End here if a rank was asked to; with several ranks, they learn of it one step later."""
        asked = self._asked if trainer.world_size == 1 else self._agree(pl_module.device)
        if asked == _NOTHING or trainer.global_step == trainer.max_steps:  # the last step ends the run by itself
            return
        self._restore()
        path = Path(trainer.checkpoint_callback.dirpath) / "last.ckpt"  # type: ignore[union-attr]
        trainer.save_checkpoint(path)
        rank_zero_info(f"stopped at step {trainer.global_step}, saved in {path}; --ckpt_path last continues")
        if asked == _REQUEUE and trainer.is_global_zero:
            requeue()
        raise SystemExit(143 if trainer.is_global_zero else 0)

    def _agree(self, device: torch.device) -> int:
        """What any rank was asked by the end of the step before; no rank waits for this step's answer."""
        asked = _NOTHING
        if self._agreed is not None:
            self._agreed[1].wait()
            asked = int(self._agreed[0])
        told = torch.tensor(self._asked, device=device)
        self._agreed = told, dist.all_reduce(told, op=dist.ReduceOp.MAX, async_op=True)
        return asked

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._lightnings.items():
            signal.signal(number, handler)
        self._lightnings = {}


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """End the process with exit code 143 on SIGTERM as soon as Python gets to act, whatever it is at."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: what is open is being closed
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def requeue() -> None:
    """Put this SLURM job, or this task of an array, into the queue again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(
            ["scontrol", "requeue", job], check=True, capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"job {job} could not be requeued ({error}); start it again by hand, it continues")
