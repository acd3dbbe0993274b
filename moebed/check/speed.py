"""Step ``speed``: the expert MLP of published models, the kernels beside everything that computes the same.

Each row is ``moebed bench experts`` of one shape in bfloat16: forward, forward and backward, peak memory, and the share
of the roofline. At decoding sizes the forward pass counts, at all others both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moebed.bench import experts
from moebed.bench.peers import OWN, REFERENCE
from moebed.check.contract import Found, Place, Row, Verdict
from moebed.check.kernels import TIMED
from moebed.machine.units import human

KERNELS, BASE = OWN + "triton", OWN + "grouped_mm"
DECODED = {"mixtral": (1, 16, 128), "qwen3": (1, 16, 128)}  # tokens of a step of so many sequences
WIDE = ("A", "deepseekmoe")  # in float32 as well
ROUNDS, STEPS = 5, 8


def rows(place: Place) -> Sequence[Row]:
    """Of the step."""

    def row(name: str, tokens: int | None = None, dtype: str = "bfloat16") -> Row:
        label = name + (f", decoding {tokens}" if tokens else "") + (", float32" if dtype == "float32" else "")
        return Row(label, functools.partial(measure, place.device, name, tokens, dtype=dtype))

    whole = [row(name) for name in TIMED]
    decoded = [row(name, tokens) for name, sizes in DECODED.items() for tokens in sizes]
    return [*whole, *(row(name, dtype="float32") for name in WIDE), *decoded]


def measure(
    device: str, name: str, tokens: int | None, rounds: int = ROUNDS, steps: int = STEPS, dtype: str = "bfloat16"
) -> Found:
    """One shape."""
    on, phase = torch.device(device), "forward" if tokens else "both"
    found = experts.run(experts.case(name, tokens, on), dtype, on, rounds, steps, gpu_only=on.type == "cuda")
    return judge(found | {"phase": phase}, phase)


def judge(found: Mapping[str, Any], phase: str) -> Found:
    """The verdict on our kernels, by the figures of all contestants."""
    by_name = {row["name"]: row for row in found["rows"]}
    ours = by_name.get(KERNELS)
    if ours is None:
        return Found(f"the kernels were left out: {found['left_out'].get(KERNELS)}", found, Verdict.WRONG)
    if not ours["agrees"]:
        return Found(f"the kernels differ from the {REFERENCE} by {ours['difference']:.1e}", found, Verdict.WRONG)
    right = {row["name"]: row[f"{phase}_seconds"] for row in found["rows"] if row["agrees"]}
    seconds = right.pop(KERNELS)
    others = ", ".join(f"{each / seconds:.2f} {name}" for name, each in sorted(right.items(), key=lambda item: item[1]))
    said = f"{'forward' if phase == 'forward' else 'forward and backward'} {1e3 * seconds:.3f} ms; times {others}"
    if "share_of_roofline" in ours:
        said += f"; {ours['share_of_roofline']:.2f} of the roofline"
    said += f"; peak {human(ours['peak_bytes'], 'B')}"
    differ = [row["name"] for row in found["rows"] if row["agrees"] is False]
    said += f"; different: {', '.join(differ)}" if differ else ""
    said += f"; left out: {', '.join(found['left_out'])}" if found["left_out"] else ""
    verdict = Verdict.SLOW if BASE in right and right[BASE] < seconds else Verdict.WORKS
    return Found(said, found, verdict)
