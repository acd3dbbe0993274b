"""Routers and probes of one's own: modules that a person names are imported before a command starts.

Only ``--plugins``, the environment variable MOEBED_PLUGINS, which it sets for further processes, and a recipe's
``class_path`` import what moebed does not bring along: recipes are code. What a checkpoint says is never imported, and
no command takes a recipe from one unasked.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from moebed.errors import UserError
from moebed.former_names import present_name

VARIABLE = "MOEBED_PLUGINS"  # inherited by the runs of a study and the ranks of a run
OPTION = "--plugins"


def load_plugins(arguments: Sequence[str]) -> list[str]:
    """Import what ``--plugins A,B`` and the environment name, each once.

    Args:
        arguments: Of a command; an entry of ``--plugins`` is a Python file or the name of an importable module.

    Returns:
        The arguments without it.

    Raises:
        UserError: A plugin is missing, or fails while it is imported; says where.
    """
    rest, named = [], named_plugins()
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option != OPTION:
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value:
            raise UserError(f"{OPTION} wants a Python file or a module, such as {OPTION} my_router.py")
        named += [str(Path(name).resolve()) if name.endswith(".py") else name for name in value.split(",")]
    named = list(dict.fromkeys(named))
    for name in named:
        _import(name)
    if named:
        os.environ[VARIABLE] = ",".join(named)
    return rest


def named_plugins() -> list[str]:
    """Plugins of this process, as ``--plugins`` takes them."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def module_name(name: str) -> str:
    """What the module of a plugin is called: a file's by its own name, and by its path where another has that."""
    if not name.endswith(".py"):
        return name
    path = Path(name).resolve()
    plain = f"moebed_plugin_{path.stem}"
    other = getattr(sys.modules.get(plain), "__file__", None)
    if other is None or Path(other) == path:
        return plain
    return f"{plain}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def mistake(error: Exception) -> str | None:
    """One line for an exception out of a plug-in's code: its file, the line, and what was raised.

    Args:
        error: As it was caught.

    Returns:
        The line; None where no plug-in's code was running.
    """
    files = {os.path.realpath(file) for name in named_plugins() if (file := _file(name)) is not None}
    frames = [each for each in traceback.extract_tb(error.__traceback__) if os.path.realpath(each.filename) in files]
    if not frames:
        return None
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"plugin {frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}: {said}"


def _file(name: str) -> str | None:
    return getattr(sys.modules.get(module_name(name)), "__file__", None)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the file as it is: Python's own takes what it compiled of a file of the same second and size."""

    def get_code(self, fullname: str) -> types.CodeType:
        """The file's code."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _import(name: str) -> None:
    path = Path(name)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"plugin {name} does not exist; give the path of a Python file, or an importable module")
    if path.suffix != ".py" and path.is_file():
        raise UserError(f"plugin {name} is no Python file; give one whose name ends with .py, or an importable module")
    module = module_name(name)
    if module in sys.modules:
        return
    try:
        if path.suffix != ".py":
            importlib.import_module(name)
            return
        spec = importlib.util.spec_from_file_location(module, path, loader=_Loader(module, str(path)))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    except Exception as error:
        sys.modules.pop(module, None)
        if isinstance(error, UserError):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if Path(frame.filename) == path), frames[-1])
        where = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
        former = error.name or "" if isinstance(error, ImportError) else ""
        moved = f"; it is {present_name(former)} now" if present_name(former) != former else ""
        said = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(
            f"plugin {name} cannot be imported: {type(error).__name__}: {said}{moved} ({where[0]}, line {where[1]})"
        ) from error
