"""Step ``tiles``: of the tiles that pass the gates, the fastest here, written to where the next launch reads them.

``python -m moebed.check.tiles OP MODEL DEVICE`` compiles the candidates of one op at the sizes of one model.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from triton_kernels.configs import CANDIDATES, Config, Tile, WeightTile, with_tile
from triton_kernels.grouped.down import down
from triton_kernels.grouped.grad_activation import grad_activation
from triton_kernels.grouped.grad_hidden import grad_hidden
from triton_kernels.grouped.grad_rows import grad_rows
from triton_kernels.grouped.grad_weight import grad_down, grad_up
from triton_kernels.grouped.up import up
from triton_kernels.mlp.op import config_for
from triton_kernels.routing import Metadata, route

TUNED_ON = ("deepseekmoe", "olmoe")  # of one table: an expert of Mixtral's width has another
TOLERANCE = 1e-2  # of a candidate's output beside the shipped tiles'
WORTH = 0.98  # of the time; less is not told from chance
COMPILE_SECONDS = 45.0
ROUNDS = 3

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
    "grad_hidden": lambda of, config: (grad_hidden(of.grad, of.case.down, of.meta, config),),
    "grad_rows": lambda of, config: (grad_rows(of.grad_pre, of.case.gate_up, of.meta, config),),
    "grad_up": lambda of, config: (grad_up(of.grad_pre, of.case.x, of.meta, config),),
    "grad_down": lambda of, config: (grad_down(of.grad, of.weighted, of.meta, config),),
}


def rows(place: Place) -> Sequence[Row]:
    """Of the step: an op each, then the table."""
    os.environ[tuned.SWITCH] = tuned.SHIPPED
    tuned.tuned.cache_clear()
    sizes = [size_of(name) for name in TUNED_ON]
    inputs = functools.cache(functools.partial(make_inputs, place.device))

    def tune_op(op: str) -> Found:
        base = shipped(place.device)
        return tune(op, base, candidates(op, base), [inputs(size) for size in sizes], _timer(place))

    return [
        Row("compiled", functools.partial(compile_all, place.device)),
        *(Row(op, functools.partial(tune_op, op)) for op in PRODUCTS),
        Row("the table", functools.partial(write_table, place)),
    ]


def size_of(model: str) -> kernels.Size:
    """Of a published model."""
    shape = MODELS[model]
    return kernels.Size(shape.tokens, shape.experts, shape.top_k, shape.hidden, shape.width)


def shipped(device: str) -> Config:
    """The table of a launch in 16 bits."""
    width = size_of(TUNED_ON[0]).width
    return config_for(torch.empty(1, device=device, dtype=torch.bfloat16), width)


def candidates(op: str, base: Config) -> Sequence[AnyTile]:
    """What to try beside the shipped tile."""
    return CANDIDATES.get(base.name, {}).get(op, ())


def compile_all(device: str) -> Found:
    """Every candidate at once, in as many processes as there are cores: Triton keeps what they compile."""
    if not any(candidates(op, shipped(device)) for op in PRODUCTS):
        raise NotRun(f"no candidates for {shipped(device).name}")
    waiting = [(op, model) for op in PRODUCTS for model in TUNED_ON]
    running: list[subprocess.Popen[bytes]] = []
    begin, ended = time.monotonic(), 0
    try:
        while (waiting or running) and time.monotonic() < begin + COMPILE_SECONDS:
            while waiting and len(running) < (os.cpu_count() or 1):
                command = [sys.executable, "-m", "moebed.check.tiles", *waiting.pop(0), device]
                running.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            ended += sum(process.poll() is not None for process in running)
            running = [process for process in running if process.poll() is None]
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
    return Found(f"{ended} of {len(PRODUCTS) * len(TUNED_ON)} ops and models in {time.monotonic() - begin:.0f} s")


@torch.no_grad()
def main(arguments: Sequence[str]) -> int:
    """Launch every candidate once; H and F are what is compiled for, so few tokens are enough."""
    from moebed.check.worker import end_with_parent

    end_with_parent()
    op, model, device = arguments
    inputs, base = make_inputs(device, size_of(model)._replace(tokens=64, experts=2, top_k=1)), shipped(device)
    for tile in (getattr(base, op), *candidates(op, base)):
        with suppress(Exception):  # whoever times it says what is wrong with it
            PRODUCTS[op](inputs, with_tile(base, op, tile))
    return 0


def _timer(place: Place) -> Callable[[Callable[[], object]], float]:
    return lambda work: fastest(work, place.device, 0.02)


@torch.no_grad()
def make_inputs(device: str, size: kernels.Size) -> Inputs:
    """Random tokens and matrices, and what the shipped kernels make of them."""
    case = kernels.Case(*(each.detach() for each in kernels.make_case(device, size, torch.bfloat16)))
    config = config_for(case.x, size.width)
    meta = route(case.topk_index, size.experts, config)
    hidden, pre = up(case.x, case.gate_up, meta, "silu", True, config)
    grad = torch.randn_like(case.x)
    weighted = grad_hidden(grad, case.down, meta, config)
    grad_pre, _ = grad_activation(weighted, pre, case.weight, meta, "silu", config)
    return Inputs(case, meta, hidden, pre, grad, grad_pre, weighted)


@torch.no_grad()
def tune(
    op: str,
    base: Config,
    others: Sequence[AnyTile],
    inputs: Sequence[Inputs],
    timer: Callable[[Callable[[], object]], float],
) -> Found:
    """Time the shipped tile and the others of one op; one that is refused, or wrong, is left out aloud."""
    if not others:
        raise NotRun(f"no candidates for {base.name}")
    product = PRODUCTS[op]
    wanted = [product(of, base) for of in inputs]
    tried: list[dict[str, Any]] = []
    right: list[tuple[dict[str, Any], Config]] = []
    is_wrong = False
    for tile in (getattr(base, op), *others):
        config = with_tile(base, op, tile)
        row: dict[str, Any] = {"tile": asdict(tile)}
        tried.append(row)
        try:
            found = [product(of, config) for of in inputs]
            row["difference"] = max(map(_difference, found, wanted))
            if not row["difference"] <= TOLERANCE:
                is_wrong = True
                continue
            for of in inputs:  # compiled, and the device warm
                timer(functools.partial(product, of, config))
            right.append((row, config))
        except Exception as error:  # noqa: BLE001 - a candidate that the compiler refuses is none
            row["error"] = f"{type(error).__name__}: {error}"[:300]
    first = tried[0]
    if not right or right[0][0] is not first:
        return Found(f"the shipped tile cannot be timed: {first}", {"tried": tried}, Verdict.WRONG)
    # In turn: whoever is timed first finds a device that has cooled down.
    rounds = [
        [[timer(functools.partial(product, of, config)) for of in inputs] for _, config in right] for _ in range(ROUNDS)
    ]
    for place, (row, _) in enumerate(right):
        row["seconds"] = [statistics.median(each[place][i] for each in rounds) for i in range(len(inputs))]
        ratios = [statistics.median(each[place][i] / each[0][i] for each in rounds) for i in range(len(inputs))]
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
    base = shipped(place.device)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
