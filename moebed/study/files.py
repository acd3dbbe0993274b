"""Small files of a study: read with errors in words, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moebed.errors import UserError
from moebed.machine import storage

FORMAT = 1
STUDY_FILE = "study.json"


def write_json(path: Path, content: Any) -> Path:
    """Plain data as JSON; not-a-number is an error here, since JSON has no such thing."""
    return storage.write_text(
        path, json.dumps(content, indent=1, allow_nan=False) + "\n", "make room or choose another --out"
    )


def read_json(path: Path) -> Any:
    """Plain data, or None where there is no such file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({storage.reason_of(error)}); delete it and run the study again"
        ) from error


def load_study(path: Path) -> dict[str, Any]:
    """Read a ``study.json``.

    Raises:
        UserError: It is missing or damaged, or another version of moebed wrote it.
    """
    content = read_json(path)
    if content is None:
        raise UserError(f"{path} does not exist; `moebed study RECIPE.yaml` writes it")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no study.json of this version; run `moebed study RECIPE.yaml --collect` again")
    return content
