"""The progress bar of a checkpoint that is read layer by layer: bytes done with, rate, and time left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moebed.machine.progress import Progress

if TYPE_CHECKING:
    from moebed.checkpoints.pretrained import PretrainedMoE
    from moebed.views.layer import HeadView, LayerView, Need, ProbeText


def walk(
    model: PretrainedMoE, text: ProbeText | None, needs: frozenset[Need], description: str
) -> Iterator[LayerView | HeadView]:
    """The views of ``PretrainedMoE.views``, under a bar of their own; the model is closed after the last one."""
    try:
        views = model.views(text, needs)
        with Progress(model.bytes_total, "B", description=description) as progress:
            model.on_read = progress.update
            yield from views
            progress.update(progress.total)
    finally:
        model.close()


class ReadingBar(Callback):
    """Shows on standard error how far the walk over a :class:`moebed.checkpoints.pretrained.PretrainedMoE` is."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name the layer; the bar opens with the first one."""
        model: Any = pl_module
        if self._progress is None:
            self._progress = Progress(model.bytes_total, "B")
            model.on_read = self._progress.update
        ends = batch == model.config.num_hidden_layers
        self._progress.describe("predictions" if ends else f"layer {batch}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is done with, the last layer and what no probe needed of it too; close the bar."""
        if self._progress is not None:
            self._progress.update(self._progress.total)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
