"""Tiles that were the fastest on this kind of device, as ``moebed check`` measured them; read by the next launch.

One JSON file for each kind of device, in the user's cache folder. It serves only the Triton, the source of these
kernels and the shipped table that it was measured with; otherwise the shipped tiles do, which is said once.
``EXPERT_MLP_TILES`` in the environment is another file, or ``shipped`` for no file at all. Imports neither torch nor
Triton.

What it may change leaves every tensor's size as it is: BM belongs to the shipped table (see ``routing``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from triton_kernels.configs import Config, Tile, WeightTile

SWITCH = "EXPERT_MLP_TILES"
SHIPPED = "shipped"
OPS = ("up", "down", "grad_hidden", "grad_rows", "grad_up", "grad_down")


def path_of(device: str) -> Path:
    """The file for a device of this name; it need not be there."""
    cache_folder = Path(os.environ.get("MOEBED_CACHE") or "~/.cache/moebed").expanduser()
    return cache_folder / "expert_mlp_tiles" / f"{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"


@cache
def source() -> str:
    """Stands for the source of the kernels."""
    folder, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def content(device: str, triton: str, base: Config, tiles: Mapping[str, Tile | WeightTile], measured: Any) -> str:
    """What the file holds.

    Args:
        device: Name of the device.
        triton: Version of Triton.
        base: The shipped table.
        tiles: Those that differ from it, by op.
        measured: Figures that they were chosen by.
    """
    made_with = {"device": device, "triton": triton, "source": source(), "base": base.name}
    record = made_with | {"tiles": {op: asdict(tile) for op, tile in tiles.items()}, "measured": measured}
    return json.dumps(record, indent=1) + "\n"


@cache
def tuned(base: Config, device: str, triton: str) -> Config:
    """The tiles of a launch; warns, once, of a file that is there and does not serve.

    Args:
        base: The shipped table for this device and element size.
        device: Name of the device.
        triton: Version of Triton.
    """
    chosen = os.environ.get(SWITCH)
    path = Path(chosen) if chosen and chosen != SHIPPED else path_of(device)
    if chosen == SHIPPED or not path.is_file():
        return base
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["base"] != base.name:  # of another element size
            return base
        wanted = {"device": device, "triton": triton, "source": source()}
        other = [f"{name} {kept[name]}" for name, value in wanted.items() if kept[name] != value]
        if not other:
            made = {op: replace(getattr(base, op), **tile) for op, tile in kept["tiles"].items() if op in OPS}
            return replace(base, **made)
        why = f"were measured with {', '.join(other)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"cannot be read ({type(error).__name__})"
    warnings.warn(
        f"expert_mlp: the tiles in {path} {why}, so the shipped ones serve; `moebed check --only tiles` measures anew",
        stacklevel=2,
    )
    return base
