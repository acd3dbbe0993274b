"""The losses of a training step: what a forward pass gives to them, and how they are weighted and added up.

B sequences, S positions, T = B·S tokens, E experts, D domains of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.model.decoder import Decoder
from moebed.model.locality import locality_loss
from moebed.model.losses import (
    IGNORE_INDEX,
    domain_counts,
    load_balancing_loss,
    router_stats,
    sequence_balancing_loss,
    token_losses,
)
from moebed.model.routers import RouterSteps, Routing
from moebed.training.batch_sums import BatchSums
from moebed.training.routing_log import COUNTS, ENTROPY
from moebed.training.step_log import StepLog

Told = Mapping[str, Tensor]  # (B, S) by name, what routers are told of the tokens beside their ids
NOTHING: Told = MappingProxyType({})


class StepTerms(NamedTuple):
    """What one forward pass gives to the losses; lists have an entry for each MoE layer."""

    nats: Tensor  # (B,) summed cross entropy of each sequence, in nats
    counts: list[Tensor]  # (E,) assignments to each expert
    mean_probs: list[Tensor]  # (E,) mean router probability
    z_losses: list[Tensor]  # ()
    router_losses: list[dict[str, Tensor]]  # () by name, what a layer asks for beside
    router_sums: list[dict[str, Tensor]]  # (E,) by name, what a layer's losses of the batch are made of
    entropies: list[Tensor]  # () mean entropy of the router probabilities
    domain_counts: Tensor | None = None  # (D, E) of each domain in the last MoE layer, where the data ask for it
    # In training alone:
    sequence_losses: Sequence[Tensor] = ()  # () load-balancing loss of each sequence by itself
    statistics: Sequence[dict[str, Tensor]] = ()  # by name, what a router adapts to beside its load


class StepLosses:
    """The losses that a decoder's experts and routers are trained by, beside the language-model loss.

    Of each micro-batch, :meth:`terms` runs the decoder, and :meth:`total` adds up what is trained on.

    Args:
        decoder: Whose forward passes they are of.
        log: Where each is noted, unweighted.
    """

    def __init__(self, decoder: Decoder, log: StepLog) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.batch_counts, self.batch_sums = BatchSums(), BatchSums()  # assignments; what routers ask for
        self.num_domains = 0  # D, where assignments are counted by domain
        self.is_shown = True  # whether the log shows this step
        self._log = log

    # A forward pass ------------------------------------------------------------------------------------------------

    def terms(self, input_ids: Tensor, labels: Tensor, told: Told = NOTHING, domain: Tensor | None = None) -> StepTerms:
        """Run the decoder.

        Args:
            input_ids: (B, S).
            labels: (B, S), IGNORE_INDEX where nothing is predicted.
            told: What routers are told of the tokens beside.
            domain: (B,) domain of each sequence, where assignments are to be counted by it.
        """
        logits, routings = self.decoder(input_ids, **told)
        mask = (labels != IGNORE_INDEX).flatten()
        is_training = self.decoder.training
        stats = [router_stats(routing, mask) for routing in routings]
        if is_training and self.config.locality_loss_coef:
            where = self.decoder.placement, self.config.locality_epsilon
            for routing, layer in zip(routings, stats, strict=True):
                layer.losses["locality"] = locality_loss(routing.router_probs, mask, *where)
        return StepTerms(
            token_losses(logits, labels).sum(dim=1),
            [layer.counts for layer in stats],
            [layer.mean_probs for layer in stats],
            [layer.z_loss for layer in stats],
            [layer.losses for layer in stats],
            [layer.sums for layer in stats],
            [layer.entropy for layer in stats],
            None if domain is None else domain_counts(routings[-1], mask, domain, self.num_domains),
            self._sequence_losses(routings, mask, len(input_ids)) if is_training else (),
            self._statistics(routings, mask) if is_training else (),
        )

    def _sequence_losses(self, routings: Sequence[Routing], mask: Tensor, num_sequences: int) -> list[Tensor]:
        """Of each layer; where they are not the loss only the log asks for them, of the steps that it shows."""
        is_loss = self.config.router_aux_loss_scope == "sequence"
        if not is_loss and not self.is_shown:
            return []
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_loss):
            return [sequence_balancing_loss(routing, mask, num_sequences) for routing in routings]

    def _statistics(self, routings: Sequence[Routing], mask: Tensor) -> list[dict[str, Tensor]]:
        routers = self.decoder.routers
        return [router.statistics(routing, mask) for router, routing in zip(routers, routings, strict=True)]

    # The micro-batches of an optimizer step ------------------------------------------------------------------------

    @property
    def joins_batches(self) -> bool:
        """Whether balancing losses are of more than one micro-batch of one rank."""
        return self.config.router_aux_loss_scope in ("global", "window")

    @property
    def needs_window(self) -> bool:
        """Whether balancing needs all micro-batches of the optimizer step, and has not looked at them yet."""
        is_window = self.config.router_aux_loss_scope == "window" and bool(self.config.moe_layers)
        return is_window and not self.batch_counts.is_known

    @torch.no_grad()
    def look_ahead(self, window: Sequence[tuple[Tensor, Tensor, Told]], steps: RouterSteps) -> None:
        """Route all micro-batches of the optimizer step, so that the balancing losses know its load.

        The gradient of E · Σ f_i P_i over a step is exact only if each micro-batch knows f_i of all: f_i is a factor of
        every P_i's gradient, of which micro-batches before have kept nothing. Nothing else is exact without keeping
        their graphs, which is the memory that accumulation saves. What is drawn from torch's generators is drawn again.

        Args:
            window: Ids, labels and what is told (see :meth:`terms`) of each micro-batch from the first on.
            steps: Of the routers; the first micro-batch has begun.
        """
        if len(window) == 1:
            return
        device = window[0][0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            terms = [self.terms(*batch) for batch, _ in zip(window, steps.ahead(len(window)), strict=True)]
        self.batch_counts.know([_by_layer(one.counts) for one in terms])
        if any(terms[0].router_sums):
            self.batch_sums.know([one.router_sums for one in terms])

    def end_step(self) -> None:
        """The optimizer step ends: no micro-batch of it counts any more."""
        self.batch_counts.forget()
        self.batch_sums.forget()

    # The sum -------------------------------------------------------------------------------------------------------

    def total(self, loss: Tensor, terms: StepTerms) -> Tensor:
        """The language-model loss () and, weighted, all others: what a micro-batch is trained on."""
        return loss + self.balancing_losses(terms) + self.router_losses(terms) + self.batch_losses(terms)

    def balancing_losses(self, terms: StepTerms) -> Tensor:
        """Weighted sum of the balancing losses, each a mean over the MoE layers; logs them unweighted."""
        zero = terms.nats.new_zeros(())
        if not terms.counts:
            return zero
        counts = terms.counts
        if self.joins_batches:
            counts = [layer["counts"] for layer in self.batch_counts.of_all(_by_layer(counts))]
        pairs = zip(terms.mean_probs, counts, strict=True)
        together = torch.stack([load_balancing_loss(probs, count) for probs, count in pairs]).mean()
        balance = together
        if terms.sequence_losses:
            by_sequence = torch.stack(list(terms.sequence_losses)).mean()
            self._log.note("sequence_specialisation", (by_sequence - together).detach())
            balance = by_sequence if self.config.router_aux_loss_scope == "sequence" else together
        z_loss = torch.stack(terms.z_losses).mean()
        self._log.note("load_balancing_loss", balance)
        self._log.note("router_z_loss", z_loss)
        violation = torch.stack([count.max() / count.mean() - 1 for count in terms.counts]).mean()
        self._log.note("max_violation", violation)
        self._log.note(COUNTS, torch.cat(terms.counts))
        self._log.note(ENTROPY, torch.stack(terms.entropies))
        for coefficient, value in (
            (self.config.router_aux_loss_coef, balance),
            (self.config.router_z_loss_coef, z_loss),
        ):
            if coefficient:
                zero = zero + coefficient * value
        return zero

    def router_losses(self, terms: StepTerms) -> Tensor:
        """Weighted sum of what the layers ask for beside, a mean over the MoE layers; logs each, unweighted.

        A loss that some layers alone have in this step is logged as the mean of those.
        """
        total = terms.nats.new_zeros(())
        found: dict[str, list[Tensor]] = {}
        for router, losses in zip(self.decoder.routers, terms.router_losses, strict=True):
            coefficients = {**router.loss_coefficients(), **self.config.layer_losses}
            for name, value in losses.items():
                total = total + coefficients[name] * value / len(terms.router_losses)
                found.setdefault(name, []).append(value)
        self._note_means(found)
        return total

    def batch_losses(self, terms: StepTerms) -> Tensor:
        """Weighted sum over the layers of the routers' losses of a batch; logs each, unweighted, as a mean."""
        total = terms.nats.new_zeros(())
        sums = terms.router_sums
        if self.joins_batches and any(sums):
            sums = self.batch_sums.of_all(sums)
        found: dict[str, list[Tensor]] = {}
        for router, layer in zip(self.decoder.routers, sums, strict=True):
            for name, value in router.batch_losses(layer).items():
                total = total + router.loss_coefficients()[name] * value
                found.setdefault(name, []).append(value)
        self._note_means(found)
        return total

    def _note_means(self, found: Mapping[str, Sequence[Tensor]]) -> None:
        for name, values in found.items():
            self._log.note(f"{name}_loss", torch.stack(list(values)).mean())


def _by_layer(counts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{"counts": count} for count in counts]
