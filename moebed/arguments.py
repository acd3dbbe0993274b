"""Arguments of a subcommand, whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from moebed.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Errors become a ConfigError of one line instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the options")
