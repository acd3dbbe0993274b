"""Prediction: how well does the model predict the text? The check that a model and its text belong together.

T tokens, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from moebed.model.config import ModelConfig
from moebed.views.layer import HeadView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult
from probes.measures.resampling import WITHOUT, interval_of, unit_notes, units_of


class Prediction(Probe):
    """Loss and most probable next token at each position of the text.

    Stored once: ``loss (T,)``, nats of the token that follows, NaN after the last of a sequence; ``predicted (T,)``,
    the id most probable; ``target (T,)``, the id that follows, −1 after the last; ``token_domain (T,)``, index into
    ``domain_names``.
    """

    name = "prediction"
    question = "How well does the model predict this text?"
    needs = frozenset({Need.PREDICTIONS})

    def update_head(self, head: HeadView) -> None:
        """Keep what was predicted."""
        text = head.text
        units, loss = units_of(text, len(head.loss)), head.loss.cpu().numpy()
        self.arrays |= units.arrays() | {
            "loss": loss,
            f"loss{WITHOUT}": units.means_without(loss),
            "predicted": head.predicted.cpu().numpy().astype(np.int32),
            "target": text.targets.cpu().numpy().astype(np.int32),
            "token_domain": text.domain.cpu()[text.sequence.cpu()].numpy().astype(np.int32),
            "domain_names": np.array(text.domains, dtype=np.str_),
        }

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Loss, perplexity and accuracy over all tokens, and the loss of each domain."""
        known = np.isfinite(arrays["loss"]) if "loss" in arrays else np.zeros(0, bool)
        if not known.any():
            return ProbeResult(arrays, notes=["no token is followed by another: there is nothing to predict"])
        loss, right = arrays["loss"][known], (arrays["predicted"] == arrays["target"])[known]
        mean, names = float(loss.mean(dtype=np.float64)), arrays["domain_names"]
        scalars = {"loss": mean, "accuracy": float(right.mean())}
        if len(names) > 1:
            domain = arrays["token_domain"][known]
            present = [number for number in range(len(names)) if (domain == number).any()]
            scalars |= {f"loss/{names[n]}": float(loss[domain == n].mean(dtype=np.float64)) for n in present}
        said = (
            f"The model is {mean:.3f} nats a token away from {known.sum():,} tokens of this text (perplexity "
            f"{math.exp(min(mean, 700)):.4g}), and its first guess is right for {scalars['accuracy']:.1%} of them."
        )
        headlines = {"loss": Headline(mean, said, interval_of(arrays, "loss", mean, within=(0.0, math.inf)))}
        return ProbeResult(arrays, scalars, headlines, notes=unit_notes(arrays, headlines))


class Logits(Probe):
    """The model's logits at each position of the text. Stored once: ``logits (T, V)``."""

    name = "logits"
    question = "What does the model predict, in numbers?"
    needs = frozenset({Need.LOGITS})

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """Its logits in float32."""
        return 4 * config.vocab_size if layer is None else 0

    def update_head(self, head: HeadView) -> None:
        """Keep the logits."""
        assert head.logits is not None
        self.arrays["logits"] = head.logits.numpy()

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Nothing but a note on where they are."""
        shape = arrays["logits"].shape if "logits" in arrays else (0, 0)
        return ProbeResult(arrays, notes=[f"results/logits.npz holds logits for {shape[0]} tokens × {shape[1]} ids"])
