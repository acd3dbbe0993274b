"""``moebed fit``, ``validate``, ``test`` and ``predict``: what can be refused at once, then the run."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moebed.arguments import names_recipe, parse_setting, parse_yaml, read_recipe, stray_argument
from moebed.errors import ConfigError, UserError, did_you_mean
from moebed.machine import slurm, storage
from moebed.machine.places import require_writable
from moebed.machine.progress import say, waiting
from moebed.machine.termination import first_on_sigterm, note_early
from moebed.model.config import ModelConfig
from moebed.ranks import starts_first
from moebed.training.free_folder import require_checkpoint, require_no_run, run_folder

FOLDER = "--trainer.default_root_dir"
CHECKPOINT = "--ckpt_path"
SOURCES = "--data.sources"
MODEL = "--model.config"
WHERE = (FOLDER, CHECKPOINT, SOURCES)  # what is looked at here, in recipes as well; the last one that says it holds
MISSING = object()
TOLD = ("--print_plan", "--print_config", "--help", "-h")
NAMES = ("last", "best", "hpc")  # of checkpoints; what they mean is known later
NULL = ("null", "Null", "NULL", "~")  # of YAML, which an option's value is as well
# What a recipe and the options begin with; the whole keys are known to the parser, which needs PyTorch.
KEYS = (
    "trainer", "model", "data", "checkpoint", "samples", "parallel", "optimizer", "lr_scheduler", "seed_everything",
    "ckpt_path", "config", "weights_only", "verbose", "return_predictions", "print_plan", "print_config", "help",
)  # fmt: skip


def run(command: str, arguments: Sequence[str]) -> None:
    """Entry of the four training commands."""
    if not arguments:
        raise UserError(
            f"moebed {command} needs a recipe, such as --config recipes/demo.yaml; `moebed {command} --help` lists the "
            "options"
        )
    look_first(command, arguments)
    if command == "fit" and slurm.job() is not None:  # until the run itself acts on them
        note_early(signal.SIGUSR1)
        if starts_first():
            first_on_sigterm(_queue_again_to_make_room)
    with waiting("loading PyTorch and Lightning"):
        from moebed.commands.training_run import train
    train(command, arguments)


def _queue_again_to_make_room() -> None:
    if slurm.makes_room() and slurm.requeue() is None:
        say(f"job {slurm.job()} is in the queue again: it makes room for another")


def look_first(command: str, arguments: Sequence[str]) -> None:
    """Refuse what takes no model to see, before PyTorch is loaded, which takes seconds.

    Raises:
        UserError: A recipe cannot be read, a key begins with a word that none has, a checkpoint or a file of text is
            missing, or the folder of a run cannot be written into or holds one.
    """
    if not arguments[0].startswith("-"):
        raise stray_argument(arguments[0])
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--").rstrip("+")
        if argument.startswith("--") and key:
            _require_known(command, key)
    said: dict[str, Any] = {}
    model: dict[str, Any] = {}  # its settings
    for option, value in _given(arguments):
        if option in ("-c", "--config"):
            content = read_recipe(Path(value)) if names_recipe(value) else parse_setting(option, value)
            for key in content if isinstance(content, dict) else ():
                _require_known(command, str(key))
            said |= {key: value for key in WHERE if (value := _at(content, key)) is not MISSING}
            model |= _whole(_at(content, MODEL))
        elif option.startswith(f"{MODEL}."):
            model |= _whole({option.removeprefix(f"{MODEL}."): value})
        elif option in WHERE:
            said[option] = None if value in NULL else parse_setting(option, value) if option == SOURCES else value
        else:  # of one that says all of a section, or a part of a value, the parser alone knows the outcome
            for key in WHERE:
                if key.startswith(f"{option}.") or option.startswith((f"{key}.", f"{key}+")):
                    said.pop(key, None)
            if f"{MODEL}.".startswith(f"{option}."):
                model.clear()
    ModelConfig.look_first(model)
    if any(one.partition("=")[0] in TOLD for one in arguments):  # which begins nothing
        return
    checkpoint = said.get(CHECKPOINT)
    if isinstance(checkpoint, str) and checkpoint not in NAMES and not storage.standing(Path(checkpoint)).exists():
        raise UserError(f"checkpoint {checkpoint} does not exist; give the path of a .ckpt, or last")
    require_checkpoint(command, checkpoint)
    if FOLDER in said:
        folder = run_folder(said[FOLDER])
        if command == "fit":
            require_writable(folder, FOLDER)
            if checkpoint is None:
                require_no_run(folder)
    if isinstance(sources := said.get(SOURCES), list):
        from moebed.data.sources import require_files

        require_files(sources)


def _whole(settings: Any) -> dict[str, Any]:
    """Settings but those that are no YAML, or a part (num_experts+, router_options.gamma), which the parser judges."""
    given = settings if isinstance(settings, dict) else {}
    plain = {str(key): _plain(value) for key, value in given.items() if not {".", "+"} & set(str(key))}
    return {key: value for key, value in plain.items() if value is not MISSING}


def _plain(value: Any) -> Any:
    """A value of an option, or of a recipe where it is quoted, as YAML has it; MISSING where it is none."""
    try:
        return parse_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return MISSING


def _at(content: Any, option: str) -> Any:
    """What a recipe says of an option, or MISSING."""
    for key in option.removeprefix("--").split("."):
        if not isinstance(content, dict) or key not in content:
            return MISSING
        content = content[key]
    return content


def _require_known(command: str, key: str) -> None:
    """Raise ConfigError for a key of which already the first word is none."""
    first, dot, rest = key.partition(".")
    if first not in KEYS:
        known = [f"{one}{dot}{rest}" for one in KEYS]
        hint = did_you_mean(key, known, f"`moebed {command} --help` lists the known ones")
        raise ConfigError(f"unknown key {key!r} in the config; {hint}")


def _given(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Options and their values, in order, whether written ``--option value`` or ``--option=value``."""
    found = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.startswith("-") and (equals or place + 1 < len(arguments)):
            found.append((option, value if equals else arguments[place + 1]))
    return found
