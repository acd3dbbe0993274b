"""What the parser of ``moebed fit`` refuses, as one line that names the key, the value and what it may be."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from moebed.arguments import parse_yaml, stray_argument
from moebed.errors import ConfigError, UserError, did_you_mean
from moebed.training.jsonargparse_private import option_names, type_of

_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "settings",
}
_FEW = 25  # so many known names are listed where none is near


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The UserError that jsonargparse wrapped, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def refusal(parser: Any, message: str, error: Exception | None) -> ConfigError:
    """One line in place of what jsonargparse says.

    Args:
        parser: Which refuses. Of a key whose value has settings of its own there is a parser inside, whose refusal the
            outer one wraps; it is said with the outer key in front.
        message: Its own words.
        error: Their cause.
    """
    text = " ".join(message.split())
    found = next(reversed(list(re.finditer(r'Parser key "([\w.]+)"', text))), None)  # the innermost
    inner = user_error_behind(error)
    if inner is not None:
        return ConfigError(f"{found.group(1)}: {inner}" if found else str(inner))
    # In a file, on the command line, and in the settings of a value.
    unknown = re.search(
        r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)|^Option '([\w.]+)' is not", text
    )
    if unknown is not None:
        return _unknown_key(parser, next(filter(None, unknown.groups())))
    stray = re.match(r"unrecognized arguments: (\S+)", text)
    if stray is not None:
        return stray_argument(stray.group(1))
    if (missing := _missing_class(error)) is not None and found:
        return ConfigError(f"{found.group(1)}: {missing}")
    given = found and _given(text[found.end() :])
    if found is None or given is None:
        return ConfigError(text)
    return _wrong_value(parser, found.group(1), given)


def _given(said: str) -> str | None:
    """The value that was refused; that of a list stands after those of its entries."""
    for sign in (r".*Given value: (.*)$", r".*?Got value: (.*)$", r".*?Unable to load config ['\"](.*)['\"]$"):
        if (value := re.match(sign, said)) is not None:
            return value.group(1)
    return None


def _unknown_key(parser: Any, key: str) -> ConfigError:
    known = [name for name in option_names(parser) if name not in ("help", "config")]
    listed = f"choose one of {', '.join(known)}" if len(known) <= _FEW else "`moebed fit --help` lists the known ones"
    hint = did_you_mean(key, known, listed)
    if ".router_options." in key:
        hint += "; those of a router of your own are made known by --plugins FILE.py"
    return ConfigError(f"unknown key {key!r} in the config; {hint}")


def _missing_class(error: BaseException | None) -> str | None:
    """What a ``class_path`` names that is not there."""
    while error is not None:
        said = re.match(r"Problem with given class_path '(.+?)':\s*(.*)", " ".join(str(error).split()))
        if said is not None:
            module, _, name = said.group(1).rpartition(".")
            names = getattr(sys.modules.get(module), "__all__", None) or dir(sys.modules.get(module))
            near = did_you_mean(name, names)
            return f"class_path {said.group(1)!r} cannot be used ({said.group(2)})" + (f"; {near}" if near else "")
        error = error.__cause__ or error.__context__
    return None


def _wrong_value(parser: Any, key: str, given: str) -> ConfigError:
    if given[:1] in ("[", "{"):
        try:
            parse_yaml(given)
        except yaml.YAMLError as error:
            cause = getattr(error, "problem", None) or "it does not end"
            return ConfigError(f"{key} is {given!r}, which is no YAML ({cause}); close each bracket and quotation mark")
    hint = type_of(parser, key)
    known = [str(option) for option in _options(hint)]
    if known:
        near = did_you_mean(given, known)
        return ConfigError(f"{key} is {given!r}; choose one of {', '.join(known)}" + (f" ({near})" if near else ""))
    names = [name.removeprefix(f"{key}.") for name in option_names(parser) if name.startswith(f"{key}.")]
    wanted = _settings(names) if hint is None and names else in_words(hint)
    return ConfigError(f"{key} is {given!r}; it must be {wanted}")


def _settings(names: list[str]) -> str:
    return "settings by name" + (f" ({', '.join(names)})" if len(names) <= _FEW else "")


def _alternatives(hint: Any) -> list[Any]:
    """The types that a value may have, but for None."""
    if get_origin(hint) in (Union, types.UnionType):
        return [one for part in get_args(hint) for one in _alternatives(part)]
    return [] if hint in (None, type(None)) else [hint]


def _options(hint: Any) -> list[Any]:
    """The words that a value may be, where it may be nothing else."""
    parts = _alternatives(hint)
    if not all(get_origin(part) is Literal for part in parts):
        return []
    return list(dict.fromkeys(str(option) for part in parts for option in get_args(part)))


def in_words(hint: Any) -> str:
    """What a person writes for a value of a type: ``a whole number, or a list, each entry a whole number``."""
    parts = _alternatives(hint)
    if len(parts) != 1:
        return ", or ".join(dict.fromkeys(map(in_words, parts))) or "null"
    (part,) = parts
    if part in _PLAIN:
        return _PLAIN[part]
    origin = get_origin(part)
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(part)))}"
    if origin in (list, tuple, set) or (
        isinstance(origin, type) and issubclass(origin, Iterable) and origin is not dict
    ):
        entry = [one for one in get_args(part) if one is not Ellipsis][:1]
        return "a list" + (f", each entry {in_words(entry[0])}" if entry else "")
    if origin is dict:
        return "settings by name"
    if is_dataclass(part):
        return _settings([one.name for one in fields(part)])
    if isinstance(part, type) and not issubclass(part, Path):
        return f"the class_path of a {part.__name__}"
    return str(part)
