"""``moebed fit``, ``validate``, ``test`` and ``predict``: what can be refused at once, then the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moebed.arguments import names_recipe, read_recipe
from moebed.errors import UserError
from moebed.machine import storage
from moebed.machine.progress import waiting

FOLDER = "--trainer.default_root_dir"


def run(command: str, arguments: Sequence[str]) -> None:
    """Entry of the four training commands."""
    if not arguments:
        raise UserError(
            f"moebed {command} needs a recipe, such as --config recipes/demo.yaml; `moebed {command} --help` lists the "
            "options"
        )
    look_first(command, arguments)
    with waiting("loading PyTorch and Lightning"):
        from moebed.commands.training_run import train
    train(command, arguments)


def look_first(command: str, arguments: Sequence[str]) -> None:
    """Refuse what takes no model to see, before PyTorch is loaded, which takes seconds.

    Raises:
        UserError: A recipe cannot be read, or the folder of a run cannot be written into.
    """
    folder = None
    for option, value in _given(arguments):
        if option in ("-c", "--config") and names_recipe(value):
            trainer = read_recipe(Path(value)).get("trainer")
            folder = trainer.get("default_root_dir", folder) if isinstance(trainer, dict) else folder
        elif option == FOLDER:
            folder = value
    if command == "fit" and isinstance(folder, str) and "--print_plan" not in arguments:
        storage.require_writable(Path(folder), FOLDER)


def _given(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Options and their values, in order, whether written ``--option value`` or ``--option=value``."""
    found = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.startswith("-") and (equals or place + 1 < len(arguments)):
            found.append((option, value if equals else arguments[place + 1]))
    return found
