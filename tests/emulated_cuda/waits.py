"""What makes the host wait for the emulated devices: how often, by which operation, and where in the project."""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class WAITS:
    """What made the host wait since ``forget``, while ``torch.cuda.set_sync_debug_mode("warn")`` held."""

    device: ctypes.CDLL

    @classmethod
    def counted(cls) -> dict[str, int]:
        """How often, by PyTorch's operation."""
        text = ctypes.create_string_buffer(1 << 16)
        cls.device.emulated_waits(text, len(text))
        return {what: int(count) for what, count in (line.split("\t") for line in text.value.decode().splitlines())}

    @classmethod
    def forget(cls) -> None:
        """Count from 0 again."""
        cls.device.emulated_forget_waits()


def place() -> str:
    """``file:line function`` of the innermost function of moebed or the probes, or of anything where there is none."""
    frame, nearest = sys._getframe(1), "a thread of PyTorch's"
    while frame is not None:
        file, where = Path(frame.f_code.co_filename), f":{frame.f_lineno} {frame.f_code.co_name}"
        if file.is_relative_to(ROOT / "moebed") or file.is_relative_to(ROOT / "probes"):
            return f"{file.relative_to(ROOT)}{where}"
        if nearest.startswith("a thread") and file != Path(__file__):
            nearest = f"{file.parent.name}/{file.name}{where}"
        frame = frame.f_back
    return nearest


@contextlib.contextmanager
def noted() -> Iterator[collections.Counter[str]]:
    """Each wait of a block by its place and operation; nobody is warned of them."""
    found: collections.Counter[str] = collections.Counter()

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def note(what: bytes) -> None:
        found[f"{place()}: {what.decode()}"] += 1

    WAITS.device.emulated_tell_of_waits(note)
    WAITS.device.emulated_wait_mode(1)
    try:
        yield found
    finally:
        WAITS.device.emulated_wait_mode(0)
        WAITS.device.emulated_tell_of_waits(None)


def install(device: ctypes.CDLL) -> None:
    """Note them from the start of the process to its end, if ``EMULATED_CUDA_WAITS`` names a folder for that."""
    WAITS.device = device
    if "EMULATED_CUDA_WAITS" not in os.environ:
        return
    block = noted()
    found = block.__enter__()

    def leave() -> None:
        block.__exit__(None, None, None)
        folder = Path(os.environ["EMULATED_CUDA_WAITS"])
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{os.environ.get('LOCAL_RANK', '0')}-{os.getpid()}.json"
        (folder / name).write_text(json.dumps(dict(found.most_common()), indent=1), encoding="utf-8")

    atexit.register(leave)
