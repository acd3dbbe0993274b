"""Pictures of TensorBoard and of the report, of a small model and of one of many layers and experts, to be looked at.

    python -m tests.probes.report.screenshots FOLDER [4x8 32x64 8x256 ...]

Runs that are there are not trained again. Only the command line is used, so that what was before a change can be
pictured beside what is after it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from moebed.cli import main
from tests.browser import Browser

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "demo.yaml"
SIZES = ("4x8", "32x64")
DASHBOARDS = ("timeseries", "scalars", "custom_scalars", "images", "text")
SETTLED = "new Promise(done => setTimeout(() => done(true), 10000))"


def train(folder: Path, size: str, steps: int = 40, *more: str) -> Path:
    """A run of so many layers and experts on the built-in text, ``LxE``; probed at five steps."""
    run = folder / f"run_{size}"
    if (run / "report.html").exists():
        return run
    layers, experts = size.split("x")
    settings = {
        "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // 4,
        "trainer.precision": "32-true",
        "checkpoint.every_n_train_steps": steps,
        "model.config.vocab_size": 320,
        "model.config.hidden_size": 32,
        "model.config.num_hidden_layers": layers,
        "model.config.num_attention_heads": 2,
        "model.config.num_experts": experts,
        "model.config.moe_intermediate_size": 16,
        "model.optimizer.warmup_steps": 4,
        "data.tokenizer.kind": "bytes",
        "data.sequence_length": 64,
        "data.batch_size": 4,
        "data.max_validation_windows": 24,
    }
    probing = f'[{{"class_path": "probes.ProbeCallback", "init_args": {{"every_n_steps": {steps // 4}}}}}]'
    settings["trainer.callbacks"] = probing
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    if code := main(["fit", "--config", str(RECIPE), *arguments, *more]):
        raise SystemExit(code)
    return run


def picture_tensorboard(logdir: Path, out: Path) -> None:
    """Keep a picture of each dashboard."""
    from tensorboard import program

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"])
    address = board.launch()
    with Browser(1500, 1100) as browser:
        for name in DASHBOARDS:
            browser.open("about:blank")
            browser.open(f"{address}#{name}")
            browser.wait(SETTLED)
            print(browser.screenshot(out / f"tensorboard_{name}.png"))


def picture_report(report: Path, out: Path) -> None:
    """Keep the first screen, the whole page, and the page on a phone."""
    with Browser(1400, 1000) as browser:
        browser.open(report.resolve().as_uri())
        print(browser.screenshot(out / "report_first.png"))
        print(browser.screenshot(out / "report_whole.png", whole=True))
        browser.resize(390, 844, mobile=True)
        print(browser.screenshot(out / "report_phone.png"))
    print(f"{report}: {report.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    folder, *sizes = sys.argv[1:]
    for size in sizes or SIZES:
        run = train(Path(folder), size)
        picture_tensorboard(run / "tensorboard", Path(folder) / f"pictures_{size}")
        picture_report(run / "report.html", Path(folder) / f"pictures_{size}")
