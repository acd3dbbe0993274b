"""A training command as a run: LightningCLI that ends with a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from moebed.errors import UserError
from moebed.machine.allocator import keep_freed_memory
from moebed.model.flops import count_parameters
from moebed.training.command_line import SUMMARY, TrainingCLI, quiet
from moebed.training.saving import FOLDER

# What gloo and NCCL say when a peer is gone or silent.
LOST_RANK = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "imed out", "NCCL", "ocket")


class ReportingCLI(TrainingCLI):
    """TrainingCLI whose runs end with a report."""

    def after_fit(self) -> None:
        """The closing table, ``run_summary.json`` and ``report.html``; a try of a few batches leaves nothing."""
        if self.config.fit.trainer.fast_dev_run:
            return
        folder = Path(self.trainer.default_root_dir)
        with self._get(self.config_init, "checkpoint").ending_at_once(self.trainer):
            numbers = self.closing_numbers(folder / SUMMARY)
            if not self.trainer.is_global_zero:
                return
            from probes.report.page import write_report

            report = write_report([folder], folder / "report.html")
        total, active = count_parameters(self.model.config)
        sizes = {"parameters": f"{total:,}", "active for a token": f"{active:,}"}
        checkpoints = Path(self.config.fit.checkpoint.dirpath or folder / FOLDER)
        print_closing_table(sizes | numbers, folder, report, checkpoints)


def print_closing_table(numbers: dict[str, Any], folder: Path, report: Path, checkpoints: Path) -> None:
    """What came out, and where all of it lies that is there: a run without probes has no results."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{folder}", show_header=False)
    for name, value in numbers.items():
        if name == "alerts":
            continue  # below, as they are long
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else str(value))
    table.add_section()
    for name, place, shown in (
        ("report, one page", report, report),
        ("checkpoint", checkpoints / "last.ckpt", checkpoints / "last.ckpt"),
        ("probe results", folder / "results", folder / "results"),
        ("figures", folder / "figures", folder / "figures"),
        ("curves and images", folder / "tensorboard", f"tensorboard --logdir {folder.parent}"),
    ):
        if place.exists():
            table.add_row(name, str(shown))
    console = Console(stderr=True)
    console.print(table)
    for sentence in numbers.get("alerts", ()):
        console.print(f"alert: {sentence}", markup=False, highlight=False, soft_wrap=True)


def train(command: str, arguments: Sequence[str]) -> None:
    """Run one of the four training commands."""
    quiet()
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    try:
        ReportingCLI([command, *arguments])
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if torch.distributed.is_initialized() and any(sign in str(error) for sign in LOST_RANK):
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"another process of this run has ended or cannot be reached ({first[:160]}); "
                "see what it said, then continue with --ckpt_path last"
            ) from error
        raise
