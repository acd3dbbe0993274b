"""``moebed probe`` of what is in memory as a whole: a model through transformers, and a trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moebed.checkpoints.hub import find_checkpoint
from moebed.checkpoints.run import is_run
from moebed.checkpoints.text_options import TextOptions
from moebed.checkpoints.texts import read_texts
from moebed.errors import UserError
from moebed.machine.progress import say
from moebed.traces.files import read_trace, write_trace
from moebed.views.transformers_model import TransformersModel
from probes.running.choosing import probes_that_fit
from probes.running.traced import trace_of_results
from probes.running.whole_pass import probe_whole

Settings = dict[str, dict[str, Any]]


def probe_trace(options: Mapping[str, Any], chosen: list[str], settings: Settings) -> dict[int, str]:
    """Probe a trace: layers that are missing, and why.

    Raises:
        UserError: It cannot be read, or a probe needs more than it says.
    """
    trace = read_trace(Path(options["checkpoint"]), options["num_experts"])
    if options["save_trace"]:
        chosen = [name for name in chosen if name != "routing"]  # it is at hand
        write_trace(trace, Path(options["save_trace"]), options["trace_format"])
        say(f"trace: {options['save_trace']}")
    names, left_out = probes_that_fit(chosen, trace.offers, "a trace")
    missing = probe_whole(trace, trace.text, names, Path(options["out"]), settings, left_out)
    for note in (*trace.notes, *left_out):
        say(f"note: {note}")
    return missing


def probe_through_transformers(
    options: Mapping[str, Any], text: TextOptions, chosen: list[str], settings: Settings
) -> dict[int, str]:
    """Read a checkpoint into memory as transformers does, and probe it: layers that are missing, and why.

    Raises:
        UserError: It cannot be read or looked at, or a probe needs what it does not show.
    """
    path = find_checkpoint(options["checkpoint"])
    if is_run(path) or not path.is_dir():
        raise UserError(f"{path} is no folder that transformers reads; --through transformers is for such")
    model = TransformersModel(_load(path, options["dtype"]).to(options["device"]), path.resolve().name)
    given, notes = read_texts(text, path, model) if text else (None, [])
    names, left_out = probes_that_fit(chosen, model.offers, model.name, given is not None)
    model.notes += notes
    missing = probe_whole(model, given, names, Path(options["out"]), settings, left_out)
    for note in (*model.notes, *left_out):
        say(f"note: {note}")
    return missing


def save_trace(out: Path, path: Path, kind: str) -> None:
    """Write a trace of what ``routing`` has stored in a folder of results."""
    write_trace(trace_of_results(out), path, kind)
    say(f"trace: {path}")


def _load(path: Path, dtype: str | None) -> Any:
    """A model of transformers from a folder; code of its own is never run."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        read: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=getattr(torch, dtype or "float32"),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a missing or damaged file makes of it, it is one line for a person
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read by transformers ({type(error).__name__}: {cause})") from error
    model, found = read
    for missing in (*found["missing_keys"], *found["mismatched_keys"]):
        raise UserError(f"{path}: transformers finds no {missing} and would make it up; is the folder whole?")
    return model
