"""A study in TensorBoard's HParams dashboard: a row a run, with its arm, seed and settings, its losses and headlines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moebed.machine import storage

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
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    rows = list(_rows(study))
    settings: dict[str, Any] = {key: value for _, known, _ in reversed(rows) for key, value in known.items()}
    metrics = {key: value for _, _, found in reversed(rows) for key, value in found.items()}
    with storage.new_folder(folder / FOLDER) as out:
        with SummaryWriter(str(out)) as writer:  # what there is to choose from, once for all runs
            writer.file_writer.add_summary(hparams(settings, metrics, {"arm": list(study["arms"])})[0])
        for name, known, found in rows:
            with SummaryWriter(str(out / name)) as writer:
                for summary in hparams(known, found)[1:]:
                    writer.file_writer.add_summary(summary)
                for metric, value in found.items():
                    writer.add_scalar(metric, value)
    return folder / FOLDER


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
