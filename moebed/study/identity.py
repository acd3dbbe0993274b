"""What a run is: every setting that decides its result; and what of that has changed since it was begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from moebed.errors import UserError
from moebed.study.files import read_json
from moebed.study.resolving import flatten, resolve

TEXT = "data.content"  # tells the text of two days or two machines apart where paths do not; of runs that train
# Where things lie and what is shown while they are made: no part of what a run is.
_NOT_IDENTITY = (
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "checkpoint.dirpath",
    "data.cache_dir",
    "ckpt_path",
    "model.init_from",
)
_SEEDS = ("seed_everything", "data.seed")
_NO_SETTINGS = (TEXT, "after", "plugins", "moebed", "torch", "seed")


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Twelve digits that stand for settings."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key, what decides the result of a run of ``moebed fit``, of its whole config."""
    return {key: value for key, value in flatten(content).items() if key not in (*_NOT_IDENTITY, *_SEEDS)}


def known_as(kind: str, identity: dict[str, Any], out: Path) -> str:
    """The fingerprint under which a study's folder has an earlier step, which it may have had before settings came."""
    own = fingerprint(identity)
    if "seed" not in identity and not (out / "status" / "stages" / f"{kind}_{own}").exists():
        for path in sorted(out.glob(f"status/stages/{kind}_*/seed_*.json")):
            old = read_json(path)["identity"]
            if not changes(old, identity | {"seed": old["seed"]}):
                return path.parent.name.removeprefix(f"{kind}_")
    return own


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of a run has changed, in words.

    A setting that the run was begun without, since there was none of the name, and that has its default now, is no
    change: the old settings are read anew, and are what they are read to be.
    """
    if TEXT in old and TEXT in new:
        old = {**old, **_read_anew(json.dumps({key: old[key] for key in old if key not in _NO_SETTINGS}))}
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


@cache  # arms have several seeds
def _read_anew(settings: str) -> dict[str, Any]:
    """What settings are read to be today; nothing where they cannot be read any more."""
    try:
        return settings_of(resolve(["--config", json.dumps(_nested(json.loads(settings)))]).content)
    except UserError:
        return {}


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of ``flatten``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found
