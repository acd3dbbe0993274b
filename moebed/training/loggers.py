"""Where a run logs: numbers, text and pictures to every logger of the Trainer that can take them.

Numbers go to all loggers alike, by ``log_metrics``. Text and pictures each takes in its own way: TensorBoard as such,
Weights & Biases as tables and images, MLflow as artifacts. CSV has no place for them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from moebed.machine.tags import LAYERS, TRAIN

if TYPE_CHECKING:
    from PIL.Image import Image
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

MLFLOW_AT_ONCE = 500  # numbers; a server takes a thousand in one message
NOT_LOGGED = ("epoch", "hp_metric")  # steps are what is counted
_LAYER = re.compile(rf"{LAYERS}/(([^/]+)/(.+))/layer_\d+")


class EventLog(TensorBoardLogger):
    """TensorBoard's event file, with a layout of the custom-scalars dashboard that grows with what is logged.

    The dashboard has a category a probe, and one for training; in each a chart a quantity, with a line a layer.

    Args:
        save_dir: The run's folder; the events are in ``tensorboard/`` in it.
    """

    def __init__(self, save_dir: Any) -> None:
        super().__init__(save_dir, name="tensorboard", version="", default_hp_metric=False)
        self._by_layer: set[str] = set()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers, and lay out those of layers."""
        super().log_metrics({name: value for name, value in metrics.items() if name not in NOT_LOGGED}, step)
        if new := {found[1] for name in metrics if (found := _LAYER.fullmatch(name))} - self._by_layer:
            self._by_layer |= new
            _write_layout(self, layout_of(self._by_layer), step)


def layout_of(quantities: Iterable[str]) -> Layout:
    """A category a probe, and one for training, which comes first; in it a chart a quantity.

    A chart has the mean over layers, where that is logged, and a line a layer.

    Args:
        quantities: ``<group>/<quantity>`` of what is logged by layer.
    """
    from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

    charts: dict[str, list[Chart]] = {}
    for name in sorted(quantities, key=lambda name: (not name.startswith(f"{TRAIN}/"), name)):
        group, _, quantity = name.partition("/")
        lines = MultilineChartContent(tag=[f"{re.escape(name)}$", rf"{LAYERS}/{re.escape(name)}/layer_\d+$"])
        charts.setdefault(group, []).append(Chart(title=quantity, multiline=lines))
    return Layout(
        category=[
            Category(title=f"{group}, by layer", chart=of_group, closed=number > 0)
            for number, (group, of_group) in enumerate(charts.items())
        ]
    )


def log_numbers(trainer: Trainer, numbers: Mapping[str, float], step: int) -> None:
    """Log numbers by tag under a step, whatever step Lightning would log them under."""
    items = list(numbers.items())
    for logger in trainer.loggers:
        size = MLFLOW_AT_ONCE if isinstance(logger, MLFlowLogger) else max(1, len(items))
        for begin in range(0, len(items), size):
            logger.log_metrics(dict(items[begin : begin + size]), step)


def log_texts(trainer: Trainer, kind: str, texts: Mapping[str, str], step: int) -> None:
    """Log Markdown by tag.

    Args:
        trainer: Of the run.
        kind: What they are, for loggers that keep them together: ``sentences``, ``samples``, ``run``.
        texts: By tag.
        step: Optimizer steps done.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, text in texts.items():
                logger.experiment.add_text(tag, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(kind, ["step", "what", "text"], [[str(step), *row] for row in texts.items()], step=step)
        elif isinstance(logger, MLFlowLogger):
            page = "\n\n".join(f"## {tag}\n\n{text}" for tag, text in texts.items())
            logger.experiment.log_text(logger.run_id, page, f"{kind}/step_{step:08d}.md")


def log_picture(trainer: Trainer, tag: str, png: bytes, step: int) -> None:
    """Log a picture, a PNG, as it is."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _add_png(logger, tag, png, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [_opened(png)], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, _opened(png), f"pictures/{tag}/step_{step:08d}.png")


def takes_text(loggers: Iterable[Logger]) -> bool:
    """Whether some logger has a place for text."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger) for logger in loggers)


def event_folders(trainer: Trainer) -> Iterator[str]:
    """Folders of TensorBoard's event files."""
    return (logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


def _opened(png: bytes) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _add_png(logger: TensorBoardLogger, tag: str, png: bytes, step: int) -> None:
    """``add_image`` would take the picture's pixels and encode them once more."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # PNG's header
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _write_layout(logger: TensorBoardLogger, layout: Layout, step: int | None) -> None:
    """TensorBoard shows the one written last. PyTorch's ``add_custom_scalars`` would open every category."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar import metadata

    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    content = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=content, metadata=SummaryMetadata(plugin_data=plugin))
    logger.experiment.file_writer.add_summary(Summary(value=[value]), step)
