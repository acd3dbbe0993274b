"""Arguments of a subcommand, and files in their place, whose errors are one line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from moebed.errors import ConfigError, UserError, did_you_mean

_NEGATIVE = re.compile(r"-\.?\d")
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")  # YAML 1.1 asks for a point and a sign


class OneLineParser(argparse.ArgumentParser):
    """Errors become a ConfigError of one line instead of a usage text; half an option must not set another."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._negative_number_matcher = _NEGATIVE  # -5GiB is a value, for its option to refuse

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self._hint(message) or f'`{self.prog} --help` lists the options'}")

    def _hint(self, message: str) -> str:
        """The option, or the choice, that was meant, where one is near to what was written."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown is not None:
            return did_you_mean(unknown.group(1), self._option_string_actions)
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        return "" if choice is None else did_you_mean(choice.group(1), re.findall(r"[^\s',]+", choice.group(2)))


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
    group.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a domain's sequences; default 256")
    group.add_argument("--domain-tokens", type=int, metavar="N", help="tokens of each domain; default 8192")
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
