"""Which code a run of a study was computed by: kept for each, and said where it is not the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebed.machine.provenance import source_now

Code = Mapping[str, str]  # source: digits that stand for it, torch: its version

UNKNOWN: Code = {"source": "not recorded", "torch": "unknown"}
_PACKAGES = ("moebed", "probes", "triton_kernels")
_ENDINGS = (".py", ".cpp", ".h")


def code_so_far(record: Mapping[str, Any]) -> list[Code]:
    """The code of a run that starts or goes on now: what it was begun by, as kept of it, then what lies there."""
    import torch

    found = list(record.get("code", [UNKNOWN] if record else []))
    now = {"source": source_now(*_PACKAGES, endings=_ENDINGS), "torch": torch.__version__}
    return found if now in found else [*found, now]


def differing_code(study: Mapping[str, Any]) -> str:
    """A sentence, where the finished runs of a study were computed by more than one code; files may know none."""
    runs: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, arm in study["arms"].items():
        for seed, run in arm["runs"].items():
            for code in (run.get("code") or [UNKNOWN]) if run["status"] == "finished" else []:
                runs.setdefault((code["source"], code["torch"]), {}).setdefault(name, []).append(seed)
    if len(runs) < 2:
        return ""
    listed = [
        f"{source} (torch {torch}) in "
        + ", ".join(f"{name} seed{'s' if len(seeds) > 1 else ''} {' '.join(seeds)}" for name, seeds in arms.items())
        for (source, torch), arms in runs.items()
    ]
    return f"NOT ONE CODE: differences may be those of moebed's source, which is {'; '.join(listed)}."
