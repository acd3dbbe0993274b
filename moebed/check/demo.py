"""Step ``fit``: the demo's recipe by the command line, with probes, samples and report, as a person would."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from moebed.check.contract import Found, NotRun, Place, Row, Verdict
from moebed.check.training import RECIPE

DEMO = RECIPE.with_name("demo.yaml")
TRITON_STEPS = 100


def rows(place: Place) -> Sequence[Row]:
    """Of the step."""
    short = ["--trainer.max_steps", str(TRITON_STEPS), "--model.config.experts_backend", "triton"]
    return [  # the short one first: where time is little, it shows all but the length
        Row(f"recipes/demo.yaml, triton, {TRITON_STEPS} steps", functools.partial(fit, place, short)),
        Row("recipes/demo.yaml", functools.partial(fit, place, [])),
    ]


def fit(place: Place, options: Sequence[str]) -> Found:
    """Train; what ``run_summary.json`` says in the end."""
    from moebed.cli import main

    if not DEMO.is_file():
        raise NotRun("the recipes are not beside the package")
    folder = place.folder / ("triton" if options else "demo")
    gpu = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    arguments = ["fit", "--config", str(DEMO), *gpu, "--trainer.default_root_dir", str(folder), *options]
    code = main(arguments)
    path = folder / "run_summary.json"
    if code != 0 or not path.is_file():
        return Found(f"exit code {code}; its error is in the step's log", verdict=Verdict.WRONG)
    summary = json.loads(path.read_text(encoding="utf-8"))
    shown = ("step", "val/bits_per_byte", "gzip -9 bits per byte", "train/tokens_per_second")
    said = ", ".join(f"{name} {summary[name]:,.4g}" for name in shown if isinstance(summary.get(name), int | float))
    has_report = (folder / "report.html").is_file()
    verdict = Verdict.WORKS if has_report else Verdict.WRONG
    return Found(said + ("" if has_report else "; no report.html"), summary, verdict)
