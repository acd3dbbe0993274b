"""The progress bar of a checkpoint that is read layer by layer: bytes read, rate, and time left."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm


class ReadingBar(Callback):
    """Shows on standard error how far the walk over a :class:`moebed.pretrained.PretrainedMoE` is."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name the layer; the bar opens with the first one."""
        model: Any = pl_module
        if self._bar is None:
            self._bar = tqdm(
                total=model.bytes_total,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10,
            )
            model.on_read = self._update
        ends = batch == model.config.num_hidden_layers
        self._bar.set_description("predictions" if ends else f"layer {batch}", refresh=False)

    def _update(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
