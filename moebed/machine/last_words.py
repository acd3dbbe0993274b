"""What a process of moebed said last in its log."""

from __future__ import annotations

from pathlib import Path


def last_words(log: Path, begin: int) -> str:
    """The line of the error, or the last one, of what was said from a byte on."""
    text = log.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("moebed: error: ") for line in lines if line.startswith("moebed: error: ")]
    return (errors or lines or ["it said nothing"])[-1]
