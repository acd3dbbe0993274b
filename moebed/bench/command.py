"""``moebed bench WHAT``: measurements as tables of ratios, with the machine and the versions beside them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moebed.arguments import OneLineParser, whole
from moebed.errors import UserError
from moebed.machine import storage
from moebed.machine.places import require_file_writable
from moebed.machine.progress import say
from moebed.names import OF_DOMAINS, ROUTERS

Choices = dict[str, tuple[str, ...]]  # of each option
_TRAINED: Choices = {"--size": ("A", "F", "B"), "--precision": ("auto", "32-true", "bf16-mixed")}
_SHAPES: Choices = {"--shape": ("A", "F", "B", "mixtral", "deepseekmoe", "olmoe", "qwen3")}
# What an option may be, of each kind; the names are those of the files beside, which need torch: a test holds them
# together. A device needs torch to be known.
CHOICES: dict[str, Choices] = {
    "train": _TRAINED,
    "routers": _TRAINED,
    "probe": {
        "--only": ("streaming", "text", "weights", "matching"),
        "--size": ("mixtral", "deepseek", "olmoe"),
    },
    "kernels": _SHAPES
    | {
        "--arch": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "all"),
        "--dtype": ("fp16", "bf16", "fp32", "all"),
    },
    "experts": _SHAPES | {"--dtype": ("float32", "bfloat16", "autocast")},
}
PACKAGES = ("torch", "transformers", "triton", "lightning", "numpy", "scipy")


def build_parser() -> argparse.ArgumentParser:
    """The options of each kind."""
    parser = OneLineParser(prog="moebed bench", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    train = kinds.add_parser("train", help="tokens/s of a training step, beside transformers and our dense model")
    train.add_argument("--size", action="append", help="A, F or B (see moebed/bench/train.py); may be repeated")
    train.add_argument("--rounds", type=whole(1), default=10, help="alternations between all contestants")
    train.add_argument("--steps", type=whole(1), default=3, help="steps of each contestant in a round")
    train.add_argument(
        "--compile", action="store_true", help="compiled contestants as well; their warm-up takes longer"
    )
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    routers = kinds.add_parser("routers", help="tokens/s of a training step with each router, beside softmax_topk")
    routers.add_argument("--size", action="append", help="A, F or B (see moebed/bench/train.py); may be repeated")
    routers.add_argument("--router", action="append", help="one of moebed.model.routers; default all; may be repeated")
    routers.add_argument("--rounds", type=whole(1), default=10, help="alternations between all contestants")
    routers.add_argument("--steps", type=whole(1), default=3, help="steps of each contestant in a round")
    routers.add_argument("--compile", action="store_true", help="compiled, where the router can be")
    routers.add_argument("--device", default="cpu", help="cpu or cuda")
    for kind in (train, routers):
        kind.add_argument("--precision", default="auto", help="32-true, bf16-mixed or auto, of all contestants")
    probe = kinds.add_parser("probe", help="neuron matching beside the published procedure and its own products")
    probe.add_argument(
        "--rounds", type=whole(1), default=3, help="alternations of each comparison; 3 take five minutes"
    )
    probe.add_argument("--only", action="append", help="streaming, text, weights or matching; default all; repeatable")
    sizes = "rows of weights: mixtral, deepseek or olmoe; default all; repeatable"
    probe.add_argument("--size", action="append", help=sizes)
    probe.add_argument("--experts", type=whole(2), metavar="N", help="rows of weights: at most N experts of the layer")
    probe.add_argument("--full", action="store_true", help="a whole layer of 64 experts; takes more than an hour")
    kernels = kinds.add_parser("kernels", help="the Triton kernels: machine code and roofline, or times on a GPU")
    kernels.add_argument("--static", action="store_true", help="compile and check the machine code; needs no GPU")
    kernels.add_argument(
        "--arch",
        action="append",
        help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942 or all; default sm_90; repeatable",
    )
    kernels.add_argument("--dtype", action="append", help="fp16, bf16, fp32 or all; default bf16")
    kernels.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains this")
    kernels.add_argument("--first", action="store_true", help="one configuration of each op, to be quick")
    experts = kinds.add_parser("experts", help="the expert MLP: our backends, transformers', and peers that import")
    experts.add_argument("--dtype", action="append", help="float32, bfloat16 or autocast; default the first two")
    experts.add_argument("--device", default="cpu", help="cpu or cuda")
    for kind in (kernels, experts):
        kind.add_argument("--shape", action="append", help="A, F, B, mixtral, deepseekmoe, olmoe or qwen3; repeatable")
        kind.add_argument(
            "--tokens", type=whole(1), help="tokens; default those of the size, or 256 (CPU) or 8192 (GPU)"
        )
        kind.add_argument("--rounds", type=whole(1), default=10, help="alternations between all contestants")
        kind.add_argument("--steps", type=whole(1), default=3, help="steps of each contestant in a round")
    for kind in (train, routers, probe, kernels, experts):
        kind.add_argument("--json", type=Path, metavar="FILE", help="keep the figures, with versions and machine")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Measure, print a table, and keep the figures where asked."""
    options = build_parser().parse_args(arguments)
    _look_first(options)
    parts = {"train": _train, "routers": _routers, "probe": _probe, "kernels": _kernels, "experts": _experts}
    found = parts[options.what](options)
    if options.json is not None:
        storage.write_text(options.json, json.dumps({"machine": machine(), "results": found}, indent=2) + "\n")


def _look_first(options: argparse.Namespace) -> None:
    """Refuse what takes no PyTorch to see, which takes seconds to load."""
    for option, known in CHOICES[options.what].items():
        given = getattr(options, option.removeprefix("--")) or []
        _check_choices(option, [given] if isinstance(given, str) else given, known)
    for name in getattr(options, "router", None) or ():
        ROUTERS.require(name, "--router")
        if name in OF_DOMAINS:
            raise UserError(f"--router {name}: it is told each token's domain, and the text here has none")
    if options.json is not None:
        if not options.json.parent.is_dir():
            raise UserError(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
        require_file_writable(options.json, "--json")
    device = getattr(options, "device", "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: choose cpu or cuda")


def _train(options: argparse.Namespace) -> list[dict[str, Any]]:
    from moebed.bench import train

    _check_device(options.device)
    precision = _precision(options)
    results = []
    for name in options.size or ["A", "F"]:
        found = train.run(name, options.rounds, options.steps, options.compile, options.device, precision)
        _print_train(found)
        results.append(found)
    return results


def _print_train(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"size {found['size']}, {found['precision']}: {found['sizes']}\n"
        f"median \\[least, most] of {found['rounds']} rounds"
    )
    table = Table(title=title, caption="ratios of speeds within a round; more is faster")
    table.add_column("training step")
    for heading in ("tokens/s", "over transformers' best", "over own dense", "over products alone"):
        table.add_column(heading, justify="right")
    for row in found["rows"]:
        ratios = [row.get(f"over_{base}") for base in ("best_transformers", "dense", "products")]
        cells = ["" if r is None else f"{r[1]:.2f} \\[{r[0]:.2f}, {r[2]:.2f}]" for r in ratios]
        table.add_row(row["name"], f"{row['tokens_per_second']:,.0f}", *cells)
    for note in found["notes"]:
        table.caption = f"{table.caption}\n{note}"
    Console(width=max(130, Console().width)).print(table)


def _routers(options: argparse.Namespace) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.table import Table

    from moebed.bench import routers
    from moebed.model.routers import ROUTERS as rules

    _check_device(options.device)
    measured = [name for name, rule in rules.items() if not rule.needs_domain]  # random text has no domains
    _check_choices("--router", options.router or [], measured)  # one of a plug-in may need them too
    precision = _precision(options)
    results = []
    for size in options.size or ["A"]:
        names = options.router or measured
        found = routers.run(size, names, options.rounds, options.steps, options.compile, options.device, precision)
        table = Table(
            title=f"size {size}, {found['precision']}: speed over {routers.BASELINE}, "
            f"median \\[least, most] of {found['rounds']} rounds"
        )
        for heading in ("router", "width", "FLOPs", "tokens/s", "speed"):
            table.add_column(heading, justify="left" if heading == "router" else "right")
        for row in found["rows"]:
            least, middle, most = row["over_baseline"]
            cells = (f"{row['flops_ratio']:.2f}", f"{row['tokens_per_second']:,.0f}")
            speed = f"{middle:.2f} \\[{least:.2f}, {most:.2f}]"
            table.add_row(row["name"], str(row["moe_intermediate_size"]), *cells, speed)
        table.caption = "FLOPs of a training step's forward pass over softmax_topk's, expected where a coin decides"
        Console(width=max(100, Console().width)).print(table)
        results.append(found)
    return results


def _probe(options: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    from moebed.bench import probe, weights

    kinds, sizes = options.only or probe.KINDS, options.size or tuple(weights.SIZES)
    found = probe.run(options.rounds, options.full, say, kinds, sizes, options.experts)
    table = Table(title=f"weight probes, median \\[least, most] of {found['rounds']} rounds")
    for heading in ("ratio of times", "found", "goal", ""):
        table.add_column(heading, justify="left" if heading == "ratio of times" else "right")
    for row in found["rows"]:
        least, middle, most = row["ratio"]
        spread = f" \\[{least:.2f}, {most:.2f}]" if least != most else ""
        table.add_row(row["name"], f"{middle:.2f}{spread}", row["goal"], "" if row["met"] else "missed")
    table.caption = "\n".join(found["notes"])
    Console(width=max(110, Console().width)).print(table)
    return found


def _kernels(options: argparse.Namespace) -> Any:
    from moebed.bench import kernels, tables

    if not options.static:
        results = kernels.timed(options.shape or _published_shapes(), options.tokens, options.rounds, options.steps)
        for found in results:
            tables.experts(found)
        return results
    archs = kernels.ARCHS if "all" in (options.arch or []) else options.arch or ["sm_90"]
    dtypes = kernels.DTYPES if "all" in (options.dtype or []) else options.dtype or ["bf16"]
    found = kernels.static(archs, dtypes, options.only, options.first, say)
    tables.gates(found)
    tables.roofline(found)
    return found


def _experts(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from moebed.bench import experts, tables

    _check_device(options.device)
    device = torch.device(options.device)
    results = []
    for name in options.shape or ["A", "F"]:
        for dtype in options.dtype or ["float32", "bfloat16"]:
            case = experts.case(name, options.tokens, device)
            found = experts.run(case, dtype, device, options.rounds, options.steps)
            tables.experts(found)
            results.append(found)
    return results


def _published_shapes() -> list[str]:
    from moebed.bench import experts

    return list(experts.MODELS)


def _check_choices(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} {name}: choose among {', '.join(known)}")


def _precision(options: argparse.Namespace) -> str:
    """What ``--precision`` asks for, or what fits the device; a choice is said."""
    from moebed.machine.precision import choose_precision

    if options.precision != "auto":
        return options.precision
    choice = choose_precision(options.device.split(":")[0])
    say(str(choice))
    return choice.precision


def _check_device(name: str) -> None:
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": bool(torch.cpu._is_amx_tile_supported()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    """Of what is installed; figures can be had without some."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
