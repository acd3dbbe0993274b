"""Which paths are traces, by their names. Needs no PyTorch: the command asks before that is loaded."""

from __future__ import annotations

from pathlib import Path

MEGATRON = "router_trace_rank*.jsonl"  # files of one folder, a rank each


def is_trace(path: Path) -> bool:
    """Whether a path is that of a trace: a ``.jsonl`` file, or a folder of Megatron's."""
    if path.is_dir():
        return any(path.glob(MEGATRON)) and not (path / "config.json").exists()
    return path.suffix == ".jsonl" and path.is_file()
