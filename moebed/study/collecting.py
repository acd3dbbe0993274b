"""From run folders to ``study.json``: plain data from which tables and figures are made, and made again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moebed.errors import DivergedError
from moebed.model.flops import scaling_sizes
from moebed.study.code import Code
from moebed.study.files import FORMAT, STUDY_FILE, read_json, write_json
from moebed.study.progress import status_path, steps_done
from moebed.study.runner import is_finished
from moebed.study.runs import Arm, Run, StudyPlan
from probes.running.run_folder import Curve, read_curves
from probes.running.store import load_history

DOMAIN = "val/bits_per_byte/"  # then the domain's name, in a run's summary
RISE = 0.5  # nats a token; before anything is learned one text's loss is within hundredths of another's


def collect(plan: StudyPlan, out: Path) -> Path:
    """Write ``study.json`` from whatever the runs have left by now.

    Returns:
        The file.

    Raises:
        UserError: A file in a run's folder is damaged.
    """
    recipe = plan.recipe
    content = {
        "format": FORMAT,
        "name": recipe.name,
        "question": recipe.question,
        "baseline": recipe.baseline,
        "seeds": list(recipe.seeds),
        "settings": dict(recipe.settings),
        "match": list(recipe.match),
        "tolerance": recipe.tolerance,
        "gain": dict(recipe.gain),
        "arms": {
            name: {
                "steps_before": [[step.kind, dict(step.settings)] for step in recipe.arms[name][:-1]],
                "settings": dict(arm.settings),
                "steps": arm.steps,
                "tokens": arm.tokens,
                "total_parameters": arm.total_parameters,
                "active_parameters": arm.active_parameters,
                "active_flops_per_token": arm.active_flops,
                "sizes": scaling_sizes(arm.config),
                "runs": {
                    str(seed): _read_run(
                        plan.runs[plan.final[name, seed]], plan.runs.get(plan.tasks.get((name, seed), "")), arm, out
                    )
                    | {"code": _code(plan, plan.final[name, seed], out)}
                    for seed in recipe.seeds
                },
            }
            for name, arm in plan.arms.items()
        },
    }
    return write_json(out / STUDY_FILE, content)


def _read_run(run: Run, tasks: Run | None, arm: Arm, out: Path) -> dict[str, Any]:
    folder = out / run.name
    curves = read_curves(folder) if folder.is_dir() else {}
    found: dict[str, Any] = {"folder": run.name, "config_hash": run.hash}
    numbers = read_json(folder / run.finished) if is_finished(run, out) else {}
    loss, guessing = numbers.get("val/loss"), math.log(arm.config.vocab_size)
    found["status"], found["why"] = _status(run, loss, guessing, curves, out)
    found |= {
        "loss": _finite(loss),
        "bits_per_byte": _finite(numbers.get("val/bits_per_byte")),
        "over_floor": _finite(numbers.get("val/nats_over_floor")),
        "domains": {name.removeprefix(DOMAIN): _finite(value) for name, value in numbers.items() if DOMAIN in name},
        "guessing_loss": guessing,
        "curve": _validation_curve(curves),
        "tokens_per_second": _median(curves.get("train/tokens_per_second")),
        "seconds": (read_json(status_path(out, run.name, "json")) or {}).get("seconds"),
        "headlines": (_headlines(load_history(folder)) if folder.is_dir() else {}) | _tasks(tasks, arm.steps, out),
    }
    return found


def _code(plan: StudyPlan, name: str | None, out: Path) -> list[Code]:
    """What computed a run, and those that it goes on from."""
    found: list[Code] = []
    while name is not None:
        kept = (read_json(status_path(out, name, "json")) or {}).get("code", [])
        found = [*[one for one in kept if one not in found], *found]
        name = plan.runs[name].needs
    return found


def _status(run: Run, loss: float | None, guessing: float, curves: Mapping[str, Curve], out: Path) -> tuple[str, str]:
    """``finished``, ``diverged``, ``failed`` or ``not run``; and the reason, where it is not finished."""
    if is_finished(run, out):
        if loss is None or not math.isfinite(loss):
            return "diverged", f"its loss on held-out text is {loss}"
        had = _had(curves, guessing)
        # A model that was trained before begins anywhere: only of random weights is it known what they predict.
        if run.from_random and loss >= guessing and loss > had + RISE:
            return "diverged", (
                f"its loss on held-out text rose from {had:.3f} to {loss:.3f}, above the {guessing:.3f} of guessing"
            )
        return "finished", ""
    record = read_json(status_path(out, run.name, "json")) or {}
    code = record.get("exit_code")
    if code == DivergedError.exit_code:
        return "diverged", record["said"]
    if code is not None:
        return "failed", f"exit code {code}: {record['said']}"
    done = steps_done(out, run.name)
    return "not run", f"stopped at step {done} of {run.steps}" if done else ""


def _had(curves: Mapping[str, Curve], guessing: float) -> float:
    """The loss that a run from random weights had before its end: the least on held-out text, or where it began.

    Random weights are worse than guessing by what their logits vary, which the first logged loss tells.
    """
    began = [value for value in curves.get("train/loss", ([], []))[1][:1] if math.isfinite(value)]
    before = [value for value in curves.get("val/loss", ([], []))[1] if math.isfinite(value)]
    return min(max([guessing, *began]), *before, math.inf)


def _validation_curve(curves: Mapping[str, Curve]) -> dict[str, list[Any]]:
    steps, losses = curves.get("val/loss", ([], []))
    bits = dict(zip(*curves.get("val/bits_per_byte", ([], [])), strict=True))
    # Logged steps count from 0, finished ones, as the probes have them, from 1.
    return {
        "step": [step + 1 for step in steps],
        "loss": [_finite(value) for value in losses],
        "bits_per_byte": [_finite(bits.get(step)) for step in steps],
    }


def _headlines(history: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """``<probe>/<headline>`` -> its value at each probing."""
    found: dict[str, dict[str, list[Any]]] = {}
    for line in history:
        for name, value in line.get("headlines", {}).items():
            if value is not None:
                series = found.setdefault(name, {"step": [], "value": []})
                series["step"].append(line["step"])
                series["value"].append(value)
    return found


def _tasks(run: Run | None, step: int, out: Path) -> dict[str, dict[str, list[Any]]]:
    """``tasks/<task>/<metric>`` -> its value after the last step, without standard errors and counts."""
    if run is None or not is_finished(run, out):
        return {}
    numbers = read_json(out / run.name / run.finished)
    return {
        name: {"step": [step], "value": [value]}
        for name, value in numbers.items()
        if not name.endswith(("_stderr", "/items"))
    }


def _median(curve: Curve | None) -> float | None:
    return _finite(float(np.median(curve[1]))) if curve and curve[1] else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
