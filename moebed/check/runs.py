"""Small runs by Lightning's Trainer, without the command line, which needs more packages: checkpoints, memory, waits.

The text is made up by ``moebed.data.corpus``, so that nothing is read or downloaded.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from moebed.check.contract import Found, Place, Row, Verdict
from moebed.check.launches import waits as noting_waits
from moebed.check.same_steps import CONTINUED, largest_difference
from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import load_decoder
from moebed.data.datamodule import TextDataModule
from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import TokenizerConfig
from moebed.machine.units import human
from moebed.model.config import ModelConfig
from moebed.parallel.config import ParallelConfig
from moebed.parallel.strategy import MeshStrategy
from moebed.plan.plan import make_plan
from moebed.plan.setup import PRECISIONS, Setup
from moebed.training.callbacks import AtomicCheckpointIO
from moebed.training.module import MoEModule
from moebed.training.optim import OptimizerConfig
from moebed.training.saving import RunCheckpoint
from moebed.training.trainer import AutoTrainer

# Balanced over all ranks, so that every layout has one loss.
SMALL = ModelConfig(
    vocab_size=260, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=64, max_position_embeddings=128, router_aux_loss_scope="global",
)  # fmt: skip
# 88 M parameters: large beside what libraries take.
LARGE = ModelConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=1536,
)  # fmt: skip
SEED = 7


@dataclass(frozen=True)
class Run:
    """A run of a few steps.

    Args:
        folder: Its folder.
        device: ``cuda`` or ``cpu``.
        steps: Optimizer steps.
        config: The model.
        precision: As Lightning has it.
        continued: Whether it goes on from its last checkpoint.
        parallel: Layout over ranks.
        devices: Ranks.
        batch_size: Sequences of a rank's batch.
        sequence_length: Tokens of a sequence.
        checkpointing: Activation checkpointing.
        callbacks: More of them.
    """

    folder: Path
    device: str
    steps: int
    config: ModelConfig = field(default_factory=lambda: SMALL)
    precision: Any = "32-true"
    continued: bool = False
    parallel: ParallelConfig | None = None
    devices: int = 1
    batch_size: int = 8
    sequence_length: int = 64
    checkpointing: bool = False
    callbacks: Sequence[Callback] = field(default_factory=tuple)

    @property
    def last(self) -> Path:
        """The checkpoint that it leaves."""
        return self.folder / "checkpoints" / "last.ckpt"


class Noted(Callback):
    """Notes loss and gradient norm of every step."""

    names = ("train/loss", "train/grad_norm")

    def __init__(self) -> None:
        self.by_step: dict[int, Sequence[float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The step has ended; all ranks ask together."""
        assert isinstance(pl_module, MoEModule)
        metrics = pl_module.step_metrics()
        self.by_step[trainer.global_step] = [metrics[name] for name in self.names]


def fit(run: Run) -> MoEModule:
    """Train; returns the module."""
    seed_everything(SEED, verbose=False)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, schedule="constant")
    with torch.device("meta" if run.parallel is not None else "cpu"):
        module = MoEModule(run.config, optimizer, activation_checkpointing=run.checkpointing)
    data = TextDataModule(
        sources=[SourceConfig("math", max_bytes=200_000)],
        tokenizer=TokenizerConfig(kind="bytes"),
        sequence_length=run.sequence_length,
        batch_size=run.batch_size,
        cache_dir=str(run.folder / "cache"),
    )
    saving = RunCheckpoint(every_n_train_steps=1000, save_last=True, save_top_k=0, enable_version_counter=False)
    strategy: Any = "auto" if run.parallel is None else MeshStrategy(run.parallel)
    trainer = AutoTrainer(
        accelerator="gpu" if run.device == "cuda" else "cpu",
        devices=run.devices,
        strategy=strategy,
        precision=run.precision,
        default_root_dir=str(run.folder),
        max_steps=run.steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[saving, *run.callbacks],
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(run.last) if run.continued else None)
    return module


def steps(run: Run) -> tuple[dict[int, Sequence[float]], MoEModule]:
    """Train; returns what was noted of each step, and the module."""
    noted = Noted()
    module = fit(replace(run, callbacks=[*run.callbacks, noted]))
    return noted.by_step, module


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoints(place: Place) -> Sequence[Row]:
    """Rows of the step."""
    precisions = ("32-true", "bf16-mixed")
    return [
        *(Row(f"continued, {name}", functools.partial(continued, place, name)) for name in precisions),
        Row("read as it was written", functools.partial(read_again, place)),
    ]


def continued(place: Place, precision: str, half: int = 3) -> Found:
    """Three steps, and three more from the checkpoint, beside six."""
    folder = place.folder / precision
    whole, module = steps(Run(folder / "whole", place.device, 2 * half, precision=precision))
    first, _ = steps(Run(folder / "parts", place.device, half, precision=precision))
    second, again = steps(Run(folder / "parts", place.device, 2 * half, precision=precision, continued=True))
    off, allowed = largest_difference(first | second, whole), CONTINUED[place.device]
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    said = f"{2 * half} steps, stopped after {half}: losses and gradient norms differ by {off:.1e}, parameters have "
    said += f"{'the same' if same else 'other'} bits"
    is_right = off <= allowed and sorted(second) == list(range(half + 1, 2 * half + 1))
    figures = {"difference": off, "allowed": allowed, "same_bits": same}
    return Found(said, figures, Verdict.WORKS if is_right else Verdict.WRONG)


def read_again(place: Place) -> Found:
    """A checkpoint written on a device and read in main memory."""
    run = Run(place.folder / "read", place.device, 2)
    module = fit(run)
    read = dict(load_decoder(Checkpoint.open(run.last)).named_parameters())
    off = [name for name, p in module.decoder.named_parameters() if not torch.equal(p.detach().cpu(), read[name])]
    if off:
        return Found(f"{len(off)} parameters have other bits, {off[0]} first", {"names": off}, Verdict.WRONG)
    return Found(f"{len(read)} parameters of {place.device} have the bits that were saved")


# Memory ---------------------------------------------------------------------------------------------------------------

CLOSE = 0.15  # of the plan


def memory(place: Place) -> Sequence[Row]:
    """Rows of the step."""
    cases = [("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)]
    return [
        Row(f"{name}{', activation checkpointing' * again}", functools.partial(peak, place, name, again))
        for name, again in cases
    ]


def peak(place: Place, precision: str, checkpointing: bool) -> Found:
    """What CUDA's allocator handed out at most, beside the plan; libraries' own work space is there before."""
    run = Run(
        place.folder / f"{precision} {checkpointing}", place.device, 3, LARGE, precision, batch_size=8,
        sequence_length=512, checkpointing=checkpointing,
    )  # fmt: skip
    fit(replace(run, folder=run.folder / "warm", config=SMALL, sequence_length=64, steps=1))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fit(run)
    measured = torch.cuda.max_memory_allocated() - before
    setup = Setup(
        run.config,
        run.batch_size,
        run.sequence_length,
        PRECISIONS[precision],
        checkpointing=checkpointing,
        device="gpu",
    )
    planned = make_plan(setup).peak_memory_total
    figures = {"planned": planned, "measured": measured, "held_before": before}
    figures["reserved"] = torch.cuda.max_memory_reserved()
    verdict = Verdict.WORKS if abs(measured - planned) <= CLOSE * planned else Verdict.WRONG
    return Found(f"{human(measured, 'B')}, planned {human(planned, 'B')} ({measured / planned:.2f})", figures, verdict)


# Waits ----------------------------------------------------------------------------------------------------------------

WARM, WATCHED = 4, 4


class Watch(Callback):
    """Notes where the host waits for the device in some steps after the first."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._noting: Any = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin after the steps that warm up."""
        if trainer.global_step == WARM and self._noting is None:
            self._noting = noting_waits(self.found)
            self._noting.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End."""
        if trainer.global_step == WARM + WATCHED and self._noting is not None:
            self._noting.__exit__(None, None, None)
            self._noting = None


def waits(place: Place) -> Sequence[Row]:
    """Rows of the step."""
    return [
        Row(f"{backend}, {precision}", functools.partial(count_waits, place, backend, precision))
        for backend in ("grouped_mm", "triton")
        for precision in ("bf16-mixed", "32-true")
    ]


def count_waits(place: Place, backend: Any, precision: str) -> Found:
    """Of Lightning's whole step: data, forward, backward, clipping, optimizer; nothing is logged."""
    watch, config = Watch(), replace(SMALL, experts_backend=backend)
    total = WARM + WATCHED + 1
    fit(Run(place.folder / f"{backend} {precision}", place.device, total, config, precision, callbacks=[watch]))
    places: dict[str, float] = {}
    for where in watch.found:
        places[where] = places.get(where, 0.0) + 1 / WATCHED
    often = ", ".join(f"{where} ({count:g})" for where, count in sorted(places.items(), key=lambda item: -item[1])[:5])
    count = len(watch.found) / WATCHED
    said = f"{count:g} waits a step{often and ': ' + often}"
    return Found(said, {"waits": count, "places": places}, Verdict.SLOW if count > 1 else Verdict.WORKS)
