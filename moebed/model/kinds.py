"""Whether the fields of a dataclass hold what they declare.

A command line that is made of the class sees to it by itself; files and Python do not.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moebed.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def require_kinds(settings: Any, where: str) -> None:
    """Raise ConfigError for the first field of a dataclass whose value is of none of its kinds.

    Args:
        settings: Whose fields are looked at; those that are typed Literal have checks of their own.
        where: What the error begins with.
    """
    kind: Any = type(settings)
    require_kinds_of(kind, {name: getattr(settings, name, None) for name in _hints(kind)}, where)


def require_kinds_of(kind: Any, values: Mapping[str, Any], where: str) -> None:
    """The same of values for some fields of a dataclass of which there is none yet."""
    for name, hint in _hints(kind).items():
        if name in values and not _is_of(values[name], hint):
            raise ConfigError(f"{where}: {name} is {values[name]!r}; it must be {_called(hint)}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind) if get_origin(hints[one.name]) is not Literal}


def _is_of(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in get_args(hint))
    if hint is type(None):
        return value is None
    if hint in (int, float):  # YAML's true is no number
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if origin is list:
        return listed and all(_is_of(one, get_args(hint)[0]) for one in value)
    if origin is dict:
        return isinstance(value, Mapping)
    return not (listed or isinstance(value, str | Real))  # settings by name, or an object that has them


def _called(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_called(one) for one in get_args(hint))
    if get_origin(hint) is list:
        return f"a list with {_called(get_args(hint)[0])} a layer"
    return _WORDS.get(hint, "settings by name")


@cache
def choices_of(kind: type[Any]) -> dict[str, tuple[str, ...]]:
    """What each field of a dataclass that is typed Literal may be."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
