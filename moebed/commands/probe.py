"""``moebed probe CHECKPOINT --out DIR``: the probes over a checkpoint, a layer at a time.

No more than ``Trainer.predict`` on a PretrainedMoE with ProbeCallback, TensorBoard and a progress bar.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.arguments import OneLineParser, add_text_options, parse_setting, read_yaml
from moebed.checkpoints.hub import require_nameable
from moebed.errors import ConfigError, UserError, did_you_mean

if TYPE_CHECKING:
    from moebed.checkpoints.texts import TextOptions

_CHOICES = {
    "dtype": ("float32", "bfloat16", "auto"),
    "device": ("cpu", "cuda"),
    "through": ("transformers",),
    "trace_format": ("vllm", "megatron"),
}


def build_parser() -> argparse.ArgumentParser:
    """The options; each can stand in a YAML file as well."""
    parser = OneLineParser(
        prog="moebed probe",
        description="Run probes on a pretrained checkpoint of any size and write what they found.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="folder of a checkpoint, its hub id, or a .ckpt file; or a trace of routing, a .jsonl file",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="a file with these options; those given here come first")
    parser.add_argument("--out", metavar="DIR", help="folder for results, figures, TensorBoard events and report.html")
    parser.add_argument(
        "--probes", metavar="A,B", help="all that the inputs allow (the default), or some of them by name"
    )
    parser.add_argument(
        "--probe-option",
        action="append",
        metavar="PROBE.NAME=VALUE",
        help="a setting of a probe, such as traffic.ranks=8; may be repeated",
    )
    parser.add_argument(
        "--intervene",
        action="append",
        metavar="WHAT",
        help="what the loss becomes where routers decide otherwise, such as 'mask 3 @ layer 5'; may be repeated, and "
        "all go through the layers in one pass",
    )
    parser.add_argument(
        "--earlier",
        nargs="+",
        metavar="CHECKPOINT",
        help="checkpoints of the same model before this one, in order: when were the choices settled (probe "
        "saturation)? Each is gone through as well, and kept in DIR/earlier",
    )
    text = parser.add_argument_group("text to run through it; without any, only weights are looked at")
    add_text_options(text)
    text.add_argument("--save-logits", action="store_true", help="keep the logits (T, V) in results/logits.npz")
    text.add_argument("--save-trace", metavar="FILE.jsonl", help="write which experts each token of the text went to")
    text.add_argument(
        "--trace-format",
        choices=_CHOICES["trace_format"],
        help="vllm (the default), a line a sequence, or megatron, a line a layer",
    )
    parser.add_argument(
        "--through",
        choices=_CHOICES["through"],
        help="transformers: any MoE whose experts go through its experts interface, read into memory whole and run by "
        "its own code",
    )
    parser.add_argument("--num-experts", type=int, metavar="N", help="experts of a layer, where a trace does not say")
    parser.add_argument("--reference-dense", metavar="DENSE", help='dense checkpoint to compare with, the paper\'s "F"')
    parser.add_argument("--layers", metavar="0,5", help="all (the default), or some of them")
    parser.add_argument(
        "--dtype",
        choices=_CHOICES["dtype"],
        help="look at the weights as rounded to this and compute in it; default as stored, and in float32; auto is "
        "bfloat16 where this machine multiplies it faster, which changes the numbers, and else the default; a folder's "
        "results are continued with what it was when they were begun",
    )
    parser.add_argument("--device", choices=_CHOICES["device"], help="where to compute; default cpu")
    parser.add_argument("--memory-budget", metavar="8GiB", help="memory for weights and the work on them; default 8GiB")
    parser.add_argument(
        "--fresh", action="store_true", help="compute all anew; if not given, what is kept in DIR of the same is used"
    )
    return parser


_DEFAULTS: dict[str, Any] = {
    "probes": "all",
    "probe_option": [],
    "intervene": [],
    "earlier": [],
    "through": None,
    "num_experts": None,
    "save_trace": None,
    "trace_format": "vllm",
    "reference_dense": None,
    "layers": "all",
    "dtype": None,
    "device": "cpu",
    "memory_budget": "8GiB",
    "text": [],
    "input_ids": [],
    "domain": [],
    "sequence_length": None,
    "domain_tokens": None,
    "text_field": None,
    "save_logits": False,
    "fresh": False,
}


# What the checkpoints before are asked for, beside what they share with the one that is probed.
_OF_EARLIER: dict[str, Any] = {
    "probes": "saturation", "probe_option": [], "intervene": [], "reference_dense": None, "save_logits": False,
    "save_trace": None,
}  # fmt: skip


def run(command: str, arguments: Sequence[str]) -> None:
    """Probe a checkpoint, after those before it.

    Raises:
        UserError: Nothing could be probed, or some layers could not; the results of the others are written then.
    """
    options = read_options(arguments)
    dense = options["reference_dense"]
    require_nameable(*_several(options["earlier"]), options["checkpoint"], *([dense] if dense else []))
    folders: dict[str, Path] = {}
    for checkpoint in _several(options["earlier"]):
        name = Path(checkpoint).stem if checkpoint.endswith(".ckpt") else Path(checkpoint).name
        if name in folders:
            raise ConfigError(f"--earlier: two checkpoints are called {name}; give folders of other names")
        folders[name] = Path(options["out"]) / "earlier" / name
    if folders and not any(options[kind] for kind in ("text", "input_ids", "domain")):
        raise ConfigError("--earlier needs text; give --text, --input-ids or --domain")
    done: list[str] = []
    for checkpoint, folder in zip(_several(options["earlier"]), folders.values(), strict=True):
        _probe({**options, **_OF_EARLIER, "checkpoint": checkpoint, "out": str(folder)}, [])
        done.append(str(folder))
    _probe(options, done if folders else None)


def _probe(options: dict[str, Any], earlier: list[str] | None) -> None:
    """Probe one checkpoint.

    Args:
        options: All of the command.
        earlier: Folders of those before it; None where it is not one of several.
    """
    # Heavy imports wait until the options are known to be well formed.
    import torch

    from moebed.checkpoints.texts import TextOptions
    from moebed.commands.probe_whole import probe_through_transformers, probe_trace, save_trace
    from moebed.machine import storage
    from moebed.traces.files import is_trace
    from moebed.training.command_line import say
    from probes.registry import make_probes
    from probes.running.choosing import probes_for

    out = Path(options["out"])
    given = {name: _several(options[name]) for name in ("text", "input_ids")}
    text = TextOptions.of({**options, **given, "domain": _domains(options["domain"])})
    chosen, settings = _asked(options, bool(text))
    if earlier is not None:
        chosen.append("saturation")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    storage.require_writable(out, "--out")
    _quiet()
    if is_trace(Path(options["checkpoint"])):
        _refuse(options, ("probes", "probe_option", "num_experts", "save_trace", "trace_format", "fresh"), "a trace")
        missing = probe_trace(options, chosen, settings)
    else:
        make_probes(probes_for(chosen, bool(text), earlier is not None), settings)
        if options["num_experts"] is not None:
            raise ConfigError("--num-experts is for traces; a checkpoint says how many experts it has")
        if options["dtype"] == "auto":
            options["dtype"], why = _dtype_of_run(out, options["device"], options["fresh"])
            options["kept_dtype"] = json.dumps(options["dtype"]) + "\n"
            say(f"dtype auto: {options['dtype'] or 'as stored, and products in float32'} ({why})")
        if options["through"] is not None:
            alone = ("reference_dense", "layers", "memory_budget", "intervene", "earlier")
            _refuse(options, tuple(name for name in _DEFAULTS if name not in alone), "--through transformers")
            missing = probe_through_transformers(options, text, chosen, settings)
        else:
            missing = _probe_streamed(options, text, chosen, settings, earlier)
        if options["save_trace"]:
            save_trace(out, Path(options["save_trace"]), options["trace_format"])
    _finish(out, missing)


def _asked(options: dict[str, Any], has_text: bool) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The probes that are named, those that options name, and settings of them."""
    chosen, settings = _listed(options["probes"]), _probe_options(options["probe_option"])
    for option, probe in (("save_logits", "logits"), ("intervene", "interventions"), ("save_trace", "routing")):
        if not options[option]:
            continue
        if not has_text and option != "save_trace":
            raise ConfigError(f"--{option.replace('_', '-')} needs text; give --text, --input-ids or --domain")
        chosen.append(probe)
    if options["intervene"]:
        settings = settings | {"interventions": {"apply": "; ".join(_several(options["intervene"]))}}
    return chosen, settings


def _refuse(options: dict[str, Any], known: Sequence[str], what: str) -> None:
    """Raise ConfigError for an option that does nothing here."""
    for name, default in _DEFAULTS.items():
        if options[name] != default and name not in known:
            raise ConfigError(f"--{name.replace('_', '-')} does nothing with {what}; leave it out")


def _probe_streamed(
    options: dict[str, Any],
    text: TextOptions,
    chosen: list[str],
    settings: dict[str, dict[str, Any]],
    earlier: list[str] | None,
) -> dict[int, str]:
    """Layer by layer, within the memory budget: layers that are missing, and why."""
    from lightning.pytorch.callbacks import LambdaCallback

    from moebed.checkpoints.pretrained import PretrainedMoE
    from moebed.checkpoints.reading_bar import ReadingBar
    from moebed.machine import storage
    from moebed.machine.allocator import keep_freed_blocks
    from moebed.machine.termination import ending_on_sigterm
    from moebed.training.command_line import say
    from moebed.training.trainer import looking_trainer
    from probes.running.callback import ProbeCallback

    out, layers = Path(options["out"]), _listed(options["layers"])
    model = PretrainedMoE(
        options["checkpoint"],
        reference_dense=options["reference_dense"],
        layers=None if "all" in layers else [_layer(one) for one in layers],
        memory_budget=options["memory_budget"],
        dtype=options["dtype"],
        text=text,
    )
    for note in model.notes:
        say(f"note: {note}")
    probing = ProbeCallback(chosen, out=str(out), fresh=options["fresh"], options=settings, earlier=earlier)
    callbacks = [ReadingBar(), probing]
    if kept := options.get("kept_dtype"):  # written once the folder is known to be this model's
        callbacks.append(LambdaCallback(on_predict_start=lambda *_: storage.write_text(_kept_dtype(out), kept)))
    keep_freed_blocks()
    trainer = looking_trainer(out, "cpu" if options["device"] == "cpu" else "gpu", callbacks)
    try:
        with ending_on_sigterm():
            trainer.predict(model, return_predictions=False)
    except (SystemExit, KeyboardInterrupt):
        say(f"stopped; the layers that are finished are kept in {out}, and the same command goes on from there")
        raise
    finally:
        model.close()
    return probing.missing


def _finish(out: Path, missing: dict[int, str]) -> None:
    """The report; raises UserError where layers are missing."""
    from moebed.machine.progress import say
    from probes.report.page import left_out, write_report
    from probes.running.run_folder import read_run

    say(f"report: {write_report([out], out / 'report.html')}")
    run = read_run(out)
    for line in left_out([run]):
        say(f"note: {line}")
    if not any(result.arrays for result in run.results.values()):
        notes = dict.fromkeys(note for result in run.results.values() for note in result.notes)
        say(f"note: no probe found anything: {'; '.join(notes)}")
    if missing:
        first, why = next(iter(missing.items()))
        more = f" (and {len(missing) - 1} more layers)" if len(missing) > 1 else ""
        raise UserError(f"layer {first}{more} is missing from the results in {out}, at least in part: {why}")


def _dtype_of_run(out: Path, device: str, fresh: bool) -> tuple[str | None, str]:
    """What ``--dtype auto`` is, and why: what it was when the folder's results were begun, else what fits the device.

    The numbers depend on it: layers that another kind of machine goes on with are to be of the same kind.
    """
    from moebed.machine.precision import choose_precision

    try:
        kept = json.loads(_kept_dtype(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing was begun here, or nothing that can be read
        kept = ""
    if not fresh and kept in (None, "bfloat16"):
        return kept, f"as the results in {out} were begun"
    choice = choose_precision(device)
    return "bfloat16" if choice.precision == "bf16-mixed" else None, choice.reason


def _kept_dtype(out: Path) -> Path:
    from probes.running.store import results_dir

    return results_dir(out) / "dtype_auto.json"


def read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """All options: those given, then those of the YAML file, then the defaults.

    Raises:
        ConfigError: A key of the file is unknown or has no such value, or checkpoint or out is given nowhere.
    """
    given = vars(build_parser().parse_args(arguments))
    file = given.pop("config", None)
    content = _read_yaml(Path(file), ["checkpoint", "out", *_DEFAULTS]) if file is not None else {}
    options = {**_DEFAULTS, **content, **given}
    for name in ("checkpoint", "out"):
        if not options.get(name):
            wanted = (
                "CHECKPOINT, a folder or a hub id" if name == "checkpoint" else "--out DIR, a folder for the results"
            )
            raise ConfigError(f"moebed probe needs {wanted}")
    for name, choices in _CHOICES.items():
        if options[name] is not None and options[name] not in choices:
            raise ConfigError(f"{name} is {options[name]!r}; choose one of {', '.join(choices)}")
    return options


def _read_yaml(path: Path, known: Sequence[str]) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no options by name")
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known, f"the known ones are {', '.join(known)}")
            raise ConfigError(f"{path}: unknown key {key!r}; {hint}")
    return content


def _listed(value: Any) -> list[str]:
    """Names from "a,b" or from a list of a YAML file."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _several(value: Any) -> list[str]:
    """One or several from a YAML file or the command line."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _domains(value: Any) -> list[str]:
    """NAME=FILE, several; in a YAML file a mapping does as well."""
    return [f"{name}={file}" for name, file in value.items()] if isinstance(value, dict) else _several(value)


def _probe_options(value: Any) -> dict[str, dict[str, Any]]:
    """PROBE.NAME=VALUE, several; in a YAML file a mapping of mappings does as well."""
    if isinstance(value, dict):
        return value
    found: dict[str, dict[str, Any]] = {}
    for one in _several(value):
        name, equals, setting = one.partition("=")
        probe, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise ConfigError(f"probe_option {one!r} is none; write PROBE.NAME=VALUE, such as traffic.ranks=8")
        found.setdefault(probe, {})[key] = parse_setting(one, setting)
    return found


def _layer(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"layers: {text!r} is no layer; write all, or numbers such as 0,5,10")
    return int(text)


def _quiet() -> None:
    """Leave out what Lightning says of devices, loaders and folders; none of it applies here."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: record.getMessage().startswith("probes:")
    )
    warnings.filterwarnings("ignore", module="lightning.*")
