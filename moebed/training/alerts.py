"""Alerts: what a person should look at while a run goes on, said once, with what can be done about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from moebed.machine.progress import say
from moebed.training.routing_log import StepRouting

WINDOW = 50  # steps looked at: every one of a process on a CPU, else those that are logged
OUT_OF_BALANCE = 3.0  # times the median layer's max violation
LEAST_VIOLATION = 1.0  # below that a layer is balanced well enough, whatever the others are
COLLAPSED = 0.25  # of a layer's router entropy at the start
RISEN = 0.05  # of the lowest mean loss of a window before
MOST_NAMED = 4  # experts, or layers


class Alerts(Callback):
    """Looks at loss and routing of the last steps, and says what is amiss: each thing once in a run.

    They stand in the run's summary and in its report as well. What was said, and what a run began with, go with its
    checkpoints: a run that is continued neither forgets nor repeats it.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self._kinds: set[str] = set()
        self._loss: deque[float] = deque(maxlen=WINDOW)
        self._routing: deque[StepRouting] = deque(maxlen=WINDOW)
        self._first_entropy: dict[int, float] | None = None
        self._lowest_loss: float | None = None
        self._seen: StepRouting | None = None
        self._step = self._looked_at = 0

    def state_dict(self) -> dict[str, Any]:
        """What was said, and what later steps are compared with; the steps last looked at begin anew."""
        return {
            "said": list(self.said),
            "kinds": sorted(self._kinds),
            "first_entropy": self._first_entropy,
            "lowest_loss": self._lowest_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self.said, self._kinds = list(state_dict["said"]), set(state_dict["kinds"])
        self._first_entropy, self._lowest_loss = state_dict["first_entropy"], state_dict["lowest_loss"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at a step, once it is whole and its numbers are read anyway."""
        if trainer.global_step == self._step or not trainer.is_global_zero:
            return
        self._step = trainer.global_step
        routing: StepRouting | None = getattr(pl_module, "step_routing", None)
        if routing is not None and routing is not self._seen:
            self._routing.append(routing)
        self._seen = routing
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self._loss.append(float(loss))
        self._looked_at += 1
        if self._looked_at % WINDOW == 0:
            for kind, sentence in self.look():
                self.raise_once(kind, f"step {self._step}: {sentence}")

    def raise_once(self, kind: str, sentence: str) -> None:
        """Say it, unless that was said before."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.said.append(sentence)
            say(f"alert: {sentence}")

    def look(self) -> Iterator[tuple[str, str]]:
        """What is amiss in the last ``WINDOW`` steps: its kind, and a sentence with what to do."""
        yield from self._of_loss()
        if len(self._routing) < WINDOW:
            return
        yield from _idle(self._routing)
        yield from _out_of_balance(self._routing)
        entropy = {layer: fmean(one.entropy[layer] for one in self._routing) for layer in self._routing[-1].entropy}
        if self._first_entropy is None:
            self._first_entropy = entropy
        first = self._first_entropy
        if fallen := [layer for layer, value in entropy.items() if value < COLLAPSED * first[layer]]:
            yield (
                "entropy",
                f"the router's entropy in {_named('layer', fallen)} is below {COLLAPSED:.0%} of what it was at the "
                "start: its choices are nearly fixed; look at layers/train/router_entropy, and lower "
                "model.optimizer.learning_rate or raise model.config.router_z_loss_coef",
            )

    def _of_loss(self) -> Iterator[tuple[str, str]]:
        if len(self._loss) < WINDOW:
            return
        mean = fmean(self._loss)
        if self._lowest_loss is not None and mean > (1 + RISEN) * self._lowest_loss:
            yield (
                "loss",
                f"the loss has risen to {mean:.3f} from {self._lowest_loss:.3f}, means over {WINDOW} steps; look at "
                "train/grad_norm, and lower model.optimizer.learning_rate or lengthen its warmup_steps",
            )
        self._lowest_loss = mean if self._lowest_loss is None else min(mean, self._lowest_loss)


def _idle(steps: Sequence[StepRouting]) -> Iterator[tuple[str, str]]:
    """Experts that had no token in any of the steps."""
    idle = {
        layer: np.flatnonzero(sum(step.counts[layer] for step in steps) == 0).tolist() for layer in steps[-1].counts
    }
    if found := {layer: experts for layer, experts in idle.items() if experts}:
        worst = max(found, key=lambda layer: len(found[layer]))
        where = f"{_named('expert', found[worst])} of layer {worst}"
        others = f", and {sum(map(len, found.values())) - len(found[worst])} in other layers," if len(found) > 1 else ""
        yield (
            "idle",
            f"{where}{others} had no token in the last {len(steps)} steps looked at; look at train/idle_experts, and "
            "raise model.config.router_aux_loss_coef or take a router that adapts a bias",
        )


def _out_of_balance(steps: Sequence[StepRouting]) -> Iterator[tuple[str, str]]:
    """A layer whose busiest expert has far more than those of the other layers."""
    violations = [step.violation for step in steps]
    mean = {layer: fmean(one[layer] for one in violations) for layer in violations[-1]}
    usual = median(mean.values())
    out = [layer for layer, value in mean.items() if value > max(OUT_OF_BALANCE * usual, LEAST_VIOLATION)]
    if out and len(mean) > 2:
        worst = max(out, key=lambda layer: mean[layer])
        yield (
            "balance",
            f"{_named('layer', out)} is out of balance: the busiest expert of layer {worst} has {1 + mean[worst]:.1f} "
            f"times the mean load, of the median layer {1 + usual:.1f} times; look at layers/train/max_violation and "
            "the picture balance/figures/load, and raise model.config.router_aux_loss_coef",
        )


def _named(what: str, numbers: Sequence[int]) -> str:
    """``layer 3``, or ``layers 3, 5, 7, 8 and 2 more``."""
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}{more}"
