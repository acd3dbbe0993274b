"""Step ``tiles``: of the tiles that pass the gates, the fastest here, written to where the next launch reads them.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from moebed.bench.experts import MODELS
from moebed.check import kernels
from moebed.check.contract import Found, NotRun, Place, Row, Verdict
from moebed.check.machine import fastest
from moebed.machine import storage
from triton_kernels import tuned
from triton_kernels.configs import CANDIDATES, Config, Tile, WeightTile
from triton_kernels.grouped.down import down
from triton_kernels.grouped.grad_hidden import grad_hidden
from triton_kernels.grouped.grad_rows import grad_rows
from triton_kernels.grouped.grad_weight import grad_down, grad_up
from triton_kernels.grouped.up import up
from triton_kernels.mlp.op import config_for
from triton_kernels.routing import Metadata, route

TUNED_ON = ("deepseekmoe", "mixtral")
TOLERANCE = 1e-2  # of a candidate's output beside the shipped tiles'
WORTH = 0.98  # of the time; less is not told from chance

AnyTile = Tile | WeightTile


@dataclass(frozen=True)
class Inputs:
    """All that the products of one training step of a layer take."""

    case: kernels.Case
    meta: Metadata
    hidden: Tensor  # (R, F)
    pre: Tensor  # (R, 2F)
    grad: Tensor  # (T, H)
    grad_pre: Tensor  # (R, 2F)
    weighted: Tensor  # (R, F)


PRODUCTS: dict[str, Callable[[Inputs, Config], Sequence[Tensor]]] = {
    "up": lambda of, config: up(of.case.x, of.case.gate_up, of.meta, "silu", True, config),
    "down": lambda of, config: (down(of.hidden, of.case.down, of.meta, config),),
    # Its partial sums have a shape that the tile decides.
    "grad_hidden": lambda of, config: grad_hidden(
        of.grad, of.case.down, of.pre, of.case.weight, of.meta, "silu", config
    )[:2],
    "grad_rows": lambda of, config: (grad_rows(of.grad_pre, of.case.gate_up, of.meta, config),),
    "grad_up": lambda of, config: (grad_up(of.grad_pre, of.case.x, of.meta, config),),
    "grad_down": lambda of, config: (grad_down(of.grad, of.weighted, of.meta, config),),
}


def rows(place: Place) -> Sequence[Row]:
    """Of the step: an op each, then the table."""
    os.environ[tuned.SWITCH] = tuned.SHIPPED
    tuned.tuned.cache_clear()
    sizes = [kernels.Size(m.tokens, m.experts, m.top_k, m.hidden, m.width) for m in map(MODELS.__getitem__, TUNED_ON)]
    inputs = functools.cache(functools.partial(make_inputs, place.device))

    def tune_op(op: str) -> Found:
        base = config_for(inputs(sizes[0]).case.x)
        candidates = CANDIDATES.get(base.name, {}).get(op, ())
        return tune(op, base, candidates, [inputs(size) for size in sizes], _timer(place))

    return [
        *(Row(op, functools.partial(tune_op, op)) for op in PRODUCTS),
        Row("the table", functools.partial(write_table, place)),
    ]


def _timer(place: Place) -> Callable[[Callable[[], object]], float]:
    return lambda work: fastest(work, place.device, 0.05)


@torch.no_grad()
def make_inputs(device: str, size: kernels.Size) -> Inputs:
    """Random tokens and matrices, and what the shipped kernels make of them."""
    case = kernels.Case(*(each.detach() for each in kernels.make_case(device, size, torch.bfloat16)))
    config = config_for(case.x)
    meta = route(case.index, size.experts, config)
    hidden, pre = up(case.x, case.gate_up, meta, "silu", True, config)
    grad = torch.randn_like(case.x)
    grad_pre, weighted, _ = grad_hidden(grad, case.down, pre, case.weight, meta, "silu", config)
    return Inputs(case, meta, hidden, pre, grad, grad_pre, weighted)


@torch.no_grad()
def tune(
    op: str,
    base: Config,
    candidates: Sequence[AnyTile],
    inputs: Sequence[Inputs],
    timer: Callable[[Callable[[], object]], float],
) -> Found:
    """Time the shipped tile and the candidates of one op; one that is refused, or wrong, is left out aloud."""
    if not candidates:
        raise NotRun(f"no candidates for {base.name}")
    product = PRODUCTS[op]
    wanted = [product(of, base) for of in inputs]
    shipped = getattr(base, op)
    tried: list[dict[str, Any]] = []
    is_wrong = False
    for tile in (shipped, *candidates):
        config = replace(base, **{op: tile})
        row: dict[str, Any] = {"tile": asdict(tile)}
        tried.append(row)
        try:
            found = [product(of, config) for of in inputs]
            row["difference"] = max(map(_difference, found, wanted))
            if not row["difference"] <= TOLERANCE:
                is_wrong = True
                continue
            row["seconds"] = [timer(functools.partial(product, of, config)) for of in inputs]
        except Exception as error:  # noqa: BLE001 - a candidate that the compiler refuses is none
            row["error"] = f"{type(error).__name__}: {error}"[:300]
    first = tried[0]
    if "seconds" not in first:
        return Found(f"the shipped tile cannot be timed: {first}", {"tried": tried}, Verdict.WRONG)
    for row in tried:
        if "seconds" in row:
            ratios = [a / b for a, b in zip(row["seconds"], first["seconds"], strict=True)]
            row["time"] = math.prod(ratios) ** (1 / len(ratios))
    best = min((row for row in tried if "time" in row), key=lambda row: row["time"])
    chosen = best if best["time"] < WORTH else first
    said = f"{chosen['time']:.3f} of the shipped tile's time, of {len(tried)} tiles"
    refused = sum("error" in row for row in tried)
    said += f"; {refused} refused" if refused else ""
    said += "; a candidate is wrong" if is_wrong else ""
    figures = {"tried": tried, "chosen": None if chosen is first else chosen["tile"]}
    return Found(said, figures, Verdict.WRONG if is_wrong else Verdict.WORKS)


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    off = [((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item() for a, b in pairs]
    return max(value if value == value else math.inf for value in off)


def write_table(place: Place) -> Found:
    """Hold the kernels with all chosen tiles to the reference, and only then write the table."""
    device = torch.cuda.get_device_name()
    base = config_for(torch.empty(1, device=place.device, dtype=torch.bfloat16))
    chosen = {op: figures["chosen"] for op, figures in _figures(place).items() if figures.get("chosen")}
    if not chosen:
        return Found("the shipped tiles are the fastest; no table is written")
    tiles = {op: replace(getattr(base, op), **tile) for op, tile in chosen.items()}
    measured = {op: figures["tried"] for op, figures in _figures(place).items() if "tried" in figures}
    text = tuned.content(device, triton.__version__, base, tiles, measured)
    trial = storage.write_text(place.folder / "tiles.json", text)
    os.environ[tuned.SWITCH] = str(trial)
    tuned.tuned.cache_clear()
    types = (torch.bfloat16, torch.float16)
    sizes = kernels.SIZES[place.device]
    found = [kernels.values(place.device, size, "silu", dtype) for dtype in types for size in sizes]
    found += [kernels.values(place.device, sizes[0], act, torch.bfloat16) for act in kernels.ACTIVATIONS[1:]]
    judged = kernels.worst([*found, kernels.crowded(place.device, torch.bfloat16)])
    if judged.verdict == Verdict.WRONG:
        return Found(f"with the chosen tiles: {judged.said}; no table is written", judged.figures, Verdict.WRONG)
    path = storage.write_text(tuned.path_of(device), text)
    return Found(f"{', '.join(chosen)} in {path}: {judged.said}", {"tiles": chosen, "path": str(path)})


def _figures(place: Place) -> Mapping[str, Mapping[str, Any]]:
    return {op: place.found[op].figures for op in PRODUCTS if op in place.found}
