"""The options of ``moebed probe``: from the command line and a file, and what can be refused of them at once.

Needs no PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebed.arguments import OneLineParser, add_text_options, parse_setting, read_yaml, whole
from moebed.checkpoints.hub import require_nameable
from moebed.checkpoints.text_options import TextOptions
from moebed.errors import ConfigError, did_you_mean
from moebed.machine.places import require_file_writable, require_writable
from moebed.machine.units import parse_bytes
from moebed.names import PROBES, SETTINGS, STATIC_PROBES
from moebed.traces.paths import is_trace
from moebed.views.intervention_words import read, split

_CHOICES = {
    "dtype": ("float32", "bfloat16", "auto"),
    "device": ("cpu", "cuda"),
    "through": ("transformers",),
    "trace_format": ("vllm", "megatron"),
}


def build_parser() -> OneLineParser:
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
    parser.add_argument(
        "--num-experts", type=whole(1), metavar="N", help="experts of a layer, where a trace does not say"
    )
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


DEFAULTS: dict[str, Any] = {
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


def read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """All options: those given, then those of the YAML file, then the defaults.

    Raises:
        ConfigError: A key of the file is unknown or has no such value, or checkpoint or out is given nowhere.
    """
    given = vars(build_parser().parse_args(arguments))
    file = given.pop("config", None)
    content = {} if file is None else _read_yaml(Path(file), ["checkpoint", "out", *DEFAULTS])
    options = {**DEFAULTS, **content, **given}
    for name in ("checkpoint", "out"):
        if not options.get(name):
            wanted = (
                "CHECKPOINT, a folder or a hub id" if name == "checkpoint" else "--out DIR, a folder for the results"
            )
            raise ConfigError(f"moebed probe needs {wanted}")
    return options


def _read_yaml(path: Path, known: Sequence[str]) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no options by name")
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known, f"the known ones are {', '.join(known)}")
            raise ConfigError(f"{path}: unknown key {key!r}; {hint}")
    _require_kinds(path, content)
    return content


def _require_kinds(path: Path, content: dict[str, Any]) -> None:
    """Refuse a value of a file that its option would refuse."""
    for action in build_parser().options():
        value = content.get(action.dest)
        if value is None:
            continue
        if action.choices is not None and value not in action.choices:
            raise ConfigError(f"{path}: {action.dest} is {value!r}; choose one of {', '.join(action.choices)}")
        if callable(action.type):
            try:
                action.type(str(value))
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{path}: {action.dest} {error}") from None


def _listed(value: Any) -> list[str]:
    """Names from "a,b" or from a list of a YAML file."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def several(value: Any) -> list[str]:
    """One or several from a YAML file or the command line."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _domains(value: Any) -> list[str]:
    """NAME=FILE, several; in a YAML file a mapping does as well."""
    return [f"{name}={file}" for name, file in value.items()] if isinstance(value, dict) else several(value)


def _probe_options(value: Any) -> dict[str, dict[str, Any]]:
    """PROBE.NAME=VALUE, several; in a YAML file a mapping of mappings does as well."""
    if isinstance(value, dict):
        return value
    found: dict[str, dict[str, Any]] = {}
    for one in several(value):
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


def look_first(options: dict[str, Any]) -> None:
    """Refuse what takes no model to see, before PyTorch is loaded, which takes seconds.

    Raises:
        UserError: An option has no such value, a file is not there, or a folder cannot be written into.
    """
    dense = options["reference_dense"]
    require_nameable(*several(options["earlier"]), options["checkpoint"], *([dense] if dense else []))
    has_text = bool(text_of(options))
    require_probes(*asked(options, has_text), has_text or is_trace(Path(options["checkpoint"])))
    for text in several(options["intervene"]):
        for one in split(text):
            read(one)
    layers_of(options)
    parse_bytes(options["memory_budget"])
    require_writable(Path(options["out"]), "--out")
    if options["save_trace"]:
        require_file_writable(Path(options["save_trace"]), "--save-trace")


def require_probes(chosen: Sequence[str], settings: Mapping[str, Mapping[str, Any]], has_text: bool = True) -> None:
    """Refuse names of probes, and of their settings, that nothing is called, and probes that need text without any.

    Those that a plug-in has registered are known as well.

    Raises:
        ConfigError: Says which it could be.
    """
    for name in chosen:
        PROBES.require(name, "probes", also=("all",))
        if not has_text and name in PROBES.own and name not in STATIC_PROBES:
            raise ConfigError(
                f"probes: {name} needs text; give --text, --input-ids or --domain, or choose from "
                f"{', '.join(STATIC_PROBES)}"
            )
    for name, given in settings.items():
        PROBES.require(name, "probe-option")
        for key in given if isinstance(given, Mapping) and name in PROBES.own else ():
            known = SETTINGS.get(name, ())
            if key not in known:
                hint = did_you_mean(key, known, f"it has {', '.join(known) or 'none'}")
                raise ConfigError(f"probes: {name} has no option {key!r}; {hint}")


def text_of(options: dict[str, Any]) -> TextOptions:
    """The text that is asked for."""
    given = {name: several(options[name]) for name in ("text", "input_ids")}
    return TextOptions.of({**options, **given, "domain": _domains(options["domain"])})


def layers_of(options: dict[str, Any]) -> list[int] | None:
    """The layers that are asked for; None for all."""
    layers = _listed(options["layers"])
    return None if "all" in layers else [_layer(one) for one in layers]


def asked(options: dict[str, Any], has_text: bool) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The probes that are named, those that options name, and settings of them."""
    chosen, settings = _listed(options["probes"]), _probe_options(options["probe_option"])
    if not chosen:
        raise ConfigError(f"probes is {options['probes']!r}, which names none; name some, or leave it out for all")
    for option, probe in (("save_logits", "logits"), ("intervene", "interventions"), ("save_trace", "routing")):
        if not options[option]:
            continue
        if not has_text and option != "save_trace":
            raise ConfigError(f"--{option.replace('_', '-')} needs text; give --text, --input-ids or --domain")
        chosen.append(probe)
    if options["intervene"]:
        settings = settings | {"interventions": {"apply": "; ".join(several(options["intervene"]))}}
    return chosen, settings
