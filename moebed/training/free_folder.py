"""Whether a training command can begin where it is told to, as far as that needs no PyTorch to see."""

from __future__ import annotations

import os
from pathlib import Path

from moebed.errors import UserError

OTHERS = ("summary.json", "run_summary.json")  # of a probed checkpoint, of tasks


def require_checkpoint(command: str, given: str | None) -> None:
    """Raise UserError where a command that looks at a checkpoint is given none."""
    if given is None and command != "fit":
        raise UserError(f"{command} needs a checkpoint: add --ckpt_path last, or the path of a .ckpt file")


def run_folder(given: object) -> Path:
    """The folder that ``trainer.default_root_dir`` names; raises UserError where it names none."""
    if not isinstance(given, str | os.PathLike) or not str(given):
        said = "null" if given is None else repr(given)
        raise UserError(f"trainer.default_root_dir is {said}; give the run a folder, such as runs/mine")
    return Path(given)


def require_no_run(folder: Path) -> None:
    """Raise UserError for a folder that holds a run, or results that a new one would write its own over."""
    require_nothing_else(folder)
    if (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} already holds a run; continue it with --ckpt_path last, or choose another folder "
            "with --trainer.default_root_dir"
        )


def require_nothing_else(folder: Path) -> None:
    """Raise UserError for a folder with results that are no run's, which a run would write its own over."""
    there = [name for name in OTHERS if (folder / name).exists()]
    if there and not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} holds results that are no run's ({', '.join(there)}), which a run would replace; choose another "
            "folder with --trainer.default_root_dir"
        )
