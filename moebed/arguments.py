"""Arguments of a subcommand, and files in their place, whose errors are one line."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moebed.errors import ConfigError, UserError, did_you_mean

_NEGATIVE = re.compile(r"-(\.?\d|inf|nan)")
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")  # YAML 1.1 asks for a point and a sign


class OneLineParser(argparse.ArgumentParser):
    """Errors become a ConfigError of one line instead of a usage text; half an option must not set another."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._negative_number_matcher = _NEGATIVE  # -5GiB is a value, for its option to refuse

    def options(self) -> list[argparse.Action]:
        """Its options and arguments."""
        return self._actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, once nothing is given that is empty: a variable of a shell that was not set."""
        before = ""
        # What follows a command's name is for another parser.
        mine = not any(action.nargs == argparse.REMAINDER for action in self.options())
        for argument in args or () if mine else ():
            option, equals, value = argument.partition("=")
            if not argument.strip() or (equals and option.startswith("--") and not value.strip()):
                named = option if equals else before if before.startswith("--") else "an argument"
                raise ConfigError(f"{named} is empty; give it a value, or leave it out")
            before = argument
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        value = re.match(r"argument (\S+): (is .*)", message, re.DOTALL)  # as whole and number say it
        if value is not None:
            raise ConfigError(" ".join(value.groups()))
        choice = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)$", message, re.DOTALL)
        if choice is not None:
            name, given, known = choice.group(1), choice.group(2), re.findall(r"[^\s',]+", choice.group(3))
            hint = did_you_mean(given, known, f"choose one of {', '.join(known)}")
            raise ConfigError(f"{name} is {given!r}; {hint}")
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        hint = "" if unknown is None else did_you_mean(unknown.group(1), self._option_string_actions)
        raise ConfigError(f"{message}; {hint or f'`{self.prog} --help` lists the options'}")


def whole(least: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number, of at least so much."""
    wanted = "a whole number" + ("" if least is None else f" of at least {least}")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (least is not None and value < least):
            raise argparse.ArgumentTypeError(f"is {text!r}; give {wanted}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """The type of an option that is a number, neither NaN nor infinite, within bounds."""
    bounds = [f"{word} {bound:g}" for word, bound in (("above", above), ("of at least", least), ("at most", most))
              if math.isfinite(bound)]  # fmt: skip
    wanted = " ".join(["a number", " and ".join(bounds)]).strip()

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above and least <= value <= most):
            raise argparse.ArgumentTypeError(f"is {text!r}; give {wanted}")
        return value

    return read


def add_text_options(group: argparse._ArgumentGroup) -> None:
    """The options of a command that say which text; names are those of moebed.checkpoints.text_options.TextOptions."""
    group.add_argument(
        "--text",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="text files, a sequence each; or paper-short, paper-long[=FILE], paper-chosen",
    )
    group.add_argument("--input-ids", action="extend", nargs="+", metavar="FILE.npy", help="token ids, a sequence each")
    group.add_argument(
        "--domain",
        action="append",
        metavar="NAME=FILE",
        help="a labelled domain for the domain probes; may be repeated",
    )
    group.add_argument(
        "--sequence-length", type=whole(2), metavar="N", help="tokens of a domain's sequences; default 256"
    )
    group.add_argument("--domain-tokens", type=whole(2), metavar="N", help="tokens of each domain; default 8192")
    group.add_argument(
        "--text-field", metavar="KEY", help="column or key of a domain's text, if it holds records; default text"
    )


def parse_yaml(text: str) -> Any:
    """Plain data of YAML, in which 1e-5 is a number, as it is for ``moebed fit``; raises yaml.YAMLError."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("+-.0123456789"))
    return yaml.load(text, Loader)


def parse_setting(given: str, value: str) -> Any:
    """The value of ``given``, KEY=VALUE on a command line; raises ConfigError where it is not YAML."""
    import yaml

    try:
        return parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{given!r}: {value!r} is no YAML ({' '.join(str(error).split())}); quote it") from error


def read_yaml(path: Path, called: str = "") -> Any:
    """The content of a YAML file.

    Args:
        path: The file.
        called: What an error calls it in front of its path.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or is not YAML.
    """
    import yaml

    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause, advice = " ".join(str(error).split()), "give a file of YAML"
        if isinstance(error, IsADirectoryError):
            inside = sorted(path.glob("*.yaml"))
            cause, advice = "it is a folder", f"give a file in it, such as {inside[0]}" if inside else advice
        elif isinstance(error, FileNotFoundError):
            beside = [str(other) for other in path.parent.glob("*.yaml")]
            cause, advice = "there is no such file", did_you_mean(path, beside, advice)
        raise ConfigError(f"{called} {path} cannot be read ({cause}); {advice}".lstrip()) from error


def require_run_folder(path: Path) -> None:
    """Raise UserError where there is no folder, and a run's is wanted."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the folder of a run or of a probed checkpoint")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a run's recipe; raises ConfigError as :func:`read_yaml`, for none, and for those of a study."""
    content = read_yaml(path, "recipe")
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path} holds no settings by name; give a recipe, or a run's config.yaml")
    if is_study(content):
        raise ConfigError(f"{path} is a study, and no recipe of one run: `moebed study {path}` runs it")
    return content


def stray_argument(given: str) -> ConfigError:
    """What is said of an argument of a training command that belongs to no option."""
    hint = f"; a recipe is given as --config {given}" if given.endswith((".yaml", ".yml")) else ""
    return ConfigError(f"{given!r} belongs to no option{hint}")


def is_run_recipe(content: Mapping[str, Any]) -> bool:
    """Whether the keys of a YAML file are those of a run, and none that a study needs."""
    return bool({"trainer", "model", "data"} & content.keys()) and not is_study(content)


def is_study(content: Mapping[str, Any]) -> bool:
    """Whether the keys of a YAML file are those of a study."""
    return bool({"arms", "like"} & content.keys())


def names_recipe(value: str) -> bool:
    """Whether what ``--config`` is given is a file, there or not, and not the settings themselves."""
    return ":" not in value or os.path.isfile(value)
