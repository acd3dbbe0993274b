"""What a run is asked to do at the end of a step, by signals and by the clock; its ranks agree on it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from moebed.machine.progress import say
from moebed.machine.termination import take_over
from moebed.training.lightning_private import take_sigterm

NOTHING, SAVE, END, REQUEUE = 0, 1, 2, 3  # of several the largest holds


class Requests:
    """SIGTERM, Ctrl-C and SLURM's signal before the time limit ask to end, the first rank's clock asks to save.

    Lightning acts within its signal handlers, each rank wherever it happens to be; ranks that are about to
    work together would then wait for each other forever. Here a handler takes a note, and the ranks agree on it at the
    end of a step. SLURM's signal (Lightning's SLURMEnvironment names it, or it is SIGUSR1) also requeues the job. A
    second Ctrl-C waits for nothing, nor does the first signal of one process once the last step is saved; in a job that
    was started to ignore it, Ctrl-C stays ignored.
    """

    def __init__(self) -> None:
        self._asked = NOTHING
        self._interrupted = False
        self._at_the_end = False
        self._lightnings: dict[int, Any] = {}
        self._agreed: tuple[torch.Tensor, Any] | None = None

    def take_over(self, trainer: Trainer) -> None:
        """Take the signals over from Lightning."""
        wanted = {signal.SIGTERM: END, signal.SIGINT: END}
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            wanted[environment.requeue_signal or signal.SIGUSR1] = REQUEUE  # SLURM is on Linux alone
        for number, meaning in wanted.items():
            self._lightnings[number] = take_over(number, functools.partial(self._note, meaning))
        if take_sigterm(trainer):  # which came before training began, in a probing of the untrained model
            self._asked = max(self._asked, END)
        # Lightning has the ranks ask the first one for a SIGTERM before every micro-batch, and wait for its answer.
        setattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010

    def last_step_saved(self, trainer: Trainer) -> None:
        """What is left, such as the last validation and probing, is done when the run goes on: nothing waits for it."""
        self._at_the_end = trainer.world_size == 1
        if self._at_the_end and self._asked >= END:  # since it came while that was written
            self._leave(self._asked)

    def _note(self, meaning: int, number: int, _frame: Any) -> None:
        self._asked = max(self._asked, meaning)
        is_first, self._interrupted = not self._interrupted, self._interrupted or number == signal.SIGINT
        if self._at_the_end:
            self._leave(meaning)
        if number == signal.SIGINT:
            if not is_first:
                raise KeyboardInterrupt
            _tell("ends with a checkpoint after this step; Ctrl-C again ends at once, without one")

    def _leave(self, meaning: int) -> NoReturn:
        """End at once, with the last step saved."""
        _tell("the last step is saved; --ckpt_path last does what is left: validation, probes, report")
        if meaning == REQUEUE:
            requeue()
        raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """What a shell takes for a process that a signal ended: 130 of Ctrl-C, 143 of SIGTERM."""
        return 130 if self._interrupted else 143

    def give_back(self) -> None:
        """Give the signals back."""
        for number, handler in self._lightnings.items():
            signal.signal(number, handler)
        self._lightnings = {}

    def agreed(self, trainer: Trainer, device: torch.device, clock_asks: bool) -> int:
        """What is to be done at the end of this step; with several ranks, what any was asked by the end of the last.

        Args:
            trainer: All ranks call this once a step.
            device: Where this rank computes.
            clock_asks: Whether it is time to save; the first rank's clock holds.
        """
        own = max(self._asked, SAVE if clock_asks and trainer.is_global_zero else NOTHING)
        if trainer.world_size == 1:
            return own
        asked = NOTHING
        if self._agreed is not None:
            self._agreed[1].wait()
            asked = int(self._agreed[0])
        told = torch.tensor(own, device=device)
        self._agreed = told, dist.all_reduce(told, op=dist.ReduceOp.MAX, async_op=True)
        return asked


def _tell(text: str) -> None:
    with contextlib.suppress(RuntimeError):  # Python refuses to print where a signal came amid a print
        say(text)


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
