"""``moebed bench experts`` and ``moebed bench kernels``: the expert MLP alone, beside the peers that import.

Forward, forward and backward, and peak memory of each contestant (see moebed.bench.peers) on the same tokens, routing
and weights; rounds alternate, and only ratios within a round are compared. Nobody whose output or gradients differ
from the reference gets a ratio.

T tokens, E experts, K experts per token, R = T·K rows, H hidden, F expert intermediate.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebed.bench import train
from moebed.bench.peers import DENSE, OWN, REFERENCE, LeftOut, Peer, makers, own
from moebed.errors import UserError
from moebed.machine.allocator import keep_freed_memory
from moebed.model import native
from moebed.model.config import ModelConfig
from moebed.model.routers import Routing, SoftmaxTopK
from triton_kernels.gates.roofline import DESIGNS, SHAPES, Shape

# Relative difference (Frobenius norm) from the float32 reference that rounding explains.
TOLERANCES = {"float32": 2e-3, "bfloat16": 3e-2, "autocast": 3e-2}
# Layers of published models; those of the roofline's table are the first three.
MODELS = {
    **dict(zip(("mixtral", "deepseekmoe", "olmoe"), SHAPES, strict=True)),
    "qwen3": Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
}
# 16-bit FLOPs and bytes a second of dense products, from the vendor's data sheets (SXM modules).
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.039e12), "B200": (2.25e15, 8e12)}
CPU_TOKENS, GPU_TOKENS = 256, 8192
INITIAL_STD = 0.02
# What a contestant that cannot run on this machine says so with.
UNABLE = (LeftOut, UserError, ImportError, OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError)


@dataclass(frozen=True)
class Case:
    """What is measured: the experts of one layer, and how many tokens pass them."""

    name: str
    config: ModelConfig
    tokens: int

    @property
    def shape(self) -> Shape:
        """The same for the roofline."""
        layer = self.config.layer(0)
        sizes = (self.config.hidden_size, layer.moe_intermediate_size, layer.num_experts, layer.num_experts_per_tok)
        return Shape(self.name, *sizes, self.tokens)


def case(name: str, tokens: int | None, device: torch.device) -> Case:
    """A case by the name of a size of ``moebed bench train`` or of a published model; KeyError for others."""
    if name in train.SIZES:
        size = train.SIZES[name]
        return Case(name, size.model, tokens or size.tokens)
    shape = MODELS[name]
    config = train.mixtral(shape.hidden, shape.width, 1, shape.experts, shape.top_k, train.SIZES["A"].model.vocab_size)
    return Case(name, config, tokens or (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS))


def feed(of: Case, device: torch.device, dtype: torch.dtype) -> train.Feed:
    """Tokens embedded as a model would embed text with its skew, their routing, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    config = of.config
    table = torch.randn(config.vocab_size, config.hidden_size, generator=generator).to(device, dtype)
    gate = torch.randn(config.layer(0).num_experts, config.hidden_size, generator=generator) * INITIAL_STD
    with torch.device("meta"):
        router = SoftmaxTopK(config, config.layer(0))
    router.weight = torch.nn.Parameter(gate.to(device), requires_grad=False)
    size = train.Size(config, 1, of.tokens)

    def items(seed: int) -> Iterator[tuple[Tensor, Routing, Tensor]]:
        for number, (ids, _) in enumerate(train.batches(size, device, seed)):
            x = table[ids.flatten()]  # (T, H)
            noise = torch.Generator(device).manual_seed(seed * 1000 + number)
            grad = torch.randn(x.shape, generator=noise, device=device).to(dtype)
            yield x, SoftmaxTopK.choose(router, x.float() @ router.weight.T), grad

    return items


def weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``gate_up`` (E, 2F, H) and ``down`` (E, H, F), random, and made on the device: a CPU takes a minute for some."""
    layer, generator = config.layer(0), torch.Generator(device).manual_seed(1)
    wide = (layer.num_experts, 2 * layer.moe_intermediate_size, config.hidden_size)
    tall = (layer.num_experts, config.hidden_size, layer.moe_intermediate_size)
    gate_up, down = (
        (torch.randn(size, generator=generator, device=device) * size[-1] ** -0.5).to(dtype) for size in (wide, tall)
    )
    return gate_up, down


def _context(dtype: str, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()


def forward_step(peer: Peer, dtype: str, device: torch.device) -> train.Step:
    """The output alone, as in inference."""

    def step(x: Tensor, routing: Routing, grad: Tensor) -> float:
        with torch.no_grad(), _context(dtype, device):
            peer.run(x, routing)
        return 0.0

    return step


def both(peer: Peer, dtype: str, device: torch.device, x: Tensor, routing: Routing, grad: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of tokens, routing weights and matrices; the matrices' are dropped afterwards."""
    x = x.detach().requires_grad_()
    routing = routing._replace(topk_weight=routing.topk_weight.detach().requires_grad_())
    with _context(dtype, device):
        out = peer.run(x, routing)
    out.backward(grad.to(out.dtype))
    found = {"output": out.detach(), "x": x.grad, "topk_weight": routing.topk_weight.grad, **peer.gradients()}
    peer.module.zero_grad(set_to_none=True)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def both_step(peer: Peer, dtype: str, device: torch.device) -> train.Step:
    """Output and all gradients."""

    def step(x: Tensor, routing: Routing, grad: Tensor) -> float:
        both(peer, dtype, device, x, routing, grad)
        return 0.0

    return step


def difference(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest relative difference of output and gradients; infinite where one is missing or not a number."""
    worst = 0.0
    for name, right in reference.items():
        if name not in found or found[name].shape != right.shape:
            return float("inf")
        off = (found[name].float() - right).norm() / right.norm().clamp_min(1e-30)
        worst = max(worst, float(off) if torch.isfinite(off) else float("inf"))
    return worst


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Most memory that a step takes on top of what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    level = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        most = max(most, level)
    return most


def products_alone(of: Case, device: torch.device, dtype: torch.dtype, backward: bool) -> train.Step:
    """The matrix products of evenly loaded experts and nothing else."""
    shape = of.shape
    rows = max(1, shape.rows // shape.experts)
    shapes = {(rows, shape.hidden, 2 * shape.width): shape.experts, (rows, shape.width, shape.hidden): shape.experts}
    return train.bare_products(shapes, device, dtype, backward)


def contestants(
    of: Case, dtype: str, device: torch.device, gpu_only: bool
) -> tuple[dict[str, Peer], dict[str, float], dict[str, str]]:
    """Who can run here, how far each is from the reference, and why the others are left out."""
    element = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    gate_up, down = weights(of.config, device, element)
    item = next(feed(of, device, element)(0))
    plain = own(of.config, REFERENCE, gate_up.float(), down.float())
    wide = (item[0].float(), item[1], item[2].float())
    reference = both(plain, "float32", device, *wide)
    found: dict[str, Peer] = {}
    off: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, make in makers(of.config, of.tokens, gate_up, down, gpu_only).items():
        try:
            peer = make()
            got = both(peer, dtype, device, *item)
        except (
            LeftOut,
            UserError,
            ImportError,
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
        ) as error:
            left_out[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        found[name] = peer
        if peer.comparable:
            off[name] = difference(got, reference)
    return found, off, left_out


def run(of: Case, dtype: str, device: torch.device, rounds: int, steps: int, gpu_only: bool = False) -> dict[str, Any]:
    """Measure one case in one type; plain data for a table and for JSON."""
    torch.manual_seed(0)
    keep_freed_memory()  # the peers profit as well
    element = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    peers, off, left_out = contestants(of, dtype, device, gpu_only)
    source = feed(of, device, element)
    measured = {}
    for phase, make in (("forward", forward_step), ("both", both_step)):
        entrants = {name: make(peer, dtype, device) for name, peer in peers.items()}
        entrants[train.PRODUCTS_ALONE] = products_alone(of, device, compute, phase == "both")
        size = train.Size(of.config, 1, of.tokens)
        measured[phase] = train.measure(entrants, size, device, rounds, steps, feed=source)
    agrees = {name: off[name] <= TOLERANCES[dtype] for name in off}
    theirs = [name for name in agrees if agrees[name] and name.startswith("transformers")]
    both_of = measured["both"]
    best = min(theirs, key=lambda name: statistics.median(both_of.seconds[name])) if theirs else None
    item = next(source(0))
    rows = []
    gc.collect()
    for name in both_of.seconds:
        row: dict[str, Any] = {"name": name, "difference": off.get(name), "agrees": agrees.get(name)}
        for phase, times in measured.items():
            row[f"{phase}_seconds"] = statistics.median(times.seconds[name])
            for label, base in (("best_transformers", best), ("dense", DENSE), ("products", train.PRODUCTS_ALONE)):
                if base is not None and base != name and agrees.get(name, label == "products" and name == DENSE):
                    ratios = sorted(times.ratios(name, base))
                    row[f"{phase}_over_{label}"] = [ratios[0], statistics.median(ratios), ratios[-1]]
        if name in peers:
            row["peak_bytes"] = peak_bytes(lambda p=peers[name]: both(p, dtype, device, *item), device)  # type: ignore[misc]
            share = roofline_share(of.shape, dtype, device, row["both_seconds"])
            if share is not None and agrees.get(name):
                row["share_of_roofline"] = share
        rows.append(row)
    return {
        "case": of.name,
        "sizes": f"{of.tokens} tokens, hidden {of.shape.hidden}, {of.shape.experts} experts of {of.shape.width}, "
        f"top-{of.shape.top_k}",
        "work": of.shape.size("RHF"),
        "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "rounds": rounds,
        "steps": steps,
        "best_transformers": best,
        "rows": rows,
        "instruction_set": native.instruction_set() if OWN + "native" in peers else None,
        "left_out": left_out,
    }


def roofline_share(shape: Shape, dtype: str, device: torch.device, seconds: float) -> float | None:
    """The ideal design's bound on forward and backward over the measured time; None where no peak is known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    known = [peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name(device)]
    if not known:
        return None
    passes = [each for direction in DESIGNS["ideal"].values() for each in direction]
    return sum(each.seconds(shape, *known[0]) for each in passes) / seconds
