"""Step ``training``: steps of ``moebed bench train`` with each experts backend, eager and compiled.

A row is one contestant: its losses over three steps beside those of the loop over experts, and its tokens a second.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import moebed
from moebed.bench import train
from moebed.check.contract import Found, NotRun, Place, Row, Verdict
from moebed.check.machine import fastest
from moebed.model import native
from moebed.model.config import ModelConfig

RECIPE = Path(moebed.__file__).resolve().parents[1] / "recipes" / "small_mixtral.yaml"
RECIPE_BATCH = 4  # of its 16 sequences, so that any GPU has room
TINY = train.Size(train.mixtral(64, 64, 2, 8, 2, 512), 2, 64)  # of a CPU: what is right shows, what is fast does not
COMPARED_STEPS, MOST_SECONDS = 3, 2.0
# Of losses, relative: each step's products round, and the next one starts from there.
TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 5e-3}
PEERS = {f"transformers {name}": name for name in train.TRANSFORMERS_EXPERTS}


class Contestant(NamedTuple):
    """Who takes the step."""

    size: str
    name: str
    compiled: bool
    precision: str

    def __str__(self) -> str:
        return f"{self.size}: {self.name}, {'compiled' if self.compiled else 'eager'}, {self.precision}"


def rows(place: Place) -> Sequence[Row]:
    """Of the step: first what every run does, last what takes longest to compile."""
    if place.device == "cpu":
        backends = ["loop", "grouped_mm", *(["native"] if native.load() is None else [])]
        eager = [Contestant("tiny", name, False, "32-true") for name in [*PEERS, *backends]]
        chosen = [*eager, Contestant("tiny", "grouped_mm", True, "32-true")]
    else:
        ours = ["loop", "grouped_mm", "triton"]
        chosen = [
            Contestant(size, name, False, "bf16-mixed") for size in ("A", "F", "B") for name in [*PEERS, *ours, "dense"]
        ]
        chosen += [Contestant("small_mixtral", name, False, "bf16-mixed") for name in ours[1:]]
        chosen += [
            Contestant(size, name, True, "bf16-mixed") for size in ("A", "small_mixtral", "F", "B") for name in ours[1:]
        ]
        chosen += [Contestant("A", name, True, "bf16-mixed") for name in (*list(PEERS)[:1], "dense")]
        chosen += [Contestant("A", name, False, "32-true") for name in ours]
    wanted = functools.cache(functools.partial(_reference_losses, place.device))
    return [Row(str(each), functools.partial(measure, place, each, wanted)) for each in chosen]


def size_of(name: str) -> train.Size:
    """A size by its name.

    Raises:
        NotRun: The recipe that says it is not here.
    """
    if name != "small_mixtral":
        return TINY if name == "tiny" else train.SIZES[name]
    if not RECIPE.is_file():
        raise NotRun("the recipes are not beside the package")
    import yaml

    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return train.Size(ModelConfig(**content["model"]["config"]), RECIPE_BATCH, content["data"]["sequence_length"])


def make_step(of: Contestant, device: str) -> train.Step:
    """Its step, from the same random weights as everybody's of its architecture."""
    torch.manual_seed(0)
    size, target = size_of(of.size), torch.device(device)
    if of.name in PEERS:
        return train.transformers_step(size.model, target, PEERS[of.name], of.compiled, of.precision)
    model = train.dense_of_equal_flops(size.model) if of.name == "dense" else size.model
    backend: Any = "auto" if of.name == "dense" else of.name
    return train.own_step(dataclasses.replace(model, experts_backend=backend), target, of.compiled, of.precision)


def losses_of(step: train.Step, of: Contestant, device: str) -> list[float]:
    """Of the first steps."""
    batches = train.batches(size_of(of.size), torch.device(device))
    return [step(*batch) for batch in itertools.islice(batches, COMPARED_STEPS)]


def _reference_losses(device: str, of: Contestant) -> list[float]:
    return losses_of(make_step(of, device), of, device)


def measure(place: Place, of: Contestant, wanted: Callable[[Contestant], list[float]]) -> Found:
    """One contestant."""
    begin = time.perf_counter()
    step = make_step(of, place.device)
    losses = losses_of(step, of, place.device)
    warm = time.perf_counter() - begin
    size = size_of(of.size)
    source = train.batches(size, torch.device(place.device), seed=1)
    data = itertools.cycle([next(source) for _ in range(4)])
    tokens = size.tokens / fastest(lambda: step(*next(data)), place.device, MOST_SECONDS / 2)
    figures = {"losses": losses, "tokens_per_second": tokens, "warm_up_seconds": warm}
    said = f"{tokens:,.0f} tokens/s, {warm:.1f} s to warm up"
    if of.name in PEERS or of.name == "dense":
        return Found(said, figures)
    loop = of._replace(name="loop", compiled=False)
    kept = place.found.get(str(loop))
    reference = losses if of == loop else kept.figures["losses"] if kept and "losses" in kept.figures else wanted(loop)
    off = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
    figures["difference"] = off
    if not off <= TOLERANCES[of.precision]:
        return Found(f"losses differ from the loop's by {off:.1e}: {losses}, not {reference}", figures, Verdict.WRONG)
    said += f"; losses within {off:.0e} of the loop's"
    theirs = [place.found.get(str(of._replace(name=name))) for name in PEERS]
    rates = [each.figures["tokens_per_second"] for each in theirs if each and "tokens_per_second" in each.figures]
    if rates:
        said += f"; {tokens / max(rates):.2f} times transformers' best"
    is_slow = bool(rates) and of.name != "loop" and of.size != "tiny" and tokens < max(rates)
    return Found(said, figures, Verdict.SLOW if is_slow else Verdict.WORKS)
