"""Files of traces: which format they are of, read line by line, and written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from moebed.errors import UserError
from moebed.machine import provenance, storage
from moebed.traces import megatron, vllm
from moebed.traces.paths import MEGATRON
from moebed.traces.trace import RoutingTrace

FORMATS = {one.KIND: one for one in (vllm, megatron)}


def read_trace(path: Path, num_experts: int | None = None) -> RoutingTrace:
    """Read a trace; the first line tells its format.

    Args:
        path: A file, or a folder with those of several ranks.
        num_experts: Of every layer; if not given, what the trace says, else the largest number in it and one.

    Raises:
        UserError: It is of no format that is known, or damaged.
    """
    files = sorted(path.glob(MEGATRON)) if path.is_dir() else [path]
    lines = chain.from_iterable(map(_lines, files))
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} is empty; give a trace with a line a sequence or a layer")
    kind = next((one for one in FORMATS.values() if one.is_line(first[1])), None)
    if kind is None:
        raise UserError(
            f"{first[0]} is neither a record of Megatron's routing (top_indices) nor a response of vLLM's with "
            "routed_experts"
        )
    trace = kind.read(chain([first], lines), path.name, num_experts)
    return replace(trace, files=provenance.files_record({file.name: file for file in files}))


def write_trace(trace: RoutingTrace, path: Path, kind: str = vllm.KIND) -> None:
    """Write a trace in a format."""
    storage.write_text(path, FORMATS[kind].write(trace))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What an error calls each line, and the object that it holds."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                what = f"{path.name} line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    raise UserError(f"{what} is no JSON; is the file whole?") from None
                if not isinstance(record, dict):
                    raise UserError(f"{what} is no object of JSON")
                yield what, record
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error})") from error
