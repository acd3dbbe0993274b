"""The questions of 2406.18219 and of section 5 of 2401.04088, which a report and a log answer first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from probes.contract import Headline, ProbeResult
from probes.layer_diversity import LayerDiversity


class Question(NamedTuple):
    """What a reader wants to know first.

    Args:
        name: Short, for tags and links.
        text: The question.
        headlines: ``<probe>/<headline>`` that answer it, of which a run may have some.
        pictures: ``<probe>/<figure>`` that show it.
        paper: What was published, and where.
    """

    name: str
    text: str
    headlines: Sequence[str]
    pictures: Sequence[str]
    paper: str

    @property
    def probes(self) -> tuple[str, ...]:
        """Those that the question is about."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.headlines))

    def answers(self, results: Mapping[str, ProbeResult]) -> dict[str, Headline]:
        """The headlines that are there, by ``<probe>/<headline>``."""
        found = {}
        for name in self.headlines:
            probe, _, key = name.partition("/")
            if probe in results and key in results[probe].headlines:
                found[name] = results[probe].headlines[key]
        return found


QUESTIONS = (
    Question(
        "norm",
        "Does an expert's output norm predict that it is chosen?",
        ("norm_vs_score/spearman", "norm_vs_score/topk_overlap"),
        ("norm_vs_score/rank_counts", "norm_vs_score/over_depth"),
        "Mixtral: the i-th largest norm most likely has the i-th highest score; DeepSeekMoE: the five largest norms of "
        "64 most likely get the top scores; Grok-1: no such relation, or its inverse (2406.18219, section 5.2).",
    ),
    Question(
        "depth",
        "Does the diversity of the experts rise with depth?",
        ("layer_diversity/rises_weights", "layer_diversity/rises_outputs"),
        ("layer_diversity/over_depth",),
        "It rises with depth in Mixtral, up to the last layers (2406.18219, sections 4.1 and 5.1).",
    ),
    Question(
        "last_layer",
        "Is the last layer an exception?",
        ("layer_diversity/last_layer_weights", "layer_diversity/last_layer_outputs"),
        (),
        "Yes: the experts of the last layer are more alike again (2406.18219, section 5.1).",
    ),
    Question(
        "domains",
        "Do domains use different experts?",
        ("domain_share/divergence", "repeats/repeat_first"),
        ("domain_share/share_first", "domain_share/divergence"),
        "Mixtral: no obvious pattern by topic, DM Mathematics somewhat apart; consecutive tokens keep their expert "
        "more often than by chance (2401.04088, section 5).",
    ),
    Question(
        "weights",
        "Do experts' weights stand for what they do?",
        ("weight_vs_output/r_up", "weight_vs_output/r_gate", "weight_vs_output/r_down"),
        ("weight_vs_output/scatter",),
        "To some extent, by comparing heat maps of weights and of outputs (2406.18219, section 5.1).",
    ),
)


def with_what_follows(results: Mapping[str, ProbeResult]) -> dict[str, ProbeResult]:
    """Results, and what follows from them without looking at the model: a run need not probe for it."""
    found = dict(results)
    if LayerDiversity.name not in found and "matrix_similarity" in found:
        arrays = LayerDiversity.of_weights(found["matrix_similarity"].arrays)
        if arrays:
            found[LayerDiversity.name] = LayerDiversity.describe(arrays)
    return found


def asked_of(results: Mapping[str, ProbeResult]) -> list[Question]:
    """The questions that some probe of a run is about."""
    return [question for question in QUESTIONS if any(name in results for name in question.probes)]
