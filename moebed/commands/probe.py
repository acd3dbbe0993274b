"""``moebed probe CHECKPOINT --out DIR``: the probes over a checkpoint, a layer at a time.

No more than ``Trainer.predict`` on a PretrainedMoE with ProbeCallback, TensorBoard and a progress bar.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebed.checkpoints.text_options import TextOptions
from moebed.commands.probe_options import (
    DEFAULTS,
    asked,
    build_parser,
    layers_of,
    look_first,
    read_options,
    several,
    text_of,
)
from moebed.errors import ConfigError, UserError
from moebed.machine.progress import say, waiting
from moebed.traces.paths import is_trace

__all__ = ["build_parser", "run"]

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
    look_first(options)
    folders: dict[str, Path] = {}
    for checkpoint in several(options["earlier"]):
        name = Path(checkpoint).stem if checkpoint.endswith(".ckpt") else Path(checkpoint).name
        if name in folders:
            raise ConfigError(f"--earlier: two checkpoints are called {name}; give folders of other names")
        folders[name] = Path(options["out"]) / "earlier" / name
    if folders and not any(options[kind] for kind in ("text", "input_ids", "domain")):
        raise ConfigError("--earlier needs text; give --text, --input-ids or --domain")
    done: list[str] = []
    for checkpoint, folder in zip(several(options["earlier"]), folders.values(), strict=True):
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
    with waiting("loading PyTorch and Lightning"):
        import torch

        from moebed.commands.probe_whole import probe_through_transformers, probe_trace, save_trace
        from probes.registry import make_probes
        from probes.running.choosing import probes_for

    out, text = Path(options["out"]), text_of(options)
    chosen, settings = asked(options, bool(text))
    if earlier is not None:
        chosen.append("saturation")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
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
            _refuse(options, tuple(name for name in DEFAULTS if name not in alone), "--through transformers")
            missing = probe_through_transformers(options, text, chosen, settings)
        else:
            missing = _probe_streamed(options, text, chosen, settings, earlier)
        if options["save_trace"]:
            save_trace(out, Path(options["save_trace"]), options["trace_format"])
    _finish(out, missing)


def _refuse(options: dict[str, Any], known: Sequence[str], what: str) -> None:
    """Raise ConfigError for an option that does nothing here."""
    for name, default in DEFAULTS.items():
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
    from moebed.training.trainer import looking_trainer
    from probes.running.callback import ProbeCallback

    out = Path(options["out"])
    model = PretrainedMoE(
        options["checkpoint"],
        reference_dense=options["reference_dense"],
        layers=layers_of(options),
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


def _quiet() -> None:
    """Leave out what Lightning says of devices, loaders and folders; none of it applies here."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: record.getMessage().startswith("probes:")
    )
    warnings.filterwarnings("ignore", module="lightning.*")
