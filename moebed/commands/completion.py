"""``moebed completion bash|zsh|fish``: a script that completes commands and their options in a shell."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import fields
from inspect import signature

from moebed.arguments import OneLineParser
from moebed.cli import COMMANDS

SHELLS = ("bash", "zsh", "fish")
TRAINING = ("fit", "validate", "test", "predict")
OF_TRAINER = ("default_root_dir", "max_steps", "accelerator", "devices", "precision", "val_check_interval")
OF_SHELL = {
    "bash": """_moebed() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" known
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) known="" ;;
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then known="{commands}"; fi
  COMPREPLY=($(compgen -W "$known" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _moebed moebed""",
    "fish": "complete -c moebed -n __fish_use_subcommand -a '{commands}'\n{lines}",
}
OF_SHELL["zsh"] = "autoload -U +X bashcompinit && bashcompinit\n" + OF_SHELL["bash"]


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed completion",
        description="Print a script that completes moebed's commands and options. For bash: `moebed completion bash > "
        "~/.local/share/bash-completion/completions/moebed`; for zsh: `moebed completion zsh >> ~/.zshrc`; for fish: "
        "`moebed completion fish > ~/.config/fish/completions/moebed.fish`.",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Print the script.

    Raises:
        ConfigError: There is none for that shell.
    """
    print(script(build_parser().parse_args(arguments).shell))


def script(shell: str) -> str:
    """The script, with all options in it: a shell that completes starts no Python."""
    known = {command: " ".join(options_of(command)) for command in COMMANDS}
    cases = "\n".join(f'    {command}) known="{options}" ;;' for command, options in known.items())
    lines = "\n".join(
        f"complete -c moebed -n '__fish_seen_subcommand_from {command}' -l {option.removeprefix('--')}"
        for command, options in known.items()
        for option in options.split()
        if option.startswith("--")
    )
    return OF_SHELL[shell].format(cases=cases, commands=" ".join(COMMANDS), lines=lines)


def options_of(command: str) -> list[str]:
    """The options of a command; of those that train the keys of model and data, and what of the Trainer is common."""
    if command in TRAINING:
        from moebed.data.datamodule import TextDataModule
        from moebed.model.config import ModelConfig

        keys = ["config", "ckpt_path", "print_plan", *(f"trainer.{name}" for name in OF_TRAINER)]
        keys += [f"model.config.{field.name}" for field in fields(ModelConfig)]
        keys += [f"data.{name}" for name in list(signature(TextDataModule.__init__).parameters)[1:]]
        return [f"--{key}" for key in (*keys, "help", "plugins")]
    from moebed.training.jsonargparse_private import long_options

    return list(
        dict.fromkeys(["--plugins", *long_options(importlib.import_module(COMMANDS[command][0]).build_parser())])
    )
