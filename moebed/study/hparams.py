"""A study in TensorBoard's HParams dashboard: a row a run, with arm, seed and settings, losses and headlines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.machine import storage

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "hparams"
OF_RUN = ("loss", "bits_per_byte", "over_floor", "tokens_per_second")


def write_hparams(study: Mapping[str, Any], folder: Path) -> Path:
    """Write the event files of a study's finished runs, in place of those that were there.

    Args:
        study: The content of ``study.json``.
        folder: Of the study; ``tensorboard --logdir`` of it shows the curves of the runs as well.

    Returns:
        ``hparams/``, below the study's folder.
    """
    from torch.utils.tensorboard.summary import hparams, scalar

    rows = list(_rows(study))
    settings: dict[str, Any] = {key: value for _, known, _ in reversed(rows) for key, value in known.items()}
    metrics = {key: value for _, _, found in reversed(rows) for key, value in found.items()}
    with storage.new_folder(folder / FOLDER, sole=True) as out:
        # What there is to choose from, once for all runs: the dashboard takes the first that it finds.
        arms = {"arm": list(study["arms"])} if rows else None  # of what no run has there is no choice
        _write_events(out, hparams(settings, metrics, arms)[:1])
        for name, known, found in rows:
            numbers = [scalar(metric, value) for metric, value in found.items()]
            _write_events(out / name, [*hparams(known, found)[1:], *numbers])
    return folder / FOLDER


def _write_events(folder: Path, summaries: Sequence[Summary]) -> None:
    """An event file that is the same whenever it is written: no time is in it, and settings are in order."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.out.tfevents.0.study").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        for summary in summaries:
            for value in summary.value:
                plugin = value.metadata.plugin_data
                if plugin.content:  # holds a map, which is written in any order unless told otherwise
                    plugin.content = HParamsPluginData.FromString(plugin.content).SerializeToString(deterministic=True)
            writer.write(Event(summary=summary).SerializeToString())
        writer.flush()


def _rows(study: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, float]]]:
    """Folder, settings and numbers of each run that is finished."""
    for arm, content in study["arms"].items():
        settings = {"arm": arm, "total_parameters": content["total_parameters"]}
        settings |= {name: _plain(value) for name, value in content["settings"].items()}
        for seed, run in content["runs"].items():
            if run["status"] == "finished":
                yield f"{arm}/seed_{seed}", {**settings, "seed": int(seed)}, _metrics(run)


def _metrics(run: Mapping[str, Any]) -> dict[str, float]:
    """Losses, then each headline as it was probed last."""
    found = {name: run.get(name) for name in OF_RUN}
    found |= {name: series["value"][-1] for name, series in run["headlines"].items() if series["value"]}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _plain(value: Any) -> str | float:
    """What the dashboard takes; a list or a switch, say, as text."""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else str(value)
