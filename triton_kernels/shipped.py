"""``SHIPPED``: every kernel in every configuration that a launch on a GPU can pick, for the gates to compile.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.

The constexprs come from the functions that the launches call, so a spec cannot drift from what runs. H and F are
compile-time constants of the kernels, T, K and E are not; here they are DeepSeekMoE-16B's, or, where rows are sorted,
Mixtral 8x7B's. No tile divides a K-loop of H = 2056 or F = 1416, so the products are listed once more with such sizes,
as ``odd``: their loops carry masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from triton_kernels.activations import NAMES
from triton_kernels.combine.kernels import combine_kernel
from triton_kernels.configs import (
    AMPERE,
    BLACKWELL,
    CANDIDATES,
    CDNA,
    HOPPER,
    HOPPER_SORTED,
    SORTED_FROM,
    WIDE,
    Config,
    Tile,
    WeightTile,
    with_tile,
)
from triton_kernels.grouped import down, gather, grad_activation, grad_hidden, grad_rows, grad_weight, pieces, up
from triton_kernels.routing import constexprs as routing_constexprs
from triton_kernels.routing.kernels import count_kernel, place_kernel, route_small_kernel, scan_kernel, tiles_kernel
from triton_kernels.spec import DTYPES, Argument, KernelSpec

EVEN, ODD = (2048, 1408), (2056, 1416)  # (H, F)
WIDE_EVEN, WIDE_ODD = (4096, 14336), (4104, 14344)

_TABLE = {name: Argument("*i32", aligned=True) for name in ("offsets", "tile_expert", "tile_start")}
_NUMBER = Argument("i32")
_TOKEN = {"token": Argument("*i32", aligned=True)}


def _elements(shape: str, passes: float = 1.0) -> Argument:
    return Argument("*T", aligned=True, shape=shape, passes=passes)


def _product(
    op: str,
    label: str,
    kernel: Any,
    config: Config,
    tile: Tile | WeightTile,
    arguments: Mapping[str, Argument],
    constexprs: Mapping[str, Any],
    flops: float,
    gathers_indices: bool = False,
) -> Iterator[KernelSpec]:
    rows = tile.rows if isinstance(tile, WeightTile) else config.rows
    how = " tma" * (isinstance(tile, Tile) and tile.persistent) + " flat" * (isinstance(tile, Tile) and tile.flat)
    size = f"{rows}x{tile.columns}x{tile.depth} w{tile.warps} s{tile.stages}{how}"
    for precision in ("ieee", "tf32") if config is WIDE else ("ieee",):
        yield KernelSpec(
            name=" ".join(filter(None, (op, size, config.name, label, precision if config is WIDE else ""))),
            kernel=kernel,
            op=op,
            backward=op not in ("up", "down"),
            arguments=arguments,
            constexprs={**constexprs, "PRECISION": precision, "UPCAST": False},
            tile=(rows, tile.columns, tile.depth),
            loop_flops=2 * rows * tile.columns * tile.depth,
            flops=flops,
            num_warps=tile.warps,
            num_stages=tile.stages,
            archs=config.archs,
            dtypes=("fp32",) if config is WIDE else ("fp16", "bf16"),
            gathers_indices=gathers_indices,
            row_step=tile.depth if isinstance(tile, WeightTile) else None,
            least_width=SORTED_FROM if config.sorts else 0,
        )


def _walk(tile: Tile, pointers: Any, persistent: Any) -> tuple[Any, dict[str, Argument]]:
    """The kernel of a tile, and the arguments that its persistent form has besides."""
    if not tile.persistent:
        return pointers, {}
    return persistent, {"tile_count": Argument("*i32", aligned=True), "num_rows": _NUMBER, "E": _NUMBER}


def _products(config: Config, width: int, inter: int, label: str) -> Iterator[KernelSpec]:
    tall = {"weight": _elements("EGH"), **_TABLE}
    sizes = (width, inter)
    letters = "RH" if config.sorts else "TH"
    kernel, more = _walk(config.up, up.up_kernel, up.up_persistent_kernel)
    for activation in NAMES:
        for save in (True, False):
            arguments = {"x": _elements(letters), **_TOKEN, **tall, "hidden": _elements("RF"), "pre": _elements("RG")}
            if not save:
                arguments["pre"] = Argument("*T", aligned=True)
            what = " ".join(filter(None, (activation, "" if save else "inference", label)))
            constexprs = up.constexprs(*sizes, activation, save, config)
            yield from _product("up", what, kernel, config, config.up, arguments | more, constexprs, 4)
    short = {"weight": _elements("EHF"), **_TABLE}
    kernel, more = _walk(config.down, down.down_kernel, down.down_persistent_kernel)
    arguments = {"hidden": _elements("RF"), **short, "out": _elements("RH"), **more}
    constexprs = down.constexprs(*sizes, config)
    yield from _product("down", label, kernel, config, config.down, arguments, constexprs, 2)
    plain, persistent = grad_hidden.grad_hidden_kernel, grad_hidden.grad_hidden_persistent_kernel
    kernel, more = _walk(config.grad_hidden, plain, persistent)
    arguments = {"grad": _elements(letters), **short, **_TOKEN, "out": _elements("RF"), **more}
    constexprs = grad_hidden.constexprs(*sizes, config)
    yield from _product("grad_hidden", label, kernel, config, config.grad_hidden, arguments, constexprs, 2)
    kernel, more = _walk(config.grad_rows, grad_rows.grad_rows_kernel, grad_rows.grad_rows_persistent_kernel)
    arguments = {"grad_pre": _elements("RG"), **tall, "out": _elements("RH"), **more}
    constexprs = grad_rows.constexprs(*sizes, config)
    yield from _product("grad_rows", label, kernel, config, config.grad_rows, arguments, constexprs, 4)

    yield from _weight_products(config, width, inter, label)


def _weight_products(config: Config, width: int, inter: int, label: str) -> Iterator[KernelSpec]:
    kernel, numbers = grad_weight.grad_weight_kernel, Argument("*i32", aligned=True)
    letters, gathers = ("RH", False) if config.sorts else ("TH", True)
    table = {name: numbers for name in ("token", "offsets", "unit_expert", "unit_start", "first_slot")}
    for is_cut in (False, True):
        partial = Argument("*fp32" if is_cut else "*T", aligned=True)
        what = " ".join(filter(None, (label, "pieces" * is_cut)))
        shared = {**table, "partial": partial, "piece_rows": _NUMBER}
        arguments = {"left": _elements("RG"), "right": _elements(letters), **shared, "out": _elements("EGH")}
        constexprs = grad_weight.constexprs(2 * inter, width, True, is_cut, config.grad_up, config)
        yield from _product("grad_up", what, kernel, config, config.grad_up, arguments, constexprs, 4, gathers)
        arguments = {"left": _elements(letters), "right": _elements("RF"), **shared, "out": _elements("EHF")}
        constexprs = grad_weight.constexprs(width, inter, False, is_cut, config.grad_down, config)
        yield from _product("grad_down", what, kernel, config, config.grad_down, arguments, constexprs, 2, gathers)


def _plain(op: str, kernel: Any, arguments: Mapping[str, Argument], **changes: Any) -> KernelSpec:
    settings = {"name": f"{op} w4", "backward": False, "dtypes": ("bf16",), **changes}
    return KernelSpec(
        kernel=kernel, op=op, arguments=arguments, tile=(0, 0, 0), loop_flops=0, flops=0,
        num_warps=4, num_stages=3, **settings,
    )  # fmt: skip


def _routing(config: Config) -> Iterator[KernelSpec]:
    numbers = Argument("*i32", aligned=True)
    table = {name: numbers for name in ("offsets", "tile_expert", "tile_start", "tile_count", "inside")}
    placed = {name: numbers for name in ("order", "token", "slot")}
    counts = {"counts": numbers, "num_blocks": _NUMBER}
    sizes = {"size": _NUMBER, "E": _NUMBER}
    for ragged in (False, True):
        for index in ("i64", "i32", "u8"):
            weight = Argument("*fp32" if ragged else f"*{index}", aligned=True)
            where = {"index": Argument(f"*{index}", aligned=True), "weight": weight, **sizes}
            for op, kernel, arguments in (
                ("route_small", route_small_kernel, where | table | placed | {"K": _NUMBER, "num_tiles": _NUMBER}),
                ("route_count", count_kernel, where | counts),
                ("route_place", place_kernel, where | counts | placed | {"offsets": numbers, "K": _NUMBER}),
            ):
                name = f"{op} w4 {index}{' ragged' * ragged}"
                yield _plain(op, kernel, arguments, constexprs=routing_constexprs(kernel, config, ragged), name=name)
    totals = {"totals": numbers}
    for op, kernel, arguments in (
        ("route_scan", scan_kernel, counts | totals),
        ("route_tiles", tiles_kernel, totals | table | {"E": _NUMBER, "num_tiles": _NUMBER}),
    ):
        yield _plain(op, kernel, arguments, constexprs=routing_constexprs(kernel, config))


def _gathers(config: Config) -> Iterator[KernelSpec]:
    numbers = Argument("*i32", aligned=True)
    for op, backward in (("gather", False), ("gather_grad", True), ("gather_again", True)):
        yield _plain(
            op, gather.gather_kernel,
            {"x": _elements("TH"), "token": numbers, "offsets": numbers, "out": _elements("RH"), "E": _NUMBER},
            constexprs={"H": WIDE_EVEN[0], "BLOCK_M": config.gather_rows, "BLOCK_H": config.gather_columns},
            backward=backward, dtypes=("fp16", "bf16"), archs=config.archs, least_width=SORTED_FROM,
        )  # fmt: skip


def _combines(config: Config) -> Iterator[KernelSpec]:
    numbers = Argument("*i32", aligned=True)
    for op, weighted in (("combine", True), ("combine_grad", False)):
        yield _plain(
            op, combine_kernel,
            {
                "rows": _elements("RH"), "slot": numbers,
                "weight": Argument("*fp32" if weighted else "*i32", aligned=True),
                "out": _elements("TH"), "num_tokens": _NUMBER, "K": _NUMBER,
            },
            constexprs={
                "H": EVEN[0], "WEIGHTED": weighted, "BLOCK_T": config.combine_tokens,
                "BLOCK_H": config.combine_columns,
            },
            backward=not weighted, dtypes=("fp16", "bf16", "fp32"),
        )  # fmt: skip


def _pieces() -> Iterator[KernelSpec]:
    numbers = Argument("*i32", aligned=True)
    table = {name: numbers for name in ("offsets", "unit_expert", "unit_start", "first_slot")}
    sizes = {"E": _NUMBER, "num_units": _NUMBER, "piece_rows": _NUMBER}
    yield _plain(
        "cut_pieces", pieces.pieces_kernel, table | sizes, constexprs={"SCAN": pieces.SCAN}, backward=True
    )  # fmt: skip
    yield _plain(
        "add_pieces", pieces.add_kernel,
        {
            "partial": Argument("*fp32", aligned=True), "offsets": numbers, "first_slot": numbers,
            "out": Argument("*T", aligned=True), "piece_rows": _NUMBER,
        },
        constexprs={"SIZE": EVEN[0] * EVEN[1], "BLOCK": pieces.BLOCK}, backward=True, dtypes=DTYPES,
    )  # fmt: skip


def _activations(config: Config) -> Iterator[KernelSpec]:
    numbers, weights = Argument("*i32", aligned=True), Argument("*fp32", aligned=True)
    for activation in NAMES:
        yield _plain(
            "grad_activation", grad_activation.grad_activation_kernel,
            {
                "s": Argument("*T", aligned=True, shape="RF", passes=2), "pre": _elements("RG"), "topk_weight": weights,
                "order": numbers, "offsets": numbers, "grad_pre": _elements("RG"), "grad_weight": weights,
                "E": _NUMBER,
            },
            constexprs={
                "F": EVEN[1], "BLOCK_M": config.activation_rows, "BLOCK_N": config.activation_columns,
                "ACTIVATION": activation,
            },
            backward=True, dtypes=DTYPES, name=f"grad_activation w4 {activation}",
        )  # fmt: skip


DEVICES = (HOPPER, HOPPER_SORTED, BLACKWELL, AMPERE, CDNA, WIDE)


def _sizes(config: Config) -> tuple[tuple[tuple[int, int], str], ...]:
    even, odd = (WIDE_EVEN, WIDE_ODD) if config.sorts else (EVEN, ODD)
    return (even, ""), (odd, "odd")


SHIPPED: tuple[KernelSpec, ...] = (
    *(spec for config in DEVICES for size, label in _sizes(config) for spec in _products(config, *size, label)),
    *_gathers(HOPPER_SORTED),
    *_routing(HOPPER),
    *_combines(HOPPER),
    *_pieces(),
    *_activations(HOPPER),
)


def candidates() -> Iterator[KernelSpec]:
    """Every kernel in every tile that ``moebed check`` may choose in place of a shipped one."""
    for base in DEVICES:
        for op, tiles in CANDIDATES.get(base.name, {}).items():
            for tile in tiles:
                config = with_tile(base, op, tile)
                for size, label in _sizes(base):
                    yield from (spec for spec in _products(config, *size, label) if spec.op == op)
