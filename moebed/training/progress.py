"""How far a training run is: Lightning's progress bar on a terminal, and in a log a line every ten seconds."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from moebed.machine.progress import Lines, duration

FORECAST_SECONDS = 3.0  # of steps after the first, which compiles and warms up, before the run's time is foretold
SILENCE = 15.0  # then a line comes of whatever is going on


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with short names."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss, bits per byte and tokens a second; without the version number and with fewer digits."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        short = {"train/loss": "loss", "train/bits_per_byte": "bpb", "train/tokens_per_second": "tok/s"}
        short |= {"val/bits_per_byte": "val_bpb"}
        return {
            short.get(name, name): f"{value:.0f}" if name == "train/tokens_per_second" else f"{value:.3f}"
            for name, value in items.items()
            if isinstance(value, int | float)
        }


class ProgressLines(Callback):
    """Step, loss, tokens a second and time left, for a log. All of it is by the clock on the wall.

    Time left takes everything into account that happened since the first step: validation, probes, checkpoints,
    waiting for data. Tokens a second are those of the steps since the line before or the last validation, with their
    data. The callback comes before those that probe and save, so that it knows when a step has ended.
    """

    def __init__(self) -> None:
        self._lines: Lines | None = None
        self._doing, self._since = "", 0.0
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        self._warm: tuple[float, int] | None = None  # when the first step of this process ended, and its number
        self._mark = (0.0, 0)  # where tokens a second begin
        self._was_away = False  # since the mark: at validation
        self._foretold = False

    # A run's parts ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the thread that breaks a silence."""
        self._close()
        if trainer.is_global_zero:
            self._begin("the start")
            self._lines = Lines(self._standing, silence=SILENCE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins, or goes on."""
        self._steps, self._warm, self._foretold = trainer.global_step, None, False
        self._begin("the first reading of data")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A micro-batch has come; a step begins, unless it goes on with one more of them."""
        name = f"step {trainer.global_step + 1}"
        if self._doing != name:
            self._begin(name)
        if self._was_away:
            self._mark, self._was_away = (self._since, self._tokens), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far training is, if the line before would be too old after one more step."""
        now = time.monotonic()
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        if trainer.global_step == self._steps or self._lines is None:
            return
        self._steps, self._seconds = trainer.global_step, now - self._since
        self._begin(f"work after step {self._steps} (probes, checkpoint, data)")
        if self._warm is None:
            self._warm, self._mark = (now, self._steps), (now, self._tokens)
            return
        is_due = self._lines.is_due(self._seconds)
        if not self._foretold and (is_due or now - self._warm[0] >= FORECAST_SECONDS):
            self._foretell(trainer, now)
        elif is_due:
            self._say_step(trainer, now)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Held-out text."""
        self._begin("validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test text."""
        self._begin("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Losses of tokens."""
        self._begin("prediction")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the steps, whose rate begins anew."""
        self._begin("work after validation (samples, checkpoint, data)")
        self._was_away = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is done once, after the last step."""
        self._begin("work at the end (probes, pictures, checkpoint)")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing more is said."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing more is said."""
        self._close()

    # What is said -----------------------------------------------------------------------------------------------------

    def _foretell(self, trainer: Trainer, now: float) -> None:
        assert self._lines is not None
        assert self._warm is not None
        self._foretold = True
        step = (now - self._warm[0]) / (self._steps - self._warm[1])
        total = _last_step(trainer)
        parts = [f"first steps: {_short(step)} a step, {self._rate(now):,.0f} tokens/s"]
        if total is not None and (come := total - self._steps) > 0:
            many = "one more takes" if come == 1 else f"the {come} to come take"
            parts.append(f"{many} about {duration(step * come)}, validation and probes not counted")
        self._lines.say("; ".join(parts))

    def _say_step(self, trainer: Trainer, now: float) -> None:
        assert self._lines is not None
        assert self._warm is not None
        total = _last_step(trainer)
        parts = [f"step {self._steps}" + (f" of {total}" if total is not None else "")]
        loss = trainer.callback_metrics.get("train/loss")
        parts += [f"loss {float(loss):.3f}"] if loss is not None else []
        parts.append(f"{self._rate(now):,.0f} tokens/s")
        if total is not None:
            speed = (now - self._warm[0]) / (self._steps - self._warm[1])
            parts.append(f"{duration(speed * (total - self._steps))} left")
        self._lines.say(", ".join(parts))
        self._mark = now, self._tokens

    def _rate(self, now: float) -> float:
        seconds, tokens = now - self._mark[0], self._tokens - self._mark[1]
        return tokens / seconds if seconds > 0 else 0.0

    def _standing(self) -> str:
        return f"{self._doing} is going on, {duration(time.monotonic() - self._since)} so far"

    def _begin(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def _last_step(trainer: Trainer) -> int | None:
    """The optimizer step that ends the run, where a number of steps does."""
    return trainer.max_steps if trainer.max_steps > 0 else None


def _short(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
