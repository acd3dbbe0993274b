"""What a run is asked to do at the end of a step, by signals and by the clock; its ranks agree on it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from moebed.machine import slurm
from moebed.machine.progress import say
from moebed.machine.termination import came_early, give_back, take_over
from moebed.training.leaving import LeavingTogether
from moebed.training.lightning_private import started_by

NOTHING, SAVE, END, REQUEUE = 0, 1, 2, 3  # of several the largest holds


class Requests:
    """SIGTERM, Ctrl-C and SLURM's signal before the time limit ask to end, the first rank's clock asks to save.

    Lightning acts within its signal handlers, each rank wherever it happens to be; ranks that are about to
    work together would then wait for each other forever. Here a handler takes a note, and the ranks agree on it at the
    end of a step. SLURM's signal (SIGUSR1, unless a SLURMEnvironment in trainer.plugins names another) also requeues
    the job; what came of it before the run began counts. A second Ctrl-C waits for nothing, nor does the first signal
    once the last step is saved, on all ranks together; in a job that was started to ignore it, Ctrl-C stays ignored.
    """

    def __init__(self) -> None:
        self._asked = NOTHING
        self._interrupted = False
        self._is_first_rank = True
        self._at_the_end = self._is_leaving = False
        self._together: LeavingTogether | None = None
        self._meanings: dict[int, int] = {}
        self._before: dict[int, Any] = {}
        self._agreed: tuple[torch.Tensor, Any] | None = None

    def take_over(self, trainer: Trainer) -> None:
        """Handle the signals from now on; where a run is not in the main thread, which alone may, nothing changes."""
        self._meanings = {signal.SIGTERM: END, signal.SIGINT: END}
        environment = started_by(trainer)
        own = environment if isinstance(environment, SLURMEnvironment) else None  # a person's, by trainer.plugins
        if slurm.job() is not None if own is None else own.auto_requeue:
            self._meanings[(own and own.requeue_signal) or signal.SIGUSR1] = REQUEUE  # SLURM is on Linux alone
        self._is_first_rank = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            self._before = {number: take_over(number, self._note) for number in self._meanings}
            self._asked = max([self._asked, *(self._meanings.get(number, NOTHING) for number in came_early())])

    def last_step_saved(self, trainer: Trainer) -> None:
        """What is left, such as the last validation and probing, is done when the run goes on: nothing waits for it."""
        if self._at_the_end:
            return
        if trainer.world_size > 1 and self._before:
            place = trainer.global_rank, trainer.world_size
            self._together = LeavingTogether(*place, self._meanings, self._last_words)
        self._at_the_end = True
        if self._asked >= END:  # since it came while that was written, or amid these lines
            os.kill(os.getpid(), self._number)

    def give_back(self, is_last: bool = False) -> None:
        """Give the signals back.

        Args:
            is_last: Of several ranks, whether this one has nothing more to do with the others.
        """
        if self._together is not None:
            self._together.stop(is_last)
        for number, handler in self._before.items():
            give_back(number, handler)
        self._before, self._together, self._at_the_end = {}, None, False

    def _note(self, number: int, _frame: Any) -> None:
        self._asked = max(self._asked, self._meanings[number])
        is_first, self._interrupted = not self._interrupted, self._interrupted or number == signal.SIGINT
        if self._at_the_end:
            agreed = self._together.wait() if self._together is not None else None
            raise SystemExit(self._last_words(agreed or number))
        if number == signal.SIGINT:
            if not is_first:
                raise KeyboardInterrupt
            _tell("ends with a checkpoint after this step; Ctrl-C again ends at once, without one")

    def _last_words(self, number: int) -> int:
        """With the last step saved, before it ends at once; returns its exit code."""
        self._interrupted |= number == signal.SIGINT
        is_first_time, self._is_leaving = not self._is_leaving, True
        if self._is_first_rank and is_first_time:
            _tell("the last step is saved; --ckpt_path last does what is left: validation, probes, report")
            self.requeue(self._meanings[number])
        return self.exit_code

    def requeue(self, asked: int) -> None:
        """What the first rank does last: put its SLURM job into the queue again, if it is to go on there.

        Also on a SIGTERM by which it makes room for another job: as it ends within its grace time, SLURM would not.
        """
        wanted = asked == REQUEUE or (asked == END and not self._interrupted and slurm.makes_room())
        if not wanted:
            return
        if (why := slurm.requeue()) is not None:
            rank_zero_warn(f"job {slurm.job()} could not be requeued ({why}); start it again by hand, it continues")
        else:
            _tell(f"job {slurm.job()} is in the queue again, and continues")

    @property
    def _number(self) -> int:
        """The signal that was noted, of several the one that asks for most."""
        asked = [number for number, meaning in self._meanings.items() if meaning == self._asked]
        return int(signal.SIGINT if self._interrupted and signal.SIGINT in asked else asked[0])

    @property
    def exit_code(self) -> int:
        """Of the first rank what a shell takes for a process that a signal ended: 130 of Ctrl-C, 143 of SIGTERM."""
        return 0 if not self._is_first_rank else 130 if self._interrupted else 143

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
