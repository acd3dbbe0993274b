"""Where a training command begins: a new run, one that is continued, or a checkpoint that is looked at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebed.checkpoints.run import is_run, read_run
from moebed.errors import UserError
from moebed.machine import storage
from moebed.training.free_folder import require_checkpoint, require_no_run, require_nothing_else, run_folder
from moebed.training.lightning_private import rank_before_processes
from moebed.training.saving import FOLDER

LAST = "last"


@dataclass(frozen=True)
class Start:
    """What a command begins with.

    Args:
        path: The checkpoint; None for a new run.
        said: The same in words.
    """

    path: Path | None
    said: str


def find_start(command: str, recipe: Any) -> Start:
    """Find what ``--ckpt_path`` names; nothing but a folder without a run makes ``last`` a new one.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        recipe: Its parsed arguments.

    Raises:
        UserError: There is no such checkpoint, or the folder holds another run.
    """
    folder = run_folder(recipe.trainer.default_root_dir)
    checkpoints = Path(recipe.checkpoint.dirpath or folder / FOLDER)
    fits, given = command == "fit", recipe.ckpt_path
    if fits:
        _recover(checkpoints)
    last = storage.standing(checkpoints / "last.ckpt")
    if given is None:
        require_checkpoint(command, given)
        _require_no_run(folder, checkpoints)
        return Start(None, f"a new run in {folder}; --ckpt_path last continues it")
    if given in ("best", "hpc"):
        raise UserError(f"--ckpt_path {given} is known only while a run trains; give the path of a .ckpt file, or last")
    if given != LAST:
        path = storage.standing(Path(given))
        if not is_run(path):
            raise UserError(f"checkpoint {given} does not exist; give the path of a .ckpt, or last")
        if fits and checkpoints.resolve() not in path.resolve().parents:
            _require_no_run(folder, checkpoints)
            return Start(path, f"a new run in {folder}, which goes on from {_described(path)}")
        return Start(path, _of_run(command, folder, path))
    if is_run(last):
        return Start(last, _of_run(command, folder, last))
    if not fits:
        raise UserError(f"there is no checkpoint {last} to {command}; {_advice(folder, recipe)}")
    if _is_elsewhere(folder, recipe) or _has_trained(folder, checkpoints):
        raise UserError(f"there is no checkpoint {last} to continue from; {_advice(folder, recipe)}")
    require_nothing_else(folder)
    return Start(None, f"a new run in {folder}, which has no checkpoint yet; --ckpt_path last continues it")


def _of_run(command: str, folder: Path, path: Path) -> str:
    return (
        f"continuing the run in {folder} from {_described(path)}" if command == "fit" else f"reads {_described(path)}"
    )


def _described(path: Path) -> str:
    return f"{path}, step {read_run(path).get('global_step', 'unknown')}"


def _require_no_run(folder: Path, checkpoints: Path) -> None:
    require_no_run(folder)
    if is_run(checkpoints / "last.ckpt"):
        raise UserError(
            f"{checkpoints} already holds a run's checkpoints; continue it with --ckpt_path last, or choose another "
            "folder with --trainer.default_root_dir and --checkpoint.dirpath"
        )


def _has_trained(folder: Path, checkpoints: Path) -> bool:
    """Whether a run got as far as to leave results or a checkpoint; one killed before begins anew."""
    return (folder / "run_summary.json").exists() or any(checkpoints.glob("*.ckpt"))


def _configs(recipe: Any) -> list[Path]:
    given = recipe.get("config") or []
    return [Path(str(path)) for path in given if path is not None]


def _is_elsewhere(folder: Path, recipe: Any) -> Path | None:
    """The run whose config.yaml is used, if it lies in another folder than the one that it names, which is empty."""
    for config in _configs(recipe):
        own = config.absolute().parent
        is_of_run = config.name == "config.yaml" and ((own / FOLDER).is_dir() or (own / "run_summary.json").exists())
        if is_of_run and own.resolve() != folder.resolve() and not (folder / "config.yaml").exists():
            return own
    return None


def _advice(folder: Path, recipe: Any) -> str:
    moved = _is_elsewhere(folder, recipe)
    if moved is not None:
        return (
            f"the config is that of the run in {os.path.relpath(moved)}: add --trainer.default_root_dir "
            f"{os.path.relpath(moved)}"
        )
    return "give the path of one with --ckpt_path, or the run's folder with --trainer.default_root_dir"


def _recover(checkpoints: Path) -> None:
    """Give a checkpoint its name again whose replacement was stopped half-way: only who trains on does."""
    if rank_before_processes() == 0:
        storage.recover(checkpoints)
    else:
        storage.wait_for_recovery(checkpoints)
