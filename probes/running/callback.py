"""ProbeCallback: drives the probes from a Lightning Trainer, in training and over a pretrained checkpoint.

Probing never changes training: it draws no random number that training would have drawn, leaves parameters, gradients
and modes alone, and runs the plain decoder where training runs a compiled one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.errors import ConfigError, UserError
from moebed.machine import provenance
from moebed.model.config import ModelConfig
from moebed.parallel.strategy import MeshStrategy
from moebed.training.alerts import Alerts
from moebed.views.layer import Need, ProbeText
from probes.contract import ProbeResult
from probes.registry import PROBES, TRAINING_ONLY, make_probes, resolve_probes
from probes.running import store, tags
from probes.running.checkpoint_pass import CheckpointPass
from probes.running.choosing import probes_for
from probes.running.driver import Timing, needs_of, run_probes
from probes.running.offered import probe_text, views_of
from probes.running.provenance import Provenance
from probes.running.writing import draw_pictures, log_results, save_results

MOST_OF_TIME, LONG_ENOUGH = (
    0.25,
    60.0,
)  # share of the time since the start, and the seconds from which it says something


class ProbeCallback(Callback):
    """Probe the model while it trains, or a :class:`moebed.checkpoints.pretrained.PretrainedMoE` in
    ``Trainer.predict``.

    The module offers ``views(text, needs)``, and ``notes`` where a person should know something of it; the datamodule
    ``probe_batch(num_sequences)`` and ``domains``. Numbers, sentences and pictures go to every logger that takes them,
    under the names of ``probes.running.tags``. Arrays, history and summary go to ``out``. The model is probed on rank
    0; of one that ranks share, the others hand it a layer at a time.

    A checkpoint's layers are probed as ``Trainer.predict`` comes to them, by all probes that need weights alone if none
    are named. What is finished is kept, and a second run continues there. ``missing`` has the layers that cannot be
    read.

    Args:
        probes: Names of the probes to run; the default ones if not given; ``all`` for every one there is.
        every_n_steps: Probe whenever this many optimizer steps are done; 0 for never.
        at_start: Probe before the first step of a new run.
        at_end: Probe when training ends.
        num_sequences: Sequences of text to probe on, from the datamodule's held-out text.
        figures_every_n_steps: Draw pictures where the step probed is a multiple of this, the start included; at the end
            they are drawn in any case. If not given, at the end only: pictures cost more than the numbers in them.
        out: Folder for the results; the trainer's default_root_dir if not given.
        fresh: Of a checkpoint, compute anew what is kept of an earlier probing.
        options: Settings of probes, by the probe's name: {traffic: {ranks: 8}}.
        earlier: Of a checkpoint, folders where earlier ones of the same model were probed on the same text by
            ``saturation``, in order, so that it can run; empty for the first of them.

    Raises:
        ConfigError: A probe's name or setting is unknown, or a number is out of range.
    """

    def __init__(
        self,
        probes: list[str] | None = None,
        every_n_steps: int = 100,
        at_start: bool = True,
        at_end: bool = True,
        num_sequences: int = 12,
        figures_every_n_steps: int | None = None,
        out: str | None = None,
        fresh: bool = False,
        options: dict[str, dict[str, Any]] | None = None,
        earlier: list[str] | None = None,
    ) -> None:
        self.earlier = None if earlier is None else [Path(folder) for folder in earlier]
        self.probes, self._asked = resolve_probes(probes), probes
        self.options = options or {}
        make_probes(self.probes, self.options if probes is not None else None)  # refused before anything runs
        if every_n_steps < 0:
            raise ConfigError(f"probes: every_n_steps is {every_n_steps}; it must not be negative (0 is never)")
        if num_sequences < 1:
            raise ConfigError(f"probes: num_sequences is {num_sequences}; it must be at least 1")
        if figures_every_n_steps is not None and figures_every_n_steps < 1:
            raise ConfigError(f"probes: figures_every_n_steps is {figures_every_n_steps}; it must be at least 1")
        self.every_n_steps, self.at_start, self.at_end = every_n_steps, at_start, at_end
        self.num_sequences, self.figures_every_n_steps = num_sequences, figures_every_n_steps
        self.out, self.fresh = Path(out) if out is not None else None, fresh
        self.last_step: int | None = None
        self.missing: dict[int, str] = {}
        self._checkpoint: CheckpointPass | None = None
        self._text: ProbeText | None = None
        self._started = self._seconds = 0.0
        self._probe_seconds: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The step last probed, so that a resumed run probes nothing twice."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self.last_step = state_dict["last_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would end in a hang: a sharded model whose other ranks have no part in a walk over it."""
        sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)) and trainer.world_size > 1
        if sharded and not (hasattr(pl_module, "assist_views") and isinstance(trainer.strategy, MeshStrategy)):
            raise UserError("the probes cannot look into a module that is sharded by itself; use moebed's `parallel`")
        if stage == "predict" and isinstance(pl_module, PretrainedMoE):
            if trainer.world_size > 1:
                raise UserError("a checkpoint is probed by one process; use trainer.devices 1")
            if self.out is None:
                self.out = Path(trainer.default_root_dir)
            self.probes = probes_for(self._asked, pl_module.text is not None, self.earlier is not None)
            device = trainer.strategy.root_device.type
            self._checkpoint = CheckpointPass(
                pl_module, self.probes, self.out, device, self.fresh, self.options, self.earlier or ()
            )
            self._started = time.perf_counter()
            if self._checkpoint.room:
                rank_zero_info(f"probes: {self._checkpoint.room}")
            if self._checkpoint.continued:
                rank_zero_info(f"probes: {self._checkpoint.continued} layers are finished already")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Probe a layer of a checkpoint."""
        if self._checkpoint is not None and outputs is not None:
            self._checkpoint.show(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was found in a checkpoint."""
        if self._checkpoint is None:
            return
        assert self.out is not None
        results, timing, self.missing = self._checkpoint.results(), self._checkpoint.timing, self._checkpoint.missing
        self._save(pl_module, results, self._checkpoint.provenance, 0, self._checkpoint.identity)
        self._checkpoint.finish()
        self._draw(trainer, results, step=0)
        self._seconds = timing.total
        self._log(trainer, results, timing, step=0)
        self._checkpoint = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget history that a resumed run will write anew; probe the untrained model."""
        self._started, self._seconds, self._probe_seconds = time.perf_counter(), 0.0, {}
        if self.out is None:
            self.out = Path(trainer.default_root_dir)
        resumed = trainer.global_step > 0 or self.last_step is not None
        if trainer.is_global_zero:
            store.truncate_history(self.out, trainer.global_step if resumed else -1)
            for name in TRAINING_ONLY if not resumed else ():
                (store.results_dir(self.out) / f"{name}.npz").unlink(missing_ok=True)
        if self.at_start and not resumed:
            self._probe(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe once when the optimizer has stepped to a multiple of every_n_steps.

        With gradient accumulation several batches end at one step; ``last_step`` tells the first from the rest.
        """
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self.last_step:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, draw the pictures, and say what probing cost."""
        if self.at_end:
            self._probe(trainer, pl_module, draw=True)
        if self._seconds:
            elapsed = time.perf_counter() - self._started
            rank_zero_info(f"probes: {self._seconds:.1f} s, {self._seconds / elapsed:.1%} of the time since the start")

    def _probe(self, trainer: Trainer, pl_module: LightningModule, draw: bool = False) -> None:
        """Run the probes at the current step, unless that is done; draw the pictures where they are due."""
        step = trainer.global_step
        if self.figures_every_n_steps is not None and step % self.figures_every_n_steps == 0:
            draw = True
        done, self.last_step = self.last_step == step, step
        if not trainer.is_global_zero:
            assist = getattr(pl_module, "assist_views", None)
            if assist is not None and not done:
                assist()
            return
        if done and not draw:
            return
        start = time.perf_counter()
        assert self.out is not None
        if done:
            results = {name: PROBES[name].describe(store.load_arrays(self.out, name)) for name in self.probes}
            self._draw(trainer, results, step)
            self._seconds += time.perf_counter() - start
            return
        timing = Timing()
        with isolate_rng():
            results = self._run(trainer, pl_module, timing)
            store.append_history(self.out, store.history_line(step, results))
            self._save(pl_module, results, self._made_from(pl_module, step), step)
            if draw:
                self._draw(trainer, results, step)
        self._seconds += time.perf_counter() - start
        self._log(trainer, results, timing, step)

    def _save(
        self,
        pl_module: LightningModule,
        results: Mapping[str, ProbeResult],
        made_from: Provenance,
        step: int,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        assert self.out is not None
        notes = [*getattr(pl_module, "notes", ()), *_left_out(getattr(pl_module, "config", None), results)]
        save_results(self.out, results, made_from, step, model, notes)

    def _made_from(self, pl_module: LightningModule, step: int) -> Provenance:
        """A model at a step of its training, and the text."""
        config = getattr(pl_module, "config", None)
        record = {
            "moebed": provenance.moebed_version(),
            "code": provenance.code(),
            "config": config.to_dict() if isinstance(config, ModelConfig) else None,
            "step": step,
            "text": self._text.fingerprint() if self._text is not None else None,
        }
        return Provenance(record | ({"options": self.options} if self.options else {}))

    def _run(self, trainer: Trainer, pl_module: LightningModule, timing: Timing) -> dict[str, ProbeResult]:
        probes = make_probes(self.probes, self.options)
        assert self.out is not None
        for probe in probes:
            if probe.name in TRAINING_ONLY:
                earlier = store.results_dir(self.out) / f"{probe.name}.npz"
                probe.begin(trainer.global_step, store.load_arrays(self.out, probe.name) if earlier.exists() else {})
        if self._text is None:
            self._text = probe_text(trainer, self.num_sequences)
        return run_probes(views_of(pl_module, self._text, needs_of(probes)), probes, timing)

    def _log(self, trainer: Trainer, results: Mapping[str, ProbeResult], timing: Timing, step: int) -> None:
        elapsed = time.perf_counter() - self._started
        cost = {"forward_seconds": timing.forward, "share_of_wall_time": self._seconds / elapsed}
        for name in results:
            self._probe_seconds[name] = self._probe_seconds.get(name, 0.0) + timing.probe[name]
            cost |= {f"{name}_seconds": timing.probe[name], f"{name}_share": self._probe_seconds[name] / elapsed}
        log_results(trainer, results, cost, step)
        if trainer.training and elapsed > LONG_ENOUGH and (share := self._seconds / elapsed) > MOST_OF_TIME:
            dearest = max(self._probe_seconds, key=lambda name: self._probe_seconds[name])
            sentence = (
                f"step {step}: probing has taken {share:.0%} of the time, {dearest} most of it; look at {tags.COST}/, "
                "and raise every_n_steps of the ProbeCallback or name fewer probes"
            )
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Alerts):
                    callback.raise_once("probing", sentence)

    def _draw(self, trainer: Trainer, results: Mapping[str, ProbeResult], step: int) -> None:
        assert self.out is not None
        draw_pictures(trainer, self.out, results, step)


def _left_out(config: object, names: Collection[str]) -> list[str]:
    """What probes of weights do not look at in a model, in words."""
    if not isinstance(config, ModelConfig) or not any(Need.WEIGHTS in PROBES[name].needs for name in names):
        return []
    of = ["experts"] * config.experts_bias + ["gates"] * getattr(config.router_options, "router_bias", False)
    what = " and ".join(of)
    return [f"biases of {what} are left out where weights are compared; in what text does they are in"] if of else []
