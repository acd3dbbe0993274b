"""All that has no public name in jsonargparse, argparse beneath it and LightningCLI: it is reached here alone."""

from __future__ import annotations

from argparse import ArgumentParser as PlainParser
from argparse import _SubParsersAction as SubParsersAction
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from moebed.former_names import with_present_names


class PresentNames(LightningArgumentParser):
    """A config may have names of former versions: they are replaced in the text before it is parsed."""

    def _load_config_parser_mode(self, content: str, *arguments: Any, **options: Any) -> Any:
        return super()._load_config_parser_mode(with_present_names(content), *arguments, **options)


def option_names(parser: PlainParser) -> list[str]:
    """The keys that a parser knows; of one with subcommands those of the first, which is the one that is called."""
    subcommands = getattr(parser, "_subcommands_action", None)
    if subcommands is not None:
        parser = next(iter(subcommands._name_parser_map.values()))
    return [action.dest for action in parser._actions]


def type_of(parser: PlainParser, key: str) -> Any:
    """The type of a key's value; None where it only has settings beneath it, or is not known."""
    subcommands = getattr(parser, "_subcommands_action", None)
    if subcommands is not None:
        parser = next(iter(subcommands._name_parser_map.values()))
    for action in parser._actions:
        if action.dest == key:
            return getattr(action, "_typehint", None)
    return None


def subcommand_parser(cli: LightningCLI, name: str) -> ArgumentParser:
    """The parser of one subcommand."""
    return cli._parser(name)


def long_options(parser: PlainParser) -> list[str]:
    """Options with two dashes of a parser, its commands, and theirs."""
    found: list[str] = []
    waiting = [parser]
    while waiting:
        for action in waiting.pop()._actions:
            found += [option for option in action.option_strings if option.startswith("--")]
            if isinstance(action, SubParsersAction):
                found += list(action.choices)
                waiting += action.choices.values()
    return found
