"""Steps ``kernels_*`` of values: the Triton kernels compiled here and held to the plain reference, in float64.

On a CPU the same rows run in Triton's interpreter, at sizes that it takes a second for. T tokens, K experts per token,
R = T·K rows, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.check.contract import Found, NotRun, Place, Row, Verdict
from moebed.machine.float64 import double
from triton_kernels.configs import SORTED_FROM
from triton_kernels.mlp import expert_mlp, reference

# Of the Frobenius norm. Rounding to the type once per stored tensor; the interpreter truncates where bfloat16 should
# round, which doubles that error.
TOLERANCES = {
    "cuda": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
    "cpu": {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2},
}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NAMES = ("output", "x", "gate_up", "down", "topk_weight")  # of what a call gives, its gradients included


class Size(NamedTuple):
    """Of a call."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int

    def __str__(self) -> str:
        return f"T {self.tokens}, E {self.experts}, K {self.top_k}, H {self.hidden}, F {self.width}"


# Awkward on purpose: K-loops with a rest, tiles cut off on both sides, more experts than tokens. First what shows most.
SIZES = {
    "cuda": (
        Size(1000, 8, 2, 1024, 512),
        Size(257, 64, 6, 2056, 1416),
        Size(300, 5, 2, 264, SORTED_FROM + 8),  # rows sorted before the products
        Size(1, 1, 1, 8, 8),
        Size(63, 8, 2, 136, 72),
        Size(4096, 16, 4, 512, 264),
    ),
    "cpu": (Size(100, 8, 2, 136, 72), Size(1, 1, 1, 8, 8), Size(63, 12, 6, 40, 24)),
}
# Few H and F, which are what is compiled for.
SMALL = {"cuda": Size(700, 8, 1, 136, 72), "cpu": Size(70, 8, 1, 40, 24)}
CROWDED = {"cuda": Size(20_000, 6, 1, 136, 72), "cpu": Size(600, 6, 1, 40, 24)}
TIMED = ("deepseekmoe", "mixtral", "olmoe", "qwen3", "A", "F")  # by the step ``speed``


class Case(NamedTuple):
    """Arguments of a call: (T, H), (E, 2F, H), (E, H, F) and (T, K) that gradients are asked of, and choices (T, K)."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weight: Tensor
    topk_index: Tensor

    @property
    def floating(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is differentiated."""
        return self[:4]


def rows_of(place: Place, dtype: torch.dtype) -> Sequence[Row]:
    """Values and gradients in one type.

    Raises:
        NotRun: Triton cannot interpret here.
    """
    on = place.device
    require_interpreter(on)
    first, *others = SIZES[on]
    every = [(first, "silu"), *((size, "silu") for size in others), (others[-1], "gelu"), (others[-1], "gelu_tanh")]
    made = [Row(f"{size}, {act}", functools.partial(values, on, size, act, dtype)) for size, act in every]
    return [
        made[0],
        Row("two runs, every bit", functools.partial(repeated, on, dtype)),
        Row("all tokens on one expert, and on two of eight", functools.partial(imbalance, on, dtype)),
        Row("rows of crowded experts cut", functools.partial(crowded, on, dtype)),
        *made[1:],
        Row("assignments left out", functools.partial(ragged, on, dtype)),
        Row("no read of what was not written", functools.partial(unwritten, on, dtype)),
    ]


def bfloat16(place: Place) -> Sequence[Row]:
    """Rows of the step."""
    return rows_of(place, torch.bfloat16)


def float16(place: Place) -> Sequence[Row]:
    """Rows of the step."""
    return rows_of(place, torch.float16)


def float32(place: Place) -> Sequence[Row]:
    """Rows of the step."""
    return rows_of(place, torch.float32)


def models(place: Place) -> Sequence[Row]:
    """Rows of the step on sizes that are timed later: H and F are what is compiled for, so few tokens are enough."""
    from moebed.bench.experts import case

    sizes = {name: case(name, 1, torch.device("cpu")).shape for name in TIMED}
    few = {name: Size(96, 3, 2, shape.hidden, shape.width) for name, shape in sizes.items()}
    return [Row(f"{name}: {size}", functools.partial(of_model, place.device, size)) for name, size in few.items()]


def require_interpreter(device: str) -> None:
    """Raise NotRun where the kernels would have to be interpreted and cannot be."""
    if device == "cpu":
        from triton_kernels.precision import interpreter_fault

        if (fault := interpreter_fault()) is not None:
            raise NotRun(fault)


# What is compared -----------------------------------------------------------------------------------------------------


def make_case(device: str, size: Size, dtype: torch.dtype, index: Tensor | None = None) -> Case:
    """Random arguments; an index takes the place of the routing, which is otherwise K distinct experts a token."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if index is None:
        index = torch.rand(size.tokens, size.experts, generator=generator, device=device).topk(size.top_k).indices
    return Case(
        normal(size.tokens, size.hidden).to(dtype).requires_grad_(),
        (normal(size.experts, 2 * size.width, size.hidden) * size.hidden**-0.5).to(dtype).requires_grad_(),
        (normal(size.experts, size.hidden, size.width) * size.width**-0.5).to(dtype).requires_grad_(),
        torch.rand(index.shape, generator=generator, device=device).requires_grad_(),
        index,
    )


def on_copies(case: Case, copied: Callable[[Tensor], Tensor]) -> Case:
    """The same call with copies of all that is differentiated, which gradients are asked of again."""
    x, gate_up, down, weight = (copied(t.detach()).requires_grad_() for t in case.floating)
    return Case(x, gate_up, down, weight, case.topk_index)


def call(case: Case, activation: str = "silu", function: Callable[..., Tensor] = expert_mlp) -> list[Tensor]:
    """The output and the gradients, by NAMES."""
    out = function(*case[:3], case.topk_index, case.weight, activation)
    direction = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device)
    direction = direction.bfloat16()  # the same in every type
    return [out.detach(), *torch.autograd.grad(out, case.floating, direction.to(out.dtype))]


def differences(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Relative differences in the Frobenius norm, by NAMES; infinite where something is not a number."""
    off = {}
    for name, ours, theirs in zip(NAMES, found, wanted, strict=True):
        value = ((double(ours) - double(theirs)).norm() / double(theirs).norm().clamp_min(1e-12)).item()
        off[name] = value if value == value else float("inf")
    return off


def judge(off: dict[str, float], tolerance: float) -> Found:
    """Whether differences are what rounding explains."""
    name, worst = max(off.items(), key=lambda item: item[1])
    said = f"largest difference {worst:.1e} of {name}, allowed {tolerance:.0e}"
    return Found(
        said, {"differences": off, "allowed": tolerance}, Verdict.WORKS if worst < tolerance else Verdict.WRONG
    )


def agree(case: Case, activation: str = "silu") -> Found:
    """Values and gradients beside the reference in float64."""
    wide = on_copies(case, double)
    off = differences(call(case, activation), call(wide, activation, reference.expert_mlp))
    return judge(off, TOLERANCES[case.x.device.type][case.x.dtype])


def worst(found: Sequence[Found]) -> Found:
    """Of several, the first that is wrong, else the one with the largest difference."""
    wrong = [each for each in found if each.verdict == Verdict.WRONG]
    return (wrong or sorted(found, key=lambda each: -max(each.figures["differences"].values())))[0]


# Rows -----------------------------------------------------------------------------------------------------------------


def values(device: str, size: Size, activation: str, dtype: torch.dtype) -> Found:
    """At one size."""
    return agree(make_case(device, size, dtype), activation)


def of_model(device: str, size: Size) -> Found:
    """In bfloat16, and without gradients as well, for which another kernel is compiled."""
    case = make_case(device, size, torch.bfloat16)
    with torch.no_grad():
        alone = expert_mlp(*case[:3], case.topk_index, case.weight)
    found = agree(case)
    if found.verdict == Verdict.WORKS and not torch.equal(alone, expert_mlp(*case[:3], case.topk_index, case.weight)):
        return Found("without gradients the output has other bits", found.figures, Verdict.WRONG)
    return found


def imbalance(device: str, dtype: torch.dtype) -> Found:
    """Experts that nobody chose, and one that all did."""
    size = SMALL[device]
    lone = torch.full((size.tokens, 1), 5, device=device)
    pair = torch.tensor([[1, 6]], device=device).repeat(size.tokens, 1)
    return worst([agree(make_case(device, size, dtype, index)) for index in (lone, pair)])


def crowded(device: str, dtype: torch.dtype) -> Found:
    """Rows enough, and matrices small enough, that pieces are summed side by side."""
    size = CROWDED[device]
    index = torch.zeros(size.tokens, 1, dtype=torch.int64, device=device)
    index[::50] = 3
    return agree(make_case(device, size, dtype, index))


def ragged(device: str, dtype: torch.dtype) -> Found:
    """Assignments of weight 0 pass no product, and change nothing else."""
    size = SMALL[device]._replace(top_k=4)
    case = make_case(device, size, dtype)
    idle = case.weight.detach() < 0.4
    case = case._replace(weight=case.weight.detach().masked_fill(idle, 0).requires_grad_())
    wide = on_copies(case, double)
    wanted = call(wide, function=functools.partial(reference.expert_mlp, ragged=True))
    found = call(case, function=functools.partial(expert_mlp, ragged=True))
    if found[4][idle].any():
        return Found("a weight of 0 has a gradient", verdict=Verdict.WRONG)
    return judge(differences(found, wanted), TOLERANCES[device][dtype])


def repeated(device: str, dtype: torch.dtype) -> Found:
    """Several runs."""
    size, times = (Size(3000, 16, 4, 1024, 512), 3) if device == "cuda" else (Size(70, 8, 2, 40, 72), 1)
    case = make_case(device, size, dtype)
    first = call(case)
    for run in range(times):
        off = [name for name, a, b in zip(NAMES, first, call(case), strict=True) if not torch.equal(a, b)]
        if off:
            return Found(f"run {run + 2} has other bits in {', '.join(off)}", verdict=Verdict.WRONG)
    return Found(f"{times + 1} runs have the same bits")


def unwritten(device: str, dtype: torch.dtype) -> Found:
    """What is allocated without a value holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        size = Size(333, 9, 3, 136, 72) if device == "cuda" else Size(70, 9, 3, 40, 24)
        return agree(make_case(device, size, dtype))
    finally:
        torch.use_deterministic_algorithms(before)
