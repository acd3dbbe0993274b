"""When a run saves, and validates: only where the optimizer has just stepped, whatever asks for it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moebed.errors import ConfigError, UserError
from moebed.machine import storage
from moebed.machine.progress import say
from moebed.training.leaving import EndingStartedRanks
from moebed.training.lightning_private import (
    check_validation,
    consider_saved,
    handle_signals,
    saves_by_clock,
    validates_by_clock,
    validation_follows,
)
from moebed.training.save_requests import END, SAVE, Requests

FOLDER = "checkpoints"  # in the run's folder


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints of a run; ``last.ckpt`` of a finished one, unless ``save_last`` is off, is the finished model.

    Between the micro-batches of a step a checkpoint would lose the gradients of those that came before, so every
    request waits for the step's end, and so does validation, at whose end other callbacks save. Files that are
    ranked or named by a metric are written after the validation of the very step that they are of: the first one,
    once they are due. On SIGTERM, on Ctrl-C, and on SLURM's signal before the time limit, the run saves
    ``last.ckpt`` whatever ``save_last`` says and ends, its first process with exit code 143, of Ctrl-C 130;
    ``--ckpt_path last`` continues it. A run whose last step is saved ends at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step = 0  # of the save point before
        self._is_between = False  # micro-batches of a step
        self._ranked_is_due = False
        self._validation_is_due = False  # since between the micro-batches of this step
        self._accumulated: int | None = None  # micro-batches of a step, in the checkpoint that is continued
        self._requests = Requests()

    # A run's parts ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where no folder is given, checkpoints lie in the run's own. In training alone a signal waits for one."""
        if self.dirpath is None:
            self.dirpath = os.path.realpath(Path(trainer.default_root_dir) / FOLDER)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            handle_signals(trainer, lambda: self._requests.take_over(trainer), self._requests.give_back)
        else:  # nothing of it is kept, so they end it at once
            ending = EndingStartedRanks(trainer)
            handle_signals(trainer, ending.take_over, ending.give_back)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make whole windows of the micro-batches to come."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                consider_saved(callback, trainer.global_step)  # not again amid the step to come
        check_validation(trainer, self._validates_now)
        if self._accumulated not in (None, trainer.accumulate_grad_batches):
            self._realign(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look what is asked for, if the optimizer has just stepped."""
        self._is_between = trainer.global_step == self._step
        if self._is_between:
            return
        self._step = trainer.global_step
        is_last_step = trainer.global_step == trainer.max_steps
        asked = self._requests.agreed(trainer, pl_module.device, self._clock_asks())
        by_steps = self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        if asked >= END:
            if by_steps:
                self._save_named(trainer)
            self._end(trainer, asked)
        if by_steps or asked >= SAVE:
            self._save(trainer)
        elif is_last_step and self.save_last:
            self._save_last(trainer)
        self._look_at_the_end(trainer)

    def _validates_now(self, is_due: bool, is_amid_step: bool) -> bool:
        """Validation that falls due between micro-batches comes at the end of their step."""
        self._validation_is_due |= is_due and is_amid_step
        return not is_amid_step and (is_due or self._validation_is_due)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was due comes now."""
        super().on_validation_start(trainer, pl_module)
        self._validation_is_due = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for this validation."""
        by_epochs = self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if self._is_between or self._should_save_on_train_epoch_end(trainer) or not _saves(trainer):
            return
        if self._ranked_is_due or (by_epochs and trainer.global_step > 0):
            self._save_ranked(trainer)
            self._save_last(trainer)
            self._look_at_the_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if epochs are what it is done by and no validation follows; an epoch ends with a step."""
        by_epochs = self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if by_epochs and self._should_save_on_train_epoch_end(trainer) and _saves(trainer):
            self._save_ranked(trainer)
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, whatever ended the run."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last(trainer)
        self._look_at_the_end(trainer, is_over=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing is saved: a step may be half done."""

    @contextmanager
    def ending_at_once(self, trainer: Trainer) -> Iterator[None]:
        """What comes after a run's training, for which nothing waits either if its last step is saved."""
        if not self._last_step_is_saved(trainer):
            yield
            return
        self._requests.take_over(trainer)
        self._requests.last_step_saved(trainer)
        try:
            yield
        finally:
            self._requests.give_back(is_last=True)

    # Saving -----------------------------------------------------------------------------------------------------------

    def _look_at_the_end(self, trainer: Trainer, is_over: bool = False) -> None:
        """From the moment on at which the last step is saved, nothing waits for what follows."""
        if self._last_step_is_saved(trainer) and (is_over or trainer.global_step == trainer.max_steps):
            self._requests.last_step_saved(trainer)

    def _last_step_is_saved(self, trainer: Trainer) -> bool:
        """Of a run that took no step nothing is: it begins with 0 as the step that was saved last."""
        return bool(self.save_last and trainer.global_step > 0 and self._last_global_step_saved == trainer.global_step)

    def _clock_asks(self) -> bool:
        interval, now = self._train_time_interval, time.monotonic()
        if interval is None or now - (self._last_time_checked or 0.0) < interval.total_seconds():
            return False
        self._last_time_checked = now
        return True

    def _save(self, trainer: Trainer) -> None:
        """A save is due: of files by name, and of ``last.ckpt`` now or with those that wait for a validation."""
        self._save_named(trainer)
        if not (self._ranked_is_due and validation_follows(trainer)):
            self._save_last(trainer)

    def _save_named(self, trainer: Trainer) -> None:
        """The step's file beside ``last.ckpt``: now, or where files are ranked once the step is validated."""
        if self._waits_for_validation(trainer):
            self._ranked_is_due = True
        elif self.save_top_k != 0 and _saves(trainer):
            self._save_ranked(trainer)

    def _waits_for_validation(self, trainer: Trainer) -> bool:
        """Whether there are files whose rank or name says how good they are."""
        names = set(re.findall(r"\{([^:}]+)", self.filename or ""))
        says = self.monitor is not None or not names <= {"epoch", "step"}
        return self.save_top_k != 0 and says and trainer.enable_validation

    def _save_ranked(self, trainer: Trainer) -> None:
        self._ranked_is_due = False
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last(self, trainer: Trainer) -> None:
        if not _saves(trainer):
            return
        if self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""  # nothing of this step that a link could point to
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _end(self, trainer: Trainer, asked: int) -> None:
        """Save and leave, all ranks at the same step."""
        if _saves(trainer):
            assert self.dirpath is not None
            path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(path)
            say(f"stopped at step {trainer.global_step}, saved in {path}; --ckpt_path last continues")
        if trainer.is_global_zero:
            self._requests.requeue(asked)
        raise SystemExit(self._requests.exit_code)

    # Names ------------------------------------------------------------------------------------------------------------

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """As ModelCheckpoint has it; a metric's name with a slash makes no folder, and one that is not there no 0.

        Raises:
            UserError: The name asks for a metric that is not logged.
        """
        template = filename or self.filename
        for name in re.findall(r"\{([^:}]+)", template or ""):
            if name not in metrics:
                known = ", ".join(sorted(metrics))
                raise UserError(f"checkpoint.filename asks for {name!r}, which is not logged; there are {known}")
            plain = name.replace("/", "_")
            template = (template or "").replace("{" + name, "{" + plain)
            metrics = {**metrics, plain: metrics[name]}
        return super().format_checkpoint_name(metrics, template, ver, prefix)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Point ``linkpath`` to a checkpoint; there is no moment without either."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            link = Path(linkpath)
            partial = storage.partial_name(link)
            storage.remove(partial)
            partial.symlink_to(os.path.relpath(filepath, link.parent))
            storage.take_place(partial, link, sole=True)
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Remove one that is no longer among the best; a link to it goes to the one that took its place first."""
        assert self.dirpath is not None
        last = os.path.join(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        points_to_it = os.path.islink(last) and os.path.realpath(last) == os.path.realpath(filepath)
        if trainer.strategy.broadcast(points_to_it):
            self._link_checkpoint(trainer, self._last_checkpoint_saved, last)
        super()._remove_checkpoint(trainer, filepath)

    # What a continued run takes up ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ModelCheckpoint has it, and whether files wait for their validation."""
        return {**super().state_dict(), "ranked_is_due": self._ranked_is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written; the files that it knows lie where this run's are."""
        self._ranked_is_due = state_dict.get("ranked_is_due", False)
        assert self.dirpath is not None
        folder, former = Path(self.dirpath), state_dict.get("dirpath") or self.dirpath

        def here(path: str) -> str:
            moved = folder / os.path.relpath(path, former) if path else folder
            return str(moved) if path and os.path.lexists(moved) else ""

        kept = {here(path): score for path, score in state_dict.get("best_k_models", {}).items() if here(path)}
        best, worst = (min, max) if self.mode == "min" else (max, min)
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_k_models": kept,
                "best_model_path": best(kept, key=kept.__getitem__) if kept else here(state_dict["best_model_path"]),
                "best_model_score": best(kept.values()) if kept else None,
                "kth_best_model_path": worst(kept, key=kept.__getitem__) if kept else "",
                "last_model_path": here(state_dict.get("last_model_path", "")),
            }
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep how many micro-batches make a step."""
        checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it up."""
        self._accumulated = checkpoint.get("accumulate_grad_batches")

    def _realign(self, trainer: Trainer) -> None:
        """Count micro-batches as if all steps had been of as many as they are now: windows begin where steps do."""
        assert self._accumulated is not None
        progress = trainer.fit_loop.epoch_loop.batch_progress
        for counts in (progress.total, progress.current):
            processed = getattr(counts, "processed")  # noqa: B009 - a subclass's
            change = -(-processed // self._accumulated) * trainer.accumulate_grad_batches - processed
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) + change)
        say(
            f"a step had {self._accumulated} micro-batches and has {trainer.accumulate_grad_batches} "
            f"from step {trainer.global_step} on"
        )


def require_whole_steps(trainer: Trainer) -> None:
    """Check that no callback saves in the middle of a step, and that all ranks do the same at its end.

    Raises:
        ConfigError: One would, or clocks decide.
    """
    if trainer.world_size > 1 and validates_by_clock(trainer):
        raise ConfigError(
            "trainer.val_check_interval is a time, but the clocks of several processes differ: some would validate "
            "while others train, and wait for each other; give a number of steps"
        )
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        is_runs = isinstance(callback, RunCheckpoint)
        where = "checkpoint" if is_runs else f"trainer.callbacks: {type(callback).__name__}"
        if callback.save_on_exception:
            raise ConfigError(
                f"{where}.save_on_exception would save in the middle of a step, which cannot be continued; leave it "
                "out: the last checkpoint before the error is whole"
            )
        if saves_by_clock(callback) and trainer.accumulate_grad_batches > 1 and not is_runs:
            raise ConfigError(
                f"{where}.train_time_interval would save in the middle of a step, which cannot be continued; set "
                "checkpoint.train_time_interval, which waits for the step's end, or every_n_train_steps"
            )


def _saves(trainer: Trainer) -> bool:
    """Whether the run is one that leaves anything."""
    trying = bool(trainer.fast_dev_run) or trainer.sanity_checking  # type: ignore[attr-defined]
    return not trying and trainer.state.fn == TrainerFn.FITTING
