"""What a kernel that ships says about itself: enough to compile it without a device, and to account for its bytes.

Each kernel file makes ``KernelSpec`` objects from the same table of tiles that its launch code reads, and
``triton_kernels/shipped.py`` joins them to one list, ``SHIPPED``: what the gates (``triton_kernels.gates``) compile
and check is then what a launch can pick. Nothing here imports torch or Triton.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.
BM × BN the output tile of a program, BK the depth of one step of its loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

from triton_kernels.configs import ARCHS

DIMENSIONS = "TKREHFG"
DTYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Argument:
    """One run-time argument of a kernel.

    Attributes:
        type: Triton's name of the type: ``"*T"`` (pointer to the element type that is being compiled for), ``"*i32"``,
            ``"*fp32"``, ``"i32"``, ``"i64"``, ``"fp32"``, or ``"tensordesc<T[128,64]>"`` for a host-made descriptor.
        aligned: the address (of a pointer) or the value (of a stride or size) is a multiple of 16 at every launch.
        shape: letters of the tensor that a pointer or descriptor stands for, ``"TH"``, ``"RG"``, ``"EGH"``; what the
            launch moves is counted from it. Empty where nothing worth counting moves.
        passes: times that the kernel moves the whole tensor between memory and chip if every tile that several
            programs share is found in L2: 1 to read it or to write it, 2 to read it and to write it back.
    """

    type: str
    aligned: bool = False
    shape: str = ""
    passes: float = 1.0

    def __post_init__(self) -> None:
        if set(self.shape) - set(DIMENSIONS):
            raise ValueError(f"shape {self.shape!r}: its letters are among {DIMENSIONS}")


@dataclass(frozen=True)
class KernelSpec:
    """One kernel in one configuration that ships.

    Attributes:
        name: unique, as the table shows it: ``"up 128x256x64 w8 s3 tma"``.
        kernel: the ``@triton.jit`` function, without its autotuner.
        op: the launch that it can serve: ``up``, ``down``, ``combine``, ``grad_hidden``, ... Of each op one spec runs;
            the first in ``SHIPPED`` that names an architecture, and serves the width, is what the roofline counts.
        backward: the op belongs to the backward pass.
        arguments: run-time arguments by name, in any order; every other parameter is a constexpr.
        constexprs: values of the constexpr parameters; the string ``"T"`` is replaced by the element type.
        tile: (BM, BN, BK); BN counts all columns that a loaded row tile meets (gate and up together). (0, 0, 0) for
            a kernel without matrix products, which only the gates on spills and widths apply to.
        loop_flops: FLOPs that one program issues to the tensor cores in one step of its main loop, 2·BM·BN·BK for a
            plain product.
        flops: useful FLOPs of the whole launch in units of R·H·F: up 4, down 2, 0 for a kernel without products.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline that is asked for.
        archs: of ``configs.ARCHS``, those that it ships for.
        dtypes: element types that it ships for, of ``fp16``, ``bf16``, ``fp32``.
        gathers_indices: the main loop loads an index for each row: those loads may be narrow.
        row_step: rows of R that a program takes at a time, whole steps being padded: BM, or BK where the rows are what
            the loop runs over (dW). None stands for BM.
        least_width: F from which launches take it in place of what serves narrower experts.
    """

    name: str
    kernel: JITFunction
    op: str
    backward: bool
    arguments: Mapping[str, Argument]
    constexprs: Mapping[str, Any]
    tile: tuple[int, int, int]
    loop_flops: int
    flops: float
    num_warps: int
    num_stages: int
    archs: tuple[str, ...] = ARCHS
    dtypes: tuple[str, ...] = DTYPES
    gathers_indices: bool = False
    row_step: int | None = None
    least_width: int = 0

    @property
    def is_product(self) -> bool:
        """Whether the kernel multiplies matrices."""
        return self.loop_flops > 0

    @property
    def intensity(self) -> float:
        """AI = BM·BN/(BM+BN), FLOPs per byte that a program reads of 2-byte elements; 0 without products."""
        rows, columns, _ = self.tile
        return rows * columns / (rows + columns) if self.is_product else 0.0
