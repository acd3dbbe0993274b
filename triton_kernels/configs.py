"""Tile sizes: what each kernel is launched with, by device and by shape class. Imports neither torch nor Triton.

R = T·K rows of the sorted order, E experts. BM × BN is the output tile of a program, BK the depth of a step.

All kernels that walk the rows share one BM, because they share one table of tiles (see ``routing``). There is one
configuration for each kind of device, and no launch times anything: two runs launch the same code. Each passes the
gates of ``triton_kernels.gates``; Hopper's were chosen on an H100, the others never timed. Candidates stand beside them
for ``moebed check`` to time, which writes what it chose where ``triton_kernels.tuned`` reads it.

One BM serves decoding too. Up to 256 rows an expert, reading the matrices takes an H100 longer than multiplying by
tiles of 128 rows, padding included, so that lower tiles have nothing to gain (``gates.roofline.padded_share``); from
there to 512 rows padding costs at most a third, of which tiles of 64 rows would save less than half, at 51 FLOPs a
byte of L2 in place of 85.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: BN columns, BK deep, with its warps, pipeline stages and the rows of tiles that share L2.

    A persistent one reads its dense operands through tensor descriptors (TMA) and runs one program for each
    multiprocessor. A flat one joins its loop over tiles with the one over depth, so that a tile's first loads are under
    way while the tile before is written. None asks for specialised warps: what Triton 3.6 makes of that on Hopper gives
    other sums each time.
    """

    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    persistent: bool = False
    flat: bool = False


@dataclass(frozen=True)
class WeightTile:
    """Tile of a weight gradient: BM rows and BN columns of one expert's matrix, BK rows of tokens a step."""

    rows: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 3
    group: int = 8


@dataclass(frozen=True)
class Config:
    """Tiles of every kernel of one launch of the expert MLP.

    Attributes:
        name: kind of device, as the gate table shows it.
        rows: BM of the kernels that walk the sorted rows.
        up: fused up and gate product; its columns count gate and up together.
        down: down product.
        grad_hidden: gradient of the unweighted activations.
        grad_rows: gradient of the gathered rows.
        grad_up: gradient of ``gate_up``.
        grad_down: gradient of ``down``.
        sorts: tokens' rows are copied into the sorted order before the products, which gather nothing.
        combine_tokens: tokens that one program of the combine sums.
        combine_columns: columns of one program of the combine.
        gather_rows: rows that one program copies where rows are sorted.
        gather_columns: columns that it takes in one step.
        activation_rows: rows that one program of the activation's backward passes over.
        activation_columns: columns that it takes in one step.
        routing_block: assignments of one program of the routing kernels.
        routing_experts: experts of one.
        routing_scan: numbers that the scans take in one step.
        routing_small: blocks × parts of the experts up to which one program routes alone, in place of four launches.
        split_rows: rows that a piece of a crowded expert's has at least in the weight gradients.
        archs: architectures that it ships for.
    """

    name: str
    rows: int
    up: Tile
    down: Tile
    grad_hidden: Tile
    grad_rows: Tile
    grad_up: WeightTile
    grad_down: WeightTile
    sorts: bool = False
    combine_tokens: int = 2
    combine_columns: int = 1024
    gather_rows: int = 32
    gather_columns: int = 256
    activation_rows: int = 4
    activation_columns: int = 128
    routing_block: int = 128
    routing_experts: int = 32
    routing_scan: int = 1024
    routing_small: int = 32
    split_rows: int = 4096
    archs: tuple[str, ...] = ARCHS

    def __post_init__(self) -> None:
        if self.sorts and not (self.up.persistent and self.grad_hidden.persistent):
            raise ValueError(f"{self.name}: only persistent kernels read rows that are sorted")


# 227 KiB of shared memory: three stages of (128 + 256) × 64 two-byte elements are 144 KiB. Where the loop first loads
# the row's token, the compiler spends two of its five stages on that and keeps three of the operands.
HOPPER = Config(
    name="hopper",
    rows=128,
    up=Tile(256, 64, warps=8, stages=3, persistent=True),
    down=Tile(256, 64, warps=8, stages=3, persistent=True, flat=True),
    grad_hidden=Tile(256, 64, warps=8, stages=3, persistent=True),
    grad_rows=Tile(256, 64, warps=8, stages=3, persistent=True, flat=True),
    grad_up=WeightTile(128, 256, 64, warps=8, stages=5),
    grad_down=WeightTile(128, 256, 64, warps=8, stages=5),
    archs=("sm_90",),
)

# A copy of the rows takes four bytes a number of R·H, once forward and twice backward, and saves a share of products
# that do 12·F FLOPs with each. On an H100, at 8192 tokens, both came to the same at F = 1408, and at 14336 copying took
# 5 % less, as a sum of parts; few tokens, as in decoding, were not timed.
SORTED_FROM = 4096  # F
HOPPER_SORTED = replace(
    HOPPER,
    name="hopper sorted",
    sorts=True,
    up=replace(HOPPER.up, flat=True),
    grad_hidden=replace(HOPPER.grad_hidden, flat=True),
    grad_up=replace(HOPPER.grad_up, stages=3),
    grad_down=replace(HOPPER.grad_down, stages=3),
)

BLACKWELL = replace(
    HOPPER,
    name="blackwell",
    down=replace(HOPPER.down, flat=False),
    grad_rows=replace(HOPPER.grad_rows, flat=False),
    archs=("sm_100",),
)

# 163 KiB, and 99 on GeForce and workstation chips of three generations: half the columns and half the depth leave room
# for two programs' memory on a multiprocessor of either.
AMPERE = Config(
    name="ampere",
    rows=128,
    up=Tile(128, 32, warps=8, stages=4),
    down=Tile(128, 32, warps=8, stages=4),
    grad_hidden=Tile(128, 32, warps=8, stages=4),
    grad_rows=Tile(128, 32, warps=8, stages=4),
    grad_up=WeightTile(128, 128, 32, warps=8, stages=7),
    grad_down=WeightTile(128, 128, 32, warps=8, stages=7),
    archs=("sm_80", "sm_86", "sm_89", "sm_120"),
)

# 64 KiB, and a pipeline that passes through registers.
CDNA = Config(
    name="cdna",
    rows=128,
    up=Tile(128, 32, warps=8, stages=2),
    down=Tile(128, 32, warps=8, stages=2),
    grad_hidden=Tile(128, 32, warps=8, stages=2),
    grad_rows=Tile(128, 32, warps=8, stages=2),
    grad_up=WeightTile(128, 128, 32, warps=8, stages=2),
    grad_down=WeightTile(128, 128, 32, warps=8, stages=2),
    archs=("gfx942",),
)

# An element of 4 bytes halves what fits, and accumulates in TF32 or plain float32: no large tile pays.
WIDE = Config(
    name="wide",
    rows=64,
    up=Tile(64, 32, warps=4, stages=3),
    down=Tile(64, 32, warps=4, stages=3),
    grad_hidden=Tile(64, 32, warps=4, stages=3),
    grad_rows=Tile(64, 32, warps=4, stages=3),
    grad_up=WeightTile(64, 64, 32, warps=8, stages=3),
    grad_down=WeightTile(64, 64, 32, warps=8, stages=3),
)

# The interpreter pays by the operation, not by the element: few programs, as large as a small model is.
INTERPRETED = Config(
    name="interpreted",
    rows=64,
    up=Tile(128, 64, group=2),
    down=Tile(64, 64, group=2),
    grad_hidden=Tile(64, 64, group=2),
    grad_rows=Tile(64, 64, group=2),
    grad_up=WeightTile(128, 64, 64, group=2),
    grad_down=WeightTile(64, 64, 64, group=2),
    combine_tokens=64,
    combine_columns=64,
    gather_rows=64,
    gather_columns=64,
    activation_rows=256,
    routing_block=256,
    split_rows=256,
    routing_experts=64,
    archs=(),
)

BY_NAME = {config.name: config for config in (HOPPER, HOPPER_SORTED, BLACKWELL, AMPERE, CDNA, WIDE, INTERPRETED)}
# From each compute capability on; 12 is the small multiprocessor again.
BY_CAPABILITY = (((12, 0), AMPERE), ((10, 0), BLACKWELL), ((9, 0), HOPPER), ((8, 0), AMPERE))


# What `moebed check` times beside a table's own tiles, by table and op; each passes the gates as the table does. BM and
# BK stay: the one belongs to the table of tiles, the other is the 128 bytes that TMA swizzles.
_GATHERED = (
    Tile(256, 64, warps=8, stages=3, persistent=True, flat=True),
    Tile(256, 64, warps=8, stages=3, group=4, persistent=True),
    Tile(256, 64, warps=8, stages=3, group=16, persistent=True),
)
_DENSE = (
    Tile(256, 64, warps=8, stages=4, persistent=True),
    Tile(256, 64, warps=8, stages=3, group=4, persistent=True, flat=True),
    Tile(256, 64, warps=8, stages=3, group=16, persistent=True, flat=True),
    Tile(128, 64, warps=4, stages=4, persistent=True),
)
_WEIGHTS = (
    WeightTile(128, 256, 64, warps=8, stages=5, group=4),
    WeightTile(128, 256, 64, warps=8, stages=6),
    WeightTile(256, 128, 64, warps=8, stages=5),
    WeightTile(128, 128, 64, warps=4, stages=5),
)
_HOPPER_CANDIDATES: dict[str, tuple[Tile, ...] | tuple[WeightTile, ...]] = {
    "up": (*_GATHERED, Tile(256, 64, warps=8, stages=4), Tile(128, 64, warps=4, stages=4, persistent=True)),
    "down": _DENSE,
    "grad_hidden": _GATHERED,
    "grad_rows": _DENSE,
    "grad_up": _WEIGHTS,
    "grad_down": _WEIGHTS,
}  # fmt: skip
CANDIDATES = {HOPPER.name: _HOPPER_CANDIDATES}


def choose(capability: tuple[int, int] | None, element_size: int, interpreted: bool, width: int) -> Config:
    """The configuration of a launch: the one place where it is chosen.

    Args:
        capability: CUDA compute capability, from 8.0 on, or None on another accelerator.
        element_size: bytes of an element that is multiplied.
        interpreted: the kernels run in Triton's interpreter.
        width: F, of an expert.
    """
    if interpreted:
        return INTERPRETED
    if element_size > 2:
        return WIDE
    if capability is None:
        return CDNA
    config = next(config for least, config in BY_CAPABILITY if capability >= least)
    return HOPPER_SORTED if config is HOPPER and width >= SORTED_FROM else config


def with_tile(config: Config, op: str, tile: Tile | WeightTile) -> Config:
    """The same with another tile for one op, which is the name of its field."""
    changes: dict[str, Any] = {op: tile}
    return replace(config, **changes)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover size. Triton's own takes 6 microseconds of the host (``timeit``), and a step has many."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()
