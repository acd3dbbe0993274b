"""The rules by which the weights of a run's domains change while it trains.

D domains, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moebed.data.loader import PackedLoader
from moebed.data.mixing import MixingConfig, reference_losses, require_same_tokens
from moebed.errors import ConfigError


def changed_weights(weights: np.ndarray, gain: np.ndarray, step_size: float, smoothing: float) -> np.ndarray:
    """(1 − c) · softmax(ln w + η · g) + c / D, ``(D,)``, which sums to 1.

    Args:
        weights: w ``(D,)``, of which none is 0.
        gain: g ``(D,)``; the same added to all changes nothing.
        step_size: η.
        smoothing: c.
    """
    logits = np.log(weights) + step_size * gain
    grown = np.exp(logits - logits.max())
    mixed = (1 - smoothing) * grown / grown.sum() + smoothing / len(weights)
    return mixed / mixed.sum()


def excess_loss(losses: np.ndarray, reference: np.ndarray, clip: bool) -> np.ndarray:
    """How far losses ``(D,)`` lie above the reference ``(D,)``; with ``clip``, 0 where they lie below."""
    excess = losses - reference
    return np.maximum(excess, 0.0) if clip else excess


def gate_load_distance(counts: np.ndarray) -> np.ndarray:
    """Mean L2 distance ``(D,)`` of a domain's shares of the experts to the other domains'.

    Args:
        counts: Assignments of each domain to each expert ``(D, E)``, of every domain some.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    distances = np.linalg.norm(shares[:, None] - shares[None], axis=-1)  # (D, D)
    return distances.sum(axis=1) / (len(shares) - 1)


class Static:
    """The weights stay; what the rules are made from.

    All ranks call a rule together and come to the same weights. The weights are the training loader's, and part of its
    state; what a rule has seen since it changed them last is kept here.

    Args:
        config: The settings.
        domains: Names of the domains.
    """

    counts_load = False  # whether training is to say which experts each domain's tokens are sent to
    step_size, smoothing = 0.0, 0.0  # where the config says nothing

    def __init__(self, config: MixingConfig, domains: Sequence[str]) -> None:
        self.config, self.domains = config, list(domains)
        self._loader: PackedLoader | None = None

    def check(self, data: Any, trainer: Any, moe_layers: Sequence[int]) -> None:
        """Check what the rule needs of a run before it trains; raises UserError.

        Args:
            data: The data module, set up.
            trainer: Of the run.
            moe_layers: Indices of the model's layers that have experts.
        """

    def attach(self, loader: PackedLoader) -> None:
        """Change the weights of this loader from now on."""
        self._loader = loader

    def numbers(self) -> dict[str, float]:
        """The weights that hold now, for the log; nothing where they never change."""
        return {}

    def add(self, counts: Tensor) -> None:
        """Count in a micro-batch: this rank's assignments of each domain to each expert (D, E)."""

    def forget(self) -> None:
        """The optimizer step is not taken: what was counted in it is dropped."""

    def end_step(self) -> None:
        """The optimizer step ends."""

    def end_validation(self, losses: Tensor) -> None:
        """A validation ends amid training: its losses (D,), in nats a token, of all ranks' text."""

    def state_dict(self) -> dict[str, Any]:
        """What was seen since the last change, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state_dict`` of the same rule returned."""


class Changing(Static):
    """Weights that change.

    Raises:
        ConfigError: There is one domain alone.
    """

    def __init__(self, config: MixingConfig, domains: Sequence[str]) -> None:
        super().__init__(config, domains)
        if len(domains) < 2:
            raise ConfigError(f"data.mixing.rule {config.rule} needs two domains or more, and {domains[0]!r} is alone")

    def numbers(self) -> dict[str, float]:
        """The weight of each domain."""
        assert self._loader is not None
        return {f"weight/{name}": float(w) for name, w in zip(self.domains, self._loader.weights, strict=True)}

    def _change(self, gain: np.ndarray) -> None:
        assert self._loader is not None
        step_size = self.step_size if self.config.step_size is None else self.config.step_size
        smoothing = self.smoothing if self.config.smoothing is None else self.config.smoothing
        self._loader.change_weights(changed_weights(self._loader.weights, gain, step_size, smoothing))


class ExcessLoss(Changing):
    """A domain whose validation loss lies far above its reference gets more weight (2310.06694, 2406.16554).

    Validations at other steps than those of ``trainer.val_check_interval``, as where a run is stopped, change nothing.
    """

    step_size, smoothing = 1.0, 1e-4

    def __init__(self, config: MixingConfig, domains: Sequence[str]) -> None:
        super().__init__(config, domains)
        self._reference: np.ndarray | None = None  # read when training begins
        self._former: list[float] = []  # in the checkpoint that is continued

    def check(self, data: Any, trainer: Any, moe_layers: Sequence[int]) -> None:
        """There will be a loss of every domain, and there is a reference, of the same tokens."""
        if trainer.fast_dev_run:
            return
        if (
            not isinstance(getattr(trainer, "val_check_interval", None), int)
            or trainer.check_val_every_n_epoch is not None
        ):
            raise ConfigError(
                "data.mixing.rule excess_loss changes the weights at validations after so many steps; set "
                "trainer.val_check_interval to a number of steps, and check_val_every_n_epoch to null"
            )
        if isinstance(trainer.limit_val_batches, int) or trainer.limit_val_batches < 1:  # 1 is one batch, 1.0 are all
            raise ConfigError(
                "data.mixing.rule excess_loss needs every domain's validation loss, and trainer.limit_val_batches cuts "
                "the last domains off; set data.max_validation_windows instead"
            )
        assert self.config.reference is not None
        reference_losses(self.config.reference, self.domains)
        if isinstance(self.config.reference, str):
            text = data.stores[0].validation_text(data.sequence_length, 1).decode(errors="ignore")
            require_same_tokens(self.config.reference, data.tokenizer, text)

    def attach(self, loader: PackedLoader) -> None:
        """Read the reference, and say where it is not the one that the run began with."""
        super().attach(loader)
        assert self.config.reference is not None
        self._reference = reference_losses(self.config.reference, self.domains)
        for name, former, loss in zip(self.domains, self._former, self._reference, strict=False):
            if former != loss:
                rank_zero_warn(f"data.mixing.reference of {name!r} was {former} in the checkpoint and is {loss} now")

    def end_validation(self, losses: Tensor) -> None:
        """Change the weights, if every loss is finite."""
        assert self._reference is not None
        found = losses.cpu().double().numpy()
        if np.isfinite(found).all():
            self._change(excess_loss(found, self._reference, self.config.clip))
        else:
            name = self.domains[int(np.flatnonzero(~np.isfinite(found))[0])]
            rank_zero_warn(f"the domains' weights stay as they are: {name!r} has no finite validation loss")

    def state_dict(self) -> dict[str, Any]:
        """The reference."""
        return {"reference": [] if self._reference is None else self._reference.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take note of it; the settings say what it is now."""
        self._former = state["reference"]


class GateLoad(Changing):
    """A domain whose tokens go to other experts than the other domains' gets more weight (2406.11256).

    Two domains are as far from each other, so that they come to the same weight. Loads are those of the training text.
    """

    counts_load = True
    step_size, smoothing = 10.0, 0.05

    def __init__(self, config: MixingConfig, domains: Sequence[str]) -> None:
        super().__init__(config, domains)
        self._every = config.every_n_steps or 100
        self._pending: Tensor | None = None  # (D, E) of this rank's micro-batches of the step
        self._counts: Tensor | None = None  # (D, E) float32, of all ranks, since the weights changed
        self._steps = 0  # so many

    def check(self, data: Any, trainer: Any, moe_layers: Sequence[int]) -> None:
        """The model has experts."""
        if not moe_layers:
            raise ConfigError("data.mixing.rule gate_load goes by experts, and the model has none; choose excess_loss")

    def add(self, counts: Tensor) -> None:
        """Keep them until the step is taken."""
        counts = counts.detach()
        self._pending = counts if self._pending is None else self._pending + counts

    def forget(self) -> None:
        """The step is not taken."""
        self._pending = None

    def end_step(self) -> None:
        """Count the step in; change the weights where it is time, and every domain had text."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pending)
        self._counts = pending if self._counts is None else self._counts.to(pending.device) + pending
        self._steps += 1
        if self._steps < self._every:
            return
        counts = self._counts.cpu().double().numpy()
        if (counts.sum(axis=1) > 0).all():
            self._change(gate_load_distance(counts))
            self._counts, self._steps = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Counts of the steps since the last change."""
        return {"steps": self._steps, "counts": None if self._counts is None else self._counts.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        counts = state["counts"]
        if counts is None or len(counts) == len(self.domains):
            self._steps, self._counts = state["steps"], None if counts is None else torch.tensor(counts)


RULES: dict[str, type[Static]] = {"static": Static, "excess_loss": ExcessLoss, "gate_load": GateLoad}
