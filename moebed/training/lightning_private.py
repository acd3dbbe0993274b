"""All of Lightning that has no public name and is reached from outside its classes: it is reached here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.connector import _PRECISION_INPUT as PrecisionName
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = [
    "PrecisionName",
    "check_validation",
    "consider_saved",
    "end_where_nothing_is_left_to_train",
    "forget_step_values",
    "handle_signals",
    "log_under",
    "rank_before_processes",
    "saves_by_clock",
    "started_by",
    "validates_by_clock",
    "validation_follows",
]


def rank_before_processes() -> int:
    """This process's rank by the environment, before a Trainer has said it; 0 where that says nothing."""
    return _get_rank() or 0


def forget_step_values(trainer: Trainer) -> None:
    """Reset what was logged of single steps: else it is logged once more where a run stops, under another's number."""
    for item in trainer.fit_loop.epoch_loop._results.values():
        if not item.meta.on_epoch:
            item.reset()


def started_by(trainer: Trainer) -> ClusterEnvironment:
    """What has started the run's processes, also where there is but one: of a strategy's public names it has none."""
    return trainer._accelerator_connector.cluster_environment


def handle_signals(trainer: Trainer, take_over: Callable[[], None], give_back: Callable[[], None]) -> None:
    """Have these be called in place of Lightning's own handling of signals, before a stage and whenever it ends.

    Lightning's handler of SIGTERM broadcasts, wherever its rank happens to be, and the ranks ask the first one for a
    SIGTERM before every micro-batch, and wait for its answer.
    """
    connector = trainer._signal_connector
    setattr(connector, "register_signal_handlers", take_over)  # noqa: B010
    setattr(connector, "teardown", give_back)  # noqa: B010
    setattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010


def end_where_nothing_is_left_to_train(trainer: Trainer, is_left: Callable[[], bool]) -> None:
    """Where a run goes on at its last step, and its end is left, do that: Lightning leaves it out with the steps."""
    loop = trainer.fit_loop
    run = loop.run

    def run_to_the_end() -> None:
        loop.setup_data()
        if not (is_left() and loop.skip):
            return run()
        loop.reset()
        loop.on_run_start()
        loop.on_run_end()

    setattr(loop, "run", run_to_the_end)  # noqa: B010


def log_under(trainer: Trainer, step: int) -> None:
    """Have what is logged next stand under a step, from 0 on.

    Lightning counts the log's steps beside the optimizer's. Where a run goes on from a checkpoint that came after a
    validation, it counts that step again if it is one that is validated, and all that follow stand one too high.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def consider_saved(callback: ModelCheckpoint, step: int) -> None:
    """Have a callback take a step for one that it has saved."""
    callback._last_global_step_saved = step


def saves_by_clock(callback: ModelCheckpoint) -> bool:
    """Whether it has a ``train_time_interval``."""
    return callback._train_time_interval is not None


def validates_by_clock(trainer: Trainer) -> bool:
    """Whether ``val_check_interval`` is a time."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def validation_follows(trainer: Trainer) -> bool:
    """Whether the step that has just been done is validated next."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def check_validation(trainer: Trainer, check: Callable[[bool, bool], bool]) -> None:
    """Have ``check(is due, is amid a step's micro-batches)`` decide whether validation comes now."""
    loop = trainer.fit_loop.epoch_loop
    is_due = loop._should_check_val_fx

    def is_due_here(data_fetcher: Any) -> bool:
        is_amid = loop._should_accumulate()
        return check(is_due(data_fetcher), is_amid)

    setattr(loop, "_should_check_val_fx", is_due_here)  # noqa: B010
