"""The questions of 2406.18219 and of section 5 of 2401.04088, as a report's first lines answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Question(NamedTuple):
    """What a reader wants to know first.

    Args:
        text: The question.
        headlines: ``<probe>/<headline>`` that answer it, of which a run may have some.
        paper: What was published, and where.
    """

    text: str
    headlines: Sequence[str]
    paper: str


QUESTIONS = (
    Question(
        "Does an expert's output norm predict that it is chosen?",
        ("norm_vs_score/spearman", "norm_vs_score/topk_overlap"),
        "Mixtral: the i-th largest norm most likely has the i-th highest score; DeepSeekMoE: the five largest norms of "
        "64 most likely get the top scores; Grok-1: no such relation, or its inverse (2406.18219, section 5.2).",
    ),
    Question(
        "Does the diversity of the experts rise with depth?",
        ("layer_diversity/rises_weights", "layer_diversity/rises_outputs"),
        "It rises with depth in Mixtral, up to the last layers (2406.18219, sections 4.1 and 5.1).",
    ),
    Question(
        "Is the last layer an exception?",
        ("layer_diversity/last_layer_weights", "layer_diversity/last_layer_outputs"),
        "Yes: the experts of the last layer are more alike again (2406.18219, section 5.1).",
    ),
    Question(
        "Do domains use different experts?",
        ("domain_share/divergence", "repeats/repeat_first"),
        "Mixtral: no obvious pattern by topic, DM Mathematics somewhat apart; consecutive tokens keep their expert "
        "more often than by chance (2401.04088, section 5).",
    ),
    Question(
        "Do experts' weights stand for what they do?",
        ("weight_vs_output/r_up", "weight_vs_output/r_gate", "weight_vs_output/r_down"),
        "To some extent, by comparing heat maps of weights and of outputs (2406.18219, section 5.1).",
    ),
)
