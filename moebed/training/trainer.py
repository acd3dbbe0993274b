"""Trainers: of runs, whose precision may be ``auto``, chosen when a run begins, kept when it goes on, the same on all
ranks; and of what is only looked at."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision, Precision

from moebed.checkpoints.run import is_run, read_run
from moebed.machine import storage
from moebed.machine.precision import choose_precision
from moebed.parallel.strategy import MeshStrategy
from moebed.training.launched import require_as_launched, with_environment
from moebed.training.lightning_private import PrecisionName
from moebed.training.loggers import EventLog

AUTO = "auto"
UNSET = "32-true"  # what Lightning takes where nothing is said


class AutoTrainer(Trainer):
    """Lightning's Trainer, which counts in optimizer steps.

    Args:
        accelerator: As Lightning has it: auto, which takes a GPU if there is one, cpu, gpu, and others.
        val_check_interval: A whole number is of optimizer steps, whatever their number of micro-batches; all else is
            as Lightning has it.
        precision: As Lightning has it, or auto: bf16-mixed where the hardware multiplies bf16 faster than float32, else
            32-true; a run that is continued keeps what it had.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        precision: Literal["auto"] | PrecisionName | None = "auto",
        val_check_interval: int | float | str | timedelta | dict | None = None,
        accumulate_grad_batches: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(val_check_interval, int) and not isinstance(val_check_interval, bool):
            val_check_interval *= accumulate_grad_batches  # Lightning counts micro-batches
        kwargs |= {"val_check_interval": val_check_interval, "accumulate_grad_batches": accumulate_grad_batches}
        if isinstance(kwargs.get("strategy"), MeshStrategy):
            # FSDP2 cannot gather a shard of one rank in inference mode, which Lightning takes over NCCL, not over gloo.
            kwargs["inference_mode"] = False
        chosen = choose_precision(str(accelerator)).precision if precision == "auto" else precision
        kwargs["plugins"] = with_environment(kwargs.get("plugins"), kwargs.get("strategy"))
        super().__init__(accelerator=accelerator, precision=chosen, **kwargs)
        require_as_launched(self)

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Write a checkpoint, all ranks together: all hear of one that failed, before they wait for each other.

        Raises:
            UserError: A rank failed.
        """
        error: Exception | None = None
        try:
            checkpoint = self._checkpoint_connector.dump_checkpoint(bool(weights_only))
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        except Exception as caught:  # noqa: BLE001 - all ranks are told
            error = caught
        storage.agree(error)


def looking_trainer(out: Path, accelerator: str = "cpu", callbacks: Sequence[Callback] = ()) -> Trainer:
    """A Trainer that trains nothing: one device, events in a folder, and no word but its callbacks'.

    Args:
        out: Folder of the results.
        accelerator: As Lightning has it.
        callbacks: What looks.
    """
    return Trainer(
        accelerator=accelerator,
        devices=1,
        default_root_dir=out,
        logger=EventLog(out),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        plugins=[LightningEnvironment()],  # one process, whoever has started it beside others
    )


def resolve_precision(trainer: Any, ckpt_path: str | None) -> tuple[Any, str | None]:
    """What ``trainer.precision`` of a run stands for, and what to say of it, if it was auto.

    Args:
        trainer: The recipe's part, with accelerator, default_root_dir and precision.
        ckpt_path: Of the run that is continued or looked at.
    """
    if trainer.precision != AUTO:
        return trainer.precision, None
    if ckpt_path is not None:
        kept = recorded_precision(Path(trainer.default_root_dir), ckpt_path)
        if kept is not None:
            return kept[0], f"precision auto: {kept[0]}, as {kept[1]} has it"
    choice = choose_precision(str(trainer.accelerator))
    return choice.precision, str(choice)


def recorded_precision(folder: Path, ckpt_path: str) -> tuple[Any, Path] | None:
    """The precision that a run was trained in and the file that says so; None if there is none.

    Args:
        folder: Of the run, for a ckpt_path that is no path, such as last.
        ckpt_path: A checkpoint, or a word of Lightning's.
    """
    path = Path(ckpt_path)
    places = [path.parent, path.parent.parent] if is_run(path) else [folder]
    for place in places:
        file = place / "config.yaml"
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        trainer = content.get("trainer") if isinstance(content, dict) else None
        if isinstance(trainer, dict) and trainer.get("precision") != AUTO:
            return trainer.get("precision") or UNSET, file
    if is_run(path) and "precision" in (found := read_run(path)):
        return found["precision"], path
    return None


class PrecisionOfRun(Callback):
    """All ranks compute in the first one's precision, whatever each chose; the checkpoint names it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The ranks know each other, and nothing is built yet: follow the first one."""
        wanted = trainer.strategy.broadcast(trainer.precision)
        if wanted == trainer.precision:
            return
        device = trainer.strategy.root_device.type
        plugin = MixedPrecision(wanted, device) if wanted == "bf16-mixed" else Precision()
        trainer.strategy.precision_plugin = plugin

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """For one that goes on without the run's config.yaml."""
        checkpoint["precision"] = trainer.precision
