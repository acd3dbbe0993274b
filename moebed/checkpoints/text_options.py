"""Which text a pretrained checkpoint is to be looked at with, and whether it is there; needs no PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moebed.data.file_formats import require_known
from moebed.errors import ConfigError
from moebed.machine.places import require_file

PAPER_LONG = "paper-long"
PRESETS = ("paper-short", PAPER_LONG, "paper-chosen")


@dataclass
class TextOptions:
    """Which text to run.

    Args:
        text: Text files, a sequence each; or presets of the paper: paper-short, paper-chosen, and paper-long, which may
            name a local file with the WikiText-103 test set, as paper-long=FILE.
        input_ids: ``.npy`` files of token ids, a sequence each (S,), or several of one length (B, S).
        domain: NAME=FILE, a domain each; the file's documents are cut to ``sequence_length`` tokens.
        sequence_length: Tokens of a domain's sequences at most.
        domain_tokens: Tokens of each domain at most; its documents are taken evenly over the file.
        text_field: Column or key that holds the text of a domain whose documents are records.
    """

    text: list[str] = field(default_factory=list)
    input_ids: list[str] = field(default_factory=list)
    domain: list[str] = field(default_factory=list)
    sequence_length: int = 256
    domain_tokens: int = 8192
    text_field: str = "text"

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that are out of range, UserError for a file that is not there."""
        for name in ("sequence_length", "domain_tokens"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 2")
        for name in self.text:
            text_file(name)
        for name in self.input_ids:
            require_file(Path(name), f"--input-ids {name}", "give a .npy file of integers", b"\x93NUMPY")
        labels: set[str] = {"text"} if self.text or self.input_ids else set()
        for name in self.domain:
            label, _ = domain_file(name)
            if label in labels:
                raise ConfigError(f"--domain {name}: there are two domains called {label}; give each a name of its own")
            labels.add(label)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TextOptions:
        """Those that are given among a command's options."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names and value is not None})

    def __bool__(self) -> bool:
        """Whether any text was asked for."""
        return bool(self.text or self.input_ids or self.domain)


def text_file(name: str) -> Path | None:
    """The file of what ``--text`` is given; None for a preset that is none.

    Raises:
        UserError: It is neither.
    """
    preset, _, file = name.partition("=")
    if preset == PAPER_LONG and file:
        require_file(Path(file), f"--text {name}", "give WikiText-103's test set, a line of text a line")
        return Path(file)
    path = Path(name)
    if name in PRESETS and not path.is_file():
        return None
    advice = f"give one, or one of {', '.join(PRESETS)}"
    if os.path.isdir(name):
        advice = f"give the files in it, such as {name.rstrip('/')}/*.txt"
    require_file(path, f"--text {name}", advice)
    return path


def domain_file(given: str) -> tuple[str, Path]:
    """The name and the file of what ``--domain`` is given.

    Raises:
        ConfigError: It is not written as NAME=FILE.
        UserError: There is no such file, or none of a kind that is known.
    """
    label, separator, file = given.partition("=")
    if not separator or not label or not file:
        raise ConfigError(f"--domain {given}: write it as NAME=FILE")
    if not re.fullmatch(r"[\w.+ -]+", label):
        raise ConfigError(f"--domain {given}: a name has letters, digits, spaces and . + - _ only")
    require_file(Path(file), f"--domain {given}", "give one file of text")
    require_known(Path(file), f"--domain {given}")
    return label, Path(file)
