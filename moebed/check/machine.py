"""Step ``machine``: what is here, and what memory and products reach, measured before anything else is judged."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moebed.check.contract import Found, Place, Row
from moebed.machine.units import human

# What a run can do without, and what it is for.
OPTIONAL = {
    "jsonargparse": "moebed fit",
    "datasets": "text from a hub, Parquet",
    "scipy": "probes of weights, studies",
    "triton": "experts_backend triton",
    "transformers": "peers, export's check",
    "tensorboard": "curves",
    "matplotlib": "pictures",
    "scattermoe": "a peer",
    "liger_kernel": "a peer",
    "megablocks": "a peer",
}
TYPES = ("bfloat16", "float16", "tf32", "float32")


def rows(place: Place) -> Sequence[Row]:
    """Of the step."""
    return [
        Row("packages", packages),
        Row("processor", processor),
        Row("compilers", compilers),
        Row("GPU", gpu, gpus=1),
        Row("memory of the GPU", memory, gpus=1),
        Row("copying", lambda: copying(place.device)),
        *(Row(f"products in {name}", functools.partial(gpu_products, name), gpus=1) for name in TYPES),
        Row("products of a core", core_products),
        Row("GPUs that reach each other", reach, gpus=2),
    ]


def packages() -> Found:
    """Versions, and what is missing."""
    from moebed.bench.command import machine

    versions = {name: number for name, number in machine()["versions"].items() if number}
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    without = ", ".join(f"{name} ({OPTIONAL[name]})" for name in missing())
    return Found(f"{said}; not installed: {without or 'nothing'}", {"versions": versions, "missing": missing()})


def missing() -> list[str]:
    """Of what a run can do without, what is not installed."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def processor() -> Found:
    """Cores, memory and instructions."""
    import psutil

    from moebed.bench.command import machine

    found = {name: value for name, value in machine().items() if name not in ("versions", "gpu")}
    found["memory"] = psutil.virtual_memory().total
    said = f"{found['processor']}, {found['cores']} cores, {human(found['memory'], 'B')}, {found['cpu_capability']}"
    return Found(said, found)


def compilers() -> Found:
    """Those that are found: for the compiled experts, and Triton's own assembler."""
    commands = {"g++": shutil.which("g++"), "nvcc": shutil.which("nvcc"), "ptxas of Triton": _ptxas()}
    found = {name: _first_version(command) for name, command in commands.items() if command}
    missing = [name for name in commands if name not in found]
    said = ", ".join(f"{name} {number}" for name, number in found.items())
    return Found(f"{said or 'none'}{'; not here: ' + ', '.join(missing) if missing else ''}", found)


def _ptxas() -> str | None:
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / "ptxas"
        if path.is_file():
            return str(path)
    return None


def _first_version(command: str) -> str:
    try:
        done = subprocess.run([command, "--version"], capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run ({error})"
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)*", done.stdout.decode(errors="replace"))
    return numbers[0] if numbers else "of unknown version"


def driver() -> str | None:
    """Version of NVIDIA's driver; None where nobody says."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, timeout=20)
        said = done.stdout.decode(errors="replace").split()
        return said[0] if done.returncode == 0 and said else None
    except (OSError, subprocess.SubprocessError):
        return None


def gpu() -> Found:
    """Names, capability, and what torch was built for."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        known = ("name", "total_memory", "multi_processor_count", "shared_memory_per_block_optin", "L2_cache_size")
        found.append({name: getattr(facts, name, None) for name in known})
        found[-1]["capability"] = list(torch.cuda.get_device_capability(index))
    first = found[0]
    built = {"cuda": torch.version.cuda, "hip": torch.version.hip, "archs": torch.cuda.get_arch_list()}
    with_nccl = _nccl()
    figures = {"devices": found, "driver": driver(), "torch": built, "nccl": with_nccl}
    capability = ".".join(map(str, first["capability"]))
    said = (
        f"{len(found)} x {first['name']}, capability {capability}, {human(first['total_memory'], 'B')}, "
        f"{first['multi_processor_count']} multiprocessors; driver {figures['driver']}, CUDA {built['cuda']}, "
        f"NCCL {with_nccl}"
    )
    return Found(said, figures)


def _nccl() -> str:
    try:
        from torch.cuda import nccl

        return ".".join(map(str, nccl.version()))
    except Exception as error:  # noqa: BLE001 - not every build has it
        return f"not to be had ({type(error).__name__})"


def memory() -> Found:
    """Free of all, as the driver says."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return Found(f"{human(free, 'B')} of {human(total, 'B')} are free", {"free": free, "total": total})


def copying(device: str) -> Found:
    """Bytes a second of a copy within a device's memory, read and written."""
    import torch

    size = 1 << (30 if device == "cuda" else 26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device)
    rate = 2 * size / seconds
    return Found(f"{human(rate, 'B')} a second, read and written, of {device}'s memory", {"bytes_per_second": rate})


def gpu_products(name: str) -> Found:
    """FLOPs a second of a large product."""
    import torch

    side = 8192 if name != "float32" else 4096
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    left, right = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        seconds = fastest(lambda: torch.mm(left, right, out=out), "cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    rate = 2 * side**3 / seconds
    return Found(f"{rate / 1e12:,.1f} TFLOP/s at {side} x {side} x {side}", {"flops_per_second": rate})


def core_products() -> Found:
    """What ``precision: auto`` goes by on a CPU."""
    from moebed.machine.precision import choose_precision, measured_rates

    wide, narrow = measured_rates()
    return Found(str(choose_precision("cpu")), {"float32_gflops": wide, "bfloat16_gflops": narrow})


def reach() -> Found:
    """Which pairs of GPUs read each other's memory."""
    import torch

    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    return Found(f"{len(pairs) - len(apart)} of {len(pairs)} pairs", {"apart": apart})


def fastest(work: Callable[[], object], device: str, seconds: float = 0.2) -> float:
    """The least time of several calls, after one that warms up; by CUDA's own clock where it runs there."""
    import torch

    work()
    times: list[float] = []
    if device != "cuda":
        while not times or sum(times) < seconds:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return min(times)
    while not times or (sum(times) < seconds and len(times) < 200):
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        work()
        end_event.record()
        torch.cuda.synchronize()
        times.append(begin_event.elapsed_time(end_event) / 1e3)
    return min(times)
