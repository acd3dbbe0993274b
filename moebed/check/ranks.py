"""Step ``ranks``: FSDP2 and expert parallelism beside one process, on one rank, and on 2 and 4 where there are GPUs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from moebed.check.contract import Found, Place, Row, Verdict
from moebed.check.same_steps import LAID_OUT, Steps, largest_difference
from moebed.check.standing import StandingRanks

STEPS, GLOBAL_BATCH = 4, 8
SECONDS = 90.0  # a row's: it is slow if its ranks have not ended by then; in a short check the step ends it before
ALONE = "one process"


class Layout(NamedTuple):
    """As ``ParallelConfig`` has it, which is imported where the ranks are: it imports torch."""

    data: int
    expert: int
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"


# What says most comes first: each way to lay out by itself, both together, the other exchange.
LAYOUTS = {
    "FSDP2, 2 ranks": Layout(2, 1),
    "EP, 2 ranks": Layout(1, 2),
    "FSDP2 and EP, 4 ranks": Layout(2, 2),
    "EP by all-gather, 2 ranks": Layout(1, 2, "all_gather"),
    "FSDP2, 4 ranks": Layout(4, 1),
    "EP, 4 ranks": Layout(1, 4),
    "FSDP2 and EP by all-gather, 4 ranks": Layout(2, 2, "all_gather"),
    "EP by all-gather, 4 ranks": Layout(1, 4, "all_gather"),
    "FSDP2, 1 rank": Layout(1, 1),
}


def rows(place: Place) -> Sequence[Row]:
    """Of the step."""
    standing = functools.cache(functools.partial(StandingRanks, seconds=SECONDS))

    @functools.cache
    def alone() -> Steps:
        kept = place.found.get(ALONE)
        if kept is not None and "steps" in kept.figures:  # of this process, or of one before it
            return {int(step): values for step, values in kept.figures["steps"].items()}
        return run(place, ALONE, standing(1))

    def one_process() -> Found:
        wanted = alone()
        return Found(f"{STEPS} steps, loss {wanted[1][0]:.4f} to {wanted[STEPS][0]:.4f}", {"steps": wanted})

    def layout(name: str) -> Found:
        return beside(place, name, standing, alone)

    of_cores = 2 if place.device == "cpu" and (os.cpu_count() or 1) > 1 else 1  # ranks that need no GPU each
    needed = {name: world for name in LAYOUTS if (world := world_of(name)) > of_cores or place.device == "cuda"}
    others = [Row(name, functools.partial(layout, name), gpus=needed.get(name, 0)) for name in LAYOUTS]
    return [Row(ALONE, one_process), *others]


def beside(place: Place, layout: str, standing: Callable[[int], StandingRanks], alone: Callable[[], Steps]) -> Found:
    """The steps of a layout beside those of one process: every layout sees the same batches."""
    wanted = alone()
    off = largest_difference(run(place, layout, standing(world_of(layout))), wanted)
    allowed = LAID_OUT[place.device]
    said = f"losses and gradient norms of {STEPS} steps differ by {off:.1e} from those of one process"
    return Found(said, {"difference": off, "allowed": allowed}, Verdict.WORKS if off <= allowed else Verdict.WRONG)


def run(place: Place, layout: str, standing: StandingRanks) -> Steps:
    """Loss and gradient norm by step of a layout.

    Raises:
        RuntimeError: A rank failed.
        TimeoutError: They did not end.
    """
    folder = place.folder / layout.replace(" ", "_").replace(",", "")
    return standing.call(train, folder, layout, place.device)


def train(folder: Path, layout: str, device: str) -> Steps:
    """On one rank."""
    import torch

    from moebed.check.runs import Run, steps
    from moebed.parallel.config import ParallelConfig

    laid_out = LAYOUTS.get(layout)
    parallel = ParallelConfig(**laid_out._asdict(), timeout_minutes=1.0) if laid_out is not None else None
    world = world_of(layout)
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // world)))
    found, _ = steps(Run(folder, device, STEPS, parallel=parallel, devices=world, batch_size=GLOBAL_BATCH // world))
    return found


def world_of(layout: str) -> int:
    """How many ranks it has."""
    laid_out = LAYOUTS.get(layout)
    return 1 if laid_out is None else laid_out.data * laid_out.expert
