"""Numbers as a person reads and writes them."""

from __future__ import annotations

import re

from moebed.errors import ConfigError

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def human(value: float, unit: str = "", digits: int = 3) -> str:
    """Three digits, or as many as are asked for, and a decimal prefix: 3.62 G, 81.3 GB."""
    for size, prefix in _PREFIXES:
        if float(f"{value:.{digits}g}") >= size:  # what rounds to a thousand of one has the next: 1e+03 MB is none
            return f"{value / size:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}".rstrip()


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or a string such as 8GiB, 500MB.

    Raises:
        ConfigError: It is no such string.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", str(text), re.IGNORECASE)
    if found is None or found.group(2).upper() not in _BYTES:
        raise ConfigError(f"memory_budget is {text!r}; write it such as 8GiB or 500MB")
    size = int(float(found.group(1)) * _BYTES[found.group(2).upper()])
    if size < 1:
        raise ConfigError(f"memory_budget is {text!r}; write more than nothing, such as 8GiB or 500MB")
    return size
