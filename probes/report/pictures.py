"""Pictures of a page: as small as 256 colours make them, each once."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from probes.running import store
from probes.running.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = 20_000  # bytes below which a picture stays as it is


def drawn(run: RunFolder, name: str, figure: str, build: Callable[[], Figure]) -> bytes:
    """A probe's picture: the one that lies in the folder, where it is as new as the arrays, or one drawn now."""
    path, arrays = store.picture_path(run.folder, name, figure), store.arrays_path(run.folder, name)
    is_new = path.exists() and arrays.exists() and path.stat().st_mtime_ns >= arrays.stat().st_mtime_ns
    return compact(path.read_bytes()) if is_new else png(build())


def png(fig: Figure) -> bytes:
    """A figure as a PNG of a page."""
    from probes.figures.drawing import to_png

    return compact(to_png(fig))


def compact(picture: bytes) -> bytes:
    """The same PNG in 256 colours, where that is smaller: a third of the bytes, with no difference to be seen."""
    if len(picture) < SMALL:
        return picture
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", compress_level=7)
    return min(picture, buffer.getvalue(), key=len)
