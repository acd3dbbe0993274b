"""``moebed bench probe``: what the expensive weight probe costs, as ratios of one run.

Neuron matching beside the published procedure, and beside its own matrix products, below which no exact method can go.
What is compared is timed in alternation, so that a slow moment of the machine falls on all of it.

N neurons of an expert, H hidden.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebed.bench import streaming, weights
from moebed.bench.published import SAMPLED_ROWS, published_pair, random_pair
from moebed.machine.float32 import exact_products
from probes.measures.matching import match_pairs

DEEPSEEK, MIXTRAL = (1408, 2048), (14336, 4096)  # N, H
LAYER_EXPERTS, SOME_EXPERTS = 64, 5
STREAMED = streaming.Shape(experts=3, layers=1)  # a part of the model: rates are per matrix, and no cache holds 1 GB
MATRICES = 3  # of which one, down, has its neurons as columns


def experts(shape: tuple[int, int], count: int, cosine: float, transposed: bool = False, seed: int = 0) -> list[Tensor]:
    """Random bf16 experts (N, H) whose neurons have this cosine with their namesakes; as columns in memory or rows."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    made = []
    for _ in range(count):
        matrix = cosine**0.5 * common + (1 - cosine) ** 0.5 * torch.randn(shape, generator=generator)
        made.append(matrix.bfloat16().T.contiguous().T if transposed else matrix.bfloat16())
    return made


def pairs_of(count: int) -> list[tuple[int, int]]:
    """All pairs i < j."""
    return list(itertools.combinations(range(count), 2))


def products_alone(matrices: Sequence[Tensor]) -> float:
    """Seconds of the products of all pairs by themselves, on all cores: the floor."""
    start = time.perf_counter()
    with exact_products(is_bf16=True):
        for first, matrix in enumerate(matrices):
            wide = matrix.float()
            for other in matrices[first + 1 :]:
                torch.mm(wide, other.float().T)
    return time.perf_counter() - start


def matching(matrices: Sequence[Tensor]) -> float:
    """Seconds of the probe's way through all pairs."""
    start = time.perf_counter()
    for _ in match_pairs(matrices.__getitem__, pairs_of(len(matrices)), len(matrices)):
        pass
    return time.perf_counter() - start


def alternate(rounds: int, *contestants: Callable[[], float]) -> list[list[float]]:
    """Seconds of each contestant in each round, after a warm-up of each."""
    for contestant in contestants:
        contestant()
    found = [[contestant() for contestant in contestants] for _ in range(rounds)]
    return [list(seconds) for seconds in zip(*found, strict=True)]


def _row(name: str, numerators: list[float], denominators: list[float], goal: float, at_least: bool) -> dict[str, Any]:
    ratios = sorted(n / d for n, d in zip(numerators, denominators, strict=True))
    middle = statistics.median(ratios)
    return {
        "name": name,
        "ratio": [ratios[0], middle, ratios[-1]],
        "goal": f"{'≥' if at_least else '≤'} {goal:g}",
        "met": middle >= goal if at_least else middle <= goal,
    }


def pair_rows(rounds: int) -> list[dict[str, Any]]:
    """One pair at DeepSeekMoE's size beside the published procedure: alone, and as one of many."""
    few = experts(DEEPSEEK, SOME_EXPERTS, 0.0)
    count = len(pairs_of(SOME_EXPERTS))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        apart, here, alone, many = alternate(
            rounds,
            lambda: pool.apply(random_pair, (DEEPSEEK,)),
            lambda: published_pair(few[0].float(), few[1].float()),
            lambda: matching(few[:2]),
            lambda: matching(few) / count,
        )
    size = " × ".join(map(str, DEEPSEEK))
    rows = []
    for where, theirs in (("in a process of its own", apart), ("in this process", here)):
        name = f"published procedure, {where} /"
        rows.append(_row(f"{name} one pair alone, {size}, random", theirs, alone, 100, True))
        rows.append(_row(f"{name} one of {count} pairs, {size}, random", theirs, many, 100, True))
        for row in rows[-2:]:
            row["published_seconds"] = statistics.median(theirs)
    return rows


def layer_rows(rounds: int, full: bool) -> list[dict[str, Any]]:
    """A layer of DeepSeekMoE's size beside its products; of its pairs a part, or all of them where ``full``."""
    count = LAYER_EXPERTS if full else SOME_EXPERTS
    rows = []
    for kind, cosine, goal in (("random", 0.0, 4.5), ("cosine .1", 0.1, 2.0), ("cosine .5", 0.5, 2.0)):
        floor, ours = [0.0] * rounds, [0.0] * rounds
        for number in range(MATRICES):  # one matrix of the layer in memory at a time
            matrices = experts(DEEPSEEK, count, cosine, transposed=number == MATRICES - 1, seed=number)
            timed = alternate(rounds, lambda m=matrices: products_alone(m), lambda m=matrices: matching(m))  # type: ignore[misc]
            floor = [a + b for a, b in zip(floor, timed[0], strict=True)]
            ours = [a + b for a, b in zip(ours, timed[1], strict=True)]
        seen = f"{len(pairs_of(count)) * MATRICES} of {len(pairs_of(LAYER_EXPERTS)) * MATRICES} pairs"
        rows.append(_row(f"DeepSeekMoE layer / its products alone, {kind}, {seen}", ours, floor, goal, False))
        rows[-1]["seconds_per_pair"] = statistics.median(ours) / (len(pairs_of(count)) * MATRICES)
    return rows


def _big_pair(cosine: float, rounds: int) -> tuple[list[list[float]], float]:
    """Seconds of products and matching of one large pair, and the process's peak memory in GB (nan if unknown)."""
    two = experts(MIXTRAL, 2, cosine)
    timed = alternate(rounds, lambda: matching(two), lambda: products_alone(two))
    try:
        import resource
    except ImportError:  # Windows
        return timed, float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return timed, peak / 1e9


def big_rows(rounds: int) -> list[dict[str, Any]]:
    """One pair at Mixtral 8x7B's size, in a process of its own that shows what memory it took."""
    rows = []
    size = " × ".join(map(str, MIXTRAL))
    for kind, cosine in (("random", 0.0), ("cosine .1", 0.1), ("cosine .5", 0.5)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            (ours, floor), peak = pool.apply(_big_pair, (cosine, rounds))
        rows.append(_row(f"one pair / its products alone, {size}, {kind}", ours, floor, 3, False))
        rows[-1]["seconds_per_pair"] = statistics.median(ours)
        rows[-1]["peak_gigabytes"] = peak
        rows.append(_row(f"peak memory of that in GB, {kind}", [peak], [1.0], 4, False))
    return rows


def streaming_rows(rounds: int) -> list[dict[str, Any]]:
    """Reading a checkpoint with matrices of Mixtral 8x7B's size."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="moebed-bench-") as scratch:
        folder = streaming.write_model(Path(scratch) / "model", STREAMED)

        def cold(read: Callable[[Path], float]) -> Callable[[], float]:
            def measure() -> float:
                streaming.forget_cached(folder)
                return read(folder)

            return measure

        def cached(read: Callable[[Path], float]) -> Callable[[], float]:
            def measure() -> float:
                streaming.keep_cached(folder)
                return read(folder)

            return measure

        for kind, wrap in (("from disk", cold), ("from the page cache", cached)):
            plain, streamed = alternate(rounds, wrap(streaming.plain_read), wrap(streaming.streamed_read))
            rows.append(_row(f"plain read / streamed read, {kind}", plain, streamed, 0.9, True))
            size = sum(path.stat().st_size for path in folder.iterdir())
            rows[-1] |= {"bytes": size, "seconds": statistics.median(streamed)}
    return rows


def text_rows(rounds: int) -> list[dict[str, Any]]:
    """A pass of text through a layer of the same checkpoint."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="moebed-bench-") as scratch:
        folder = streaming.write_model(Path(scratch) / "model", STREAMED)
        for dtype in ("float32", "bfloat16"):
            ours, floor = alternate(
                rounds,
                lambda d=dtype: streaming.text_pass(folder, STREAMED, d),  # type: ignore[misc]
                lambda d=dtype: streaming.products_alone(STREAMED, getattr(torch, d)),  # type: ignore[misc]
            )
            name = f"pass of {STREAMED.tokens} tokens / its products alone, {dtype}"
            rows.append(_row(name, ours, floor, 1.3, False))
            rows[-1]["seconds"] = statistics.median(ours)
    return rows


def weight_rows(rounds: int, sizes: Sequence[str], most: int | None) -> list[dict[str, Any]]:
    """Each probe of weights, and all together, over reading and multiplying a layer once; of ``most`` experts of it."""
    rows = []
    for model, whole in (weights.SIZES[size] for size in sizes):
        shape = replace(whole, experts=min(whole.experts, most or whole.experts))
        with tempfile.TemporaryDirectory(prefix="moebed-bench-") as scratch:
            folder = streaming.write_model(Path(scratch) / "model", shape)
            passes: list[dict[str, float]] = []

            def ours(folder: Path = folder, passes: list[dict[str, float]] = passes) -> float:
                streaming.keep_cached(folder)
                passes.append(weights.layer_pass(folder))
                return passes[-1]["all"]

            def multiply(folder: Path = folder, shape: streaming.Shape = shape) -> float:
                streaming.keep_cached(folder)
                return weights.read_and_multiply(folder, shape)

            _, floor = alternate(rounds, ours, multiply)
        seen = f"{shape.experts} experts" if shape == whole else f"{shape.experts} of {whole.experts} experts"
        for name in (*weights.MEASURED, "all"):
            seconds = [found[name] for found in passes[1:]]  # after the warm-up
            what = "all probes of weights but matching" if name == "all" else name
            label = f"{what} / reading and multiplying a layer, {model}, {seen}"
            rows.append(_row(label, seconds, floor, 2, False) | {"seconds": statistics.median(seconds)})
    return rows


KINDS = ("streaming", "text", "weights", "matching")


def run(
    rounds: int,
    full: bool,
    progress: Callable[[str], None],
    only: Sequence[str] = KINDS,
    sizes: Sequence[str] = tuple(weights.SIZES),
    most: int | None = None,
) -> dict[str, Any]:
    """Measure everything, or ``only`` some of ``KINDS``; ``rounds`` alternations of each comparison.

    Args:
        rounds: How often.
        full: Match the neurons of a whole layer.
        progress: Is told what is measured.
        only: Of ``KINDS``.
        sizes: Of ``weights.SIZES``, for the rows of weights.
        most: Experts of a layer that the rows of weights take, if not all.
    """
    rows = []
    for kind, what, measure in (
        ("streaming", "streaming of a checkpoint", lambda: streaming_rows(rounds)),
        ("text", "a pass of text beside its products", lambda: text_rows(rounds)),
        ("weights", "probes of weights beside one product of a layer", lambda: weight_rows(rounds, sizes, most)),
        ("matching", "one pair beside the published procedure", lambda: pair_rows(rounds)),
        ("matching", "a DeepSeekMoE layer beside its products", lambda: layer_rows(rounds, full)),
        ("matching", "one pair of Mixtral's size", lambda: big_rows(max(1, rounds // 2))),
    ):
        if kind in only:
            progress(f"measuring {what}")
            rows += measure()
    told = [
        (
            ("matching",),
            f"published procedure: {SAMPLED_ROWS} of {DEEPSEEK[0]} rows are timed and scaled; the assignment is whole; "
            "how fast it allocates depends on what its process did before, so it is timed in two",
        ),
        (
            ("text", "matching"),
            "'products alone' are float32-accumulated products of bf16 weights on all cores, converted as the probe "
            "does",
        ),
        (
            ("weights",),
            "reading and multiplying a layer: each expert matrix read from the page cache, copied to float32 and "
            "multiplied by its transpose on its shorter side, the least product that lengths, angles, spectra follow "
            "from",
        ),
    ]
    notes = [note for kinds, note in told if set(kinds) & set(only)]
    if "weights" in only:
        notes.append(weights.rates())
    if "matching" in only and not full:
        notes.append(f"a layer is timed over {SOME_EXPERTS} of its {LAYER_EXPERTS} experts; --full takes all")
    return {"rounds": rounds, "full": full, "notes": notes, "rows": rows}
