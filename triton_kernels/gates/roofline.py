"""Expected bytes and the time that they and the FLOPs bound, of our launches and of the peers' designs.

A launch is a pass over memory: it takes max(FLOPs / P, bytes / B), and a design takes the sum of its passes. Ours are
made from the ``KernelSpec`` of the kernel that each op launches: every tensor among its arguments, once for each time
that the kernel moves it. The peers' are written down here as passes; their sums are the coefficients
bytes = 2(a·TH + b·RH + c·RF) + d·W with W = 6·E·F·H bytes.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from triton_kernels.spec import KernelSpec

H100_FLOPS, H100_BYTES = 989e12, 3.35e12  # 16-bit FLOPs and bytes a second
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "i32": 4, "u32": 4, "i64": 8, "i16": 2, "i8": 1, "i1": 1, "u8": 1}


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer and the tokens that pass it."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    tokens: int = 8192

    @property
    def rows(self) -> int:
        """R = T·K."""
        return self.tokens * self.top_k

    def size(self, letters: str) -> int:
        """Elements of a tensor by the letters of its dimensions."""
        sizes = {"T": self.tokens, "K": self.top_k, "R": self.rows, "E": self.experts}
        sizes |= {"H": self.hidden, "F": self.width, "G": 2 * self.width}
        return math.prod(sizes[letter] for letter in letters)


SHAPES = (
    Shape("Mixtral 8x7B", 4096, 14336, 8, 2),
    Shape("DeepSeekMoE-16B", 2048, 1408, 64, 6),
    Shape("OLMoE", 2048, 1024, 64, 8),
)


@dataclass(frozen=True)
class Move:
    """A tensor that a pass moves: its letters, how often, and the bytes of an element."""

    letters: str
    times: float
    item: int = 2


@dataclass(frozen=True)
class Pass:
    """One pass over memory; ``flops`` in units of R·H·F."""

    flops: float
    moves: tuple[Move, ...]
    name: str = ""

    def bytes(self, shape: Shape) -> float:
        """Bytes that it moves."""
        return sum(move.times * move.item * shape.size(move.letters) for move in self.moves)

    def seconds(self, shape: Shape, flops: float = H100_FLOPS, bandwidth: float = H100_BYTES) -> float:
        """The time that FLOPs and bytes bound."""
        return max(self.flops * shape.size("RHF") / flops, self.bytes(shape) / bandwidth)


def _pass(flops: float, a: float = 0, b: float = 0, c: float = 0, d: float = 0) -> Pass:
    """A pass over 16-bit tensors by its share of the coefficients; W is 3·E·F·H elements."""
    moves = {"TH": a, "RH": b, "RF": c, "EFH": 3 * d}
    return Pass(flops, tuple(Move(letters, times) for letters, times in moves.items() if times))


UP, DOWN = 2 / 3, 1 / 3  # shares of W
DESIGNS: dict[str, dict[str, list[Pass]]] = {
    "ideal": {"forward": [_pass(6, a=2, d=1)], "backward": [_pass(12, a=3, c=2, d=2)]},
    "Liger": {
        # up with the activation (saves gate, up and their product); down; combine.
        "forward": [_pass(4, a=1, c=3, d=UP), _pass(2, b=1, c=1, d=DOWN), _pass(0, a=1, b=1)],
        "backward": [
            _pass(2, a=1, c=5, d=DOWN),  # dY·W_down with the activation's backward: reads gate, up; writes both, act
            _pass(4, b=1, c=2, d=UP),  # dX of every row
            _pass(0, a=2, b=1),  # summed over each token's rows, into zeros
            _pass(0, d=1),  # zero-fill of dW
            _pass(4, a=1, c=2, d=UP),
            _pass(2, a=1, c=1, d=DOWN),
        ],
    },
    "ScatterMoE": {
        "forward": [_pass(4, a=1, c=2, d=UP), _pass(0, c=3), _pass(2, b=1, c=1, d=DOWN), _pass(0, a=1, b=1)],
        "backward": [
            _pass(0, a=1, b=1),  # d(weights) from the saved outputs
            _pass(0, a=1, b=1),  # dY grouped and weighted
            _pass(0, d=1),  # zero-fill of dW
            _pass(2, b=1, c=1, d=DOWN),  # dW_down
            _pass(2, b=1, c=1, d=DOWN),  # d(hidden)
            _pass(0, c=5),  # activation
            _pass(0, a=1, b=1),  # x grouped
            _pass(4, b=1, c=2, d=UP),  # dW_up
            _pass(4, b=1, c=2, d=UP),  # dX of every row
            _pass(0, a=1, b=1),  # summed over each token's rows
        ],
    },
    "argsort, index, grouped_mm, index_add": {
        "forward": [
            _pass(0, a=1, b=1),
            _pass(4, b=1, c=2, d=UP),
            _pass(0, c=3),
            _pass(2, b=1, c=1, d=DOWN),
            _pass(0, b=2),  # weighted
            _pass(0, a=3, b=1),  # zeros, read, written
        ],
        "backward": [
            _pass(0, a=1, b=1),
            _pass(0, b=3),  # weighted: reads dY and the outputs, writes
            _pass(2, b=1, c=1, d=DOWN),
            _pass(2, b=1, c=1, d=DOWN),
            _pass(0, c=5),
            _pass(4, b=1, c=2, d=UP),
            _pass(4, b=1, c=2, d=UP),
            _pass(0, a=2, b=1),
        ],
    },
}


def total_bytes(passes: Iterable[Pass], shape: Shape) -> float:
    """Bytes of all passes."""
    return sum(each.bytes(shape) for each in passes)


def milliseconds(passes: Iterable[Pass], shape: Shape) -> float:
    """The bound of all passes, one after another, on an H100."""
    return 1e3 * sum(each.seconds(shape) for each in passes)


def coefficients(passes: Iterable[Pass]) -> tuple[float, float, float, float]:
    """(a, b, c, d) of bytes = 2(a·TH + b·RH + c·RF) + d·W; what no letter of these counts (indices) is left out."""
    units = {"TH": (0, 1.0), "RH": (1, 1.0), "RF": (2, 1.0), "RG": (2, 2.0), "EFH": (3, 1 / 3), "EGH": (3, 2 / 3)}
    found = [0.0] * 4
    for each in passes:
        for move in each.moves:
            position, weight = units.get("".join(sorted(move.letters, key="TREGFH".index)), (0, 0.0))
            found[position] += weight * move.times * move.item / 2
    return found[0], found[1], found[2], found[3]


def launches(specs: Sequence[KernelSpec], arch: str, dtype: str, width: int = 0) -> dict[str, list[Pass]]:
    """Our forward and backward through experts of F = width as passes, by the specs of ``launched``."""
    made: dict[str, list[Pass]] = {"forward": [], "backward": []}
    for spec in launched(specs, arch, dtype, width):
        made["backward" if spec.backward else "forward"].append(pass_of(spec, dtype))
    return made


def launched(specs: Sequence[KernelSpec], arch: str, dtype: str, width: int = 0) -> list[KernelSpec]:
    """Of each op, the first spec that ships for this architecture and type and experts of F = width; 0 for narrow."""
    chosen: dict[str, KernelSpec] = {}
    for spec in sorted(specs, key=lambda spec: -spec.least_width):
        if arch in spec.archs and dtype in spec.dtypes and spec.least_width <= width:
            chosen.setdefault(spec.op, spec)
    return list(chosen.values())


def pass_of(spec: KernelSpec, dtype: str) -> Pass:
    """One launch of a kernel as a pass: what its own arguments say."""
    moves = []
    for argument in spec.arguments.values():
        if argument.shape:
            element = re.sub(r"\[.*", "", argument.type.replace("tensordesc<", "").lstrip("*"))
            moves.append(Move(argument.shape, argument.passes, ITEM_BYTES[element.replace("T", dtype)]))
    return Pass(spec.flops, tuple(moves), spec.name)


def tile_waste(loads: Iterable[int], step: int) -> float:
    """Rows that padding adds to whole steps, as a share of the rows."""
    counts = list(loads)
    return sum(-count % step for count in counts) / max(1, sum(counts))


def wasted_share(spec: KernelSpec, shape: Shape, draws: int = 400) -> tuple[float, float]:
    """Padding of a launch, the mean of several draws of experts' loads, and E·(step − 1)/2R, which it should not pass.

    The loads of evenly drawn experts are binomial; at these sizes, normal.
    """
    source, step = random.Random(0), spec.row_step or spec.tile[0]
    mean = shape.rows / shape.experts
    spread = math.sqrt(mean * (1 - 1 / shape.experts))
    total = 0.0
    for _ in range(draws):
        total += tile_waste([max(0, round(source.gauss(mean, spread))) for _ in range(shape.experts)], step)
    return total / draws, shape.experts * (step - 1) / (2 * shape.rows)


def padded_share(spec: KernelSpec, shape: Shape, dtype: str = "bf16") -> float:
    """The bound of a launch whose experts all fill whole steps, over the bound of one without padding.

    1 where reading the matrices takes longer than the padded product: there no smaller tile would be faster.
    """
    each = pass_of(spec, dtype)
    mean, step = shape.rows / shape.experts, spec.row_step or spec.tile[0]
    padding = math.ceil(mean / step) * step / mean
    return replace(each, flops=each.flops * padding).seconds(shape) / each.seconds(shape)


def compare(specs: Sequence[KernelSpec], arch: str = "sm_90", dtype: str = "bf16") -> list[Mapping[str, object]]:
    """Plain rows (shape, direction, design, coefficients, bytes, milliseconds), ours last, for tables and JSON."""
    inference = [spec for spec in specs if not spec.constexprs.get("SAVE")]

    def designs(shape: Shape) -> Mapping[str, dict[str, list[Pass]]]:
        without = launches(inference, arch, dtype, shape.width)["forward"]
        ours = {"ours": launches(specs, arch, dtype, shape.width)}
        return DESIGNS | ours | {"ours, no gradients": {"forward": without, "backward": []}}

    return [
        {
            "shape": shape.name,
            "direction": direction,
            "design": name,
            "coefficients": coefficients(passes[direction]),
            "gigabytes": total_bytes(passes[direction], shape) / 1e9,
            "milliseconds": milliseconds(passes[direction], shape),
        }
        for shape in SHAPES
        for direction in ("forward", "backward")
        for name, passes in designs(shape).items()
        if passes[direction]
    ]
