"""Callbacks of a training run: speed, sampled text, and checkpoints that are never half-written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moebed.checkpoints.sharded import is_sharded, read_whole
from moebed.errors import UserError
from moebed.machine import storage
from moebed.model.generate import generate
from moebed.parallel.strategy import MeshStrategy
from moebed.training.event_files import forget_between
from moebed.training.lightning_private import log_under
from moebed.training.loggers import event_folders, log_texts, takes_text
from moebed.training.step_log import is_logged


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written to a temporary name beside the target, then renamed; loaded as data, never as code.

    A folder of parts, as ranks of a sharded model write it, is loaded as the file that one process would have written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write checkpoint to path; a failure leaves whatever was at path before."""
        advice = storage.checkpoint_advice(Path(path))
        try:
            with storage.new_file(Path(path), advice, sole=True) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch makes of a failed write
            raise storage.NotWritten(Path(path), storage.reason_of(error), advice) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint with torch.load(weights_only=True), whatever was asked."""
        path = storage.standing(Path(path))
        if is_sharded(path):
            return read_whole(path)
        if not path.is_file():
            raise UserError(f"checkpoint {path} does not exist; give the path of a .ckpt, or last")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # torch raises several unrelated types for a damaged file
            first_line = str(error).strip().splitlines()[0]
            raise UserError(f"checkpoint {path} cannot be read ({first_line}); use an earlier one") from error


class TrainingRate(Callback):
    """Logs ``train/tokens_per_second`` of all processes over the last micro-batches, waiting for data included.

    It is logged at the steps whose other numbers are, as if every process had as many tokens as the first. Validation,
    probes and checkpoints do not count: the clock stops when a micro-batch is done, and runs on when the
    next one is asked for.

    Args:
        window: Micro-batches over which the rate is taken.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self._samples: list[tuple[int, float]] = []
        self._begin: float | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock whenever a micro-batch is asked for, of which only the profiler is told."""
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        start = profiler.start

        def started(action: str) -> None:
            if action.endswith("train_dataloader_next"):
                self._begin = time.perf_counter()
            start(action)

        profiler.start = started

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs."""
        if self._begin is None:
            self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, before other callbacks do their work: the command line puts this callback first."""
        assert self._begin is not None
        self._samples.append((batch["input_ids"].numel(), time.perf_counter() - self._begin))
        self._begin = None
        del self._samples[: -self.window]
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and is_logged(trainer, trainer.global_step):
            tokens, seconds = (sum(column) for column in zip(*self._samples, strict=True))
            rate = torch.tensor(
                tokens * trainer.world_size / seconds
            )  # in main memory, so that nobody waits to show it
            pl_module.log("train/tokens_per_second", rate, prog_bar=True)


class StepFile(Callback):
    """Keeps the number of finished optimizer steps in a file, for whoever started the run as a process of its own.

    Args:
        path: The file.
        seconds: It is written at most this often, and at the end.
    """

    def __init__(self, path: str, seconds: float = 1.0) -> None:
        self.path, self.seconds = Path(path), seconds
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, unless that was done a moment ago."""
        if time.perf_counter() - self._last > self.seconds:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            storage.write_text(self.path, str(trainer.global_step))
        self._last = time.perf_counter()


class UnbrokenLog(Callback):
    """Each step and each validation is logged once and under its own number, wherever a run stops and goes on.

    What was logged after the checkpoint is taken out of TensorBoard's files: it comes again. Lightning hands a step's
    metrics to the loggers after the checkpoint of that step is written, and a logger keeps them in memory for a while.
    So what was logged before is flushed when a checkpoint is written, the step's own metrics go into the checkpoint,
    and a resumed run logs them once more. Likewise a step's validation comes after its checkpoint, and Lightning takes
    it as done: a resumed run does it first, if the checkpoint says that it was not.
    """

    def __init__(self) -> None:
        self._began = time.time()
        self._last: dict[str, Any] = {}
        self._written: float | None = None
        self._validated: int | None = None
        self._is_in_step = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What comes now is not logged yet; it is what comes after the optimizer's steps so far."""
        self._is_in_step = True
        log_under(trainer, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step before it is logged."""
        self._is_in_step = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step before it is logged."""
        self._is_in_step = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flush the loggers; keep the metrics of the step that has just ended, and the time."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        checkpoint["last_logged"] = {"step": trainer.global_step - 1, "metrics": metrics if self._is_in_step else {}}
        checkpoint["last_validated_step"] = getattr(pl_module, "last_validated_step", None)
        checkpoint["written_at"] = time.time()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up what the checkpoint kept."""
        self._last = checkpoint.get("last_logged", {})
        self._written = checkpoint.get("written_at")
        self._validated = checkpoint.get("last_validated_step")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log it once more, where that step is one that is logged."""
        if self._written is not None and trainer.is_global_zero:
            for folder in event_folders(trainer):
                forget_between(Path(folder), self._written, self._began)
        metrics = self._last.get("metrics")
        if metrics and (self._last["step"] + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(metrics, self._last["step"])
        if self._last and self._validated != trainer.global_step and validation_is_due(trainer):
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            log_under(trainer, trainer.global_step - 1)
            trainer.validating = True
            loop.run()
            trainer.training = True


def validation_is_due(trainer: Trainer) -> bool:
    """Whether there is a validation after the optimizer step that was done last, by the number of steps."""
    interval = getattr(trainer, "val_check_interval", None)  # there is none where it is a time
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is not None or trainer.global_step == 0:
        return False
    return trainer.global_step * trainer.accumulate_grad_batches % interval == 0


class SampleText(Callback):
    """At each validation, continues the beginning of one validation sequence of each domain; logged as ``run/samples``.

    Args:
        prompt_tokens: Length of the prompt.
        new_tokens: Length of the continuation at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among this many most likely tokens.
    """

    def __init__(
        self, prompt_tokens: int = 24, new_tokens: int = 48, temperature: float = 0.8, top_k: int = 50
    ) -> None:
        self.prompt_tokens, self.new_tokens, self.temperature, self.top_k = (
            prompt_tokens,
            new_tokens,
            temperature,
            top_k,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, with a generator of its own so that training draws what it would have drawn without."""
        together = isinstance(trainer.strategy, MeshStrategy)  # then a forward pass takes every rank
        if trainer.sanity_checking or not takes_text(trainer.loggers) or not (trainer.is_global_zero or together):
            return
        if pl_module.decoder.needs_domain:  # type: ignore[union-attr]
            return  # text that is not written yet has no domain
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = data.probe_batch(len(data.domains))
        prompts = batch["input_ids"][:, : self.prompt_tokens].to(pl_module.device)
        decoder: Any = pl_module.decoder
        generator = torch.Generator(device=prompts.device).manual_seed(0)
        with torch.compiler.set_stance("force_eager"):  # every step of it has another length
            ids = generate(decoder, prompts, self.new_tokens, self.temperature, self.top_k, generator).tolist()
        sections = []
        for row, domain in zip(ids, batch["domain"].tolist(), strict=True):
            prompt, rest = row[: prompts.shape[1]], row[prompts.shape[1] :]
            text = (
                _quoted(data.tokenizer.decode(prompt)) + "\n\n*continues:*\n\n" + _quoted(data.tokenizer.decode(rest))
            )
            sections.append(f"**{data.domains[domain]}**\n\n{text}")
        if trainer.is_global_zero:
            log_texts(trainer, "samples", {"run/samples": "\n\n".join(sections)}, trainer.global_step)


def _quoted(text: str) -> str:
    """As a block of literal text in Markdown."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
