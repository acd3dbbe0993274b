"""Arguments of a subcommand, and files in their place, whose errors are one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from moebed.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Errors become a ConfigError of one line instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the options")


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
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{called} {path} cannot be read as YAML ({' '.join(str(error).split())}); mend it there".lstrip()
        ) from error
