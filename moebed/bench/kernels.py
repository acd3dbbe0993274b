"""``moebed bench kernels``: the gates and the roofline of the Triton kernels, and their times where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from moebed.errors import UserError

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("fp16", "bf16", "fp32")


def static(
    archs: Sequence[str], dtypes: Sequence[str], match: str, first: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compile what ships for these architectures and types and hold it to the gates; needs Triton, but no GPU.

    Args:
        archs: of ``ARCHS``.
        dtypes: of ``DTYPES``.
        match: only kernels whose name contains this.
        first: of each op, type and architecture, the first configuration alone.
        progress: is told what is being compiled.

    Raises:
        UserError: no Triton, kernels are being interpreted, or nothing matches.
    """
    try:
        from triton_kernels.gates import check, roofline
        from triton_kernels.shipped import SHIPPED
    except ImportError as error:
        raise UserError(f"moebed bench kernels needs Triton, which is not here ({error})") from error
    from triton import knobs

    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    specs = [spec for spec in SHIPPED if match in spec.name]
    wanted = []
    for arch in archs:
        for dtype in dtypes:
            ships = [spec for spec in specs if arch in spec.archs and dtype in spec.dtypes]
            chosen = roofline.launched(ships, arch, dtype) if first else ships
            wanted += [(spec, arch, dtype) for spec in chosen]
    if not wanted:
        raise UserError(f"no kernel that ships matches --only {match!r}, {', '.join(archs)} and {', '.join(dtypes)}")
    rows = []
    for number, (spec, arch, dtype) in enumerate(wanted, 1):
        progress(f"{number} of {len(wanted)}: {spec.name}, {arch}, {dtype}")
        rows.append(check.check(spec, dtype, arch))
    best = check.best_gates(rows)
    padding = [
        {"shape": shape.name, "op": spec.op, "drawn": drawn, "half_a_step": bound}
        for spec in roofline.launched(SHIPPED, "sm_90", "bf16")
        if spec.is_product
        for shape in roofline.SHAPES
        for drawn, bound in (roofline.wasted_share(spec, shape),)
    ]
    return {
        "rows": [row.plain() | {"missed": [gate.name for gate in row.missed]} for row in rows],
        "best": {op: [asdict(gate) for gate in gates] for op, gates in best.items()},
        "roofline": roofline.compare(SHIPPED),
        "padding": padding,
    }


def timed(names: Sequence[str], tokens: int | None, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Times on a CUDA device beside torch's grouped_mm and the peers that import, in bf16.

    Raises:
        UserError: there is no CUDA device.
    """
    import torch

    from moebed.bench import experts

    if not torch.cuda.is_available():
        raise UserError("moebed bench kernels times on a CUDA device, and there is none; --static needs none")
    device = torch.device("cuda")
    cases = [experts.case(name, tokens, device) for name in names]
    return [experts.run(each, "bfloat16", device, rounds, steps, gpu_only=True) for each in cases]
