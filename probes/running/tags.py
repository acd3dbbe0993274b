"""How what the probes found is called in a log.

The first part of a tag is what TensorBoard groups by. A probe that runs unasked is a group; any other, a plug-in's too,
stands in the group of what it looks at, so that there are never more than twenty. A group holds what is of all layers
together, and one group all that is of single layers, however many there are; the custom-scalars dashboard has the
latter, a chart a quantity and a line a layer (:class:`moebed.training.loggers.EventLog`).

    answers/1_norm                the questions of a report, in its order: sentences, curves, pictures
    balance/cv                    a probe's quantity, mean over layers, and its sentence, if it has one
    balance/figures/load          a probe's picture
    weights/expert_geometry/rank  the same of a probe that does not run unasked
    layers/balance/cv/layer_07    the same of one layer
    probes_cost/balance_seconds   what probing costs
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from moebed.machine.tags import LAYERS, TRAIN
from moebed.views.layer import Need
from probes.contract import ProbeResult, in_order
from probes.questions import QUESTIONS, Question, asked_of, with_what_follows
from probes.registry import DEFAULT_PROBES, PROBES

ANSWERS, COST, FIGURES = "answers", "probes_cost", "figures"
# What probes look at, the first one that they or their sources need; the router is what all others look at.
LOOKED_AT = {
    "predictions": {Need.PREDICTIONS, Need.LOGITS},  # interventions among them
    "weights": {Need.WEIGHTS},
    "outputs": {Need.OUTPUTS, Need.ACTIVATIONS},
    "router": set(Need),
}
RUN_TEXTS = ("config", "computed_in", "samples")
_OF_LAYER = re.compile(r".+/layer_\d+")


def group_of(probe: str) -> str:
    """The first part of a probe's tags, or its first two; of a probe that is not known, as an old log has, its name."""
    if probe in DEFAULT_PROBES or probe not in PROBES:
        return probe
    needs = frozenset().union(*(PROBES[one].needs for one in in_order([probe], PROBES)))
    group = next((name for name, some in LOOKED_AT.items() if needs & some), "router")
    return f"{group}/{probe}"


def scalar_tag(probe: str, key: str) -> str:
    """The tag of ``<quantity>`` or ``<quantity>/layer_07`` of a probe."""
    tag = f"{group_of(probe)}/{key}"
    return f"{LAYERS}/{tag}" if _OF_LAYER.fullmatch(key) else tag


def present_tag(tag: str) -> str:
    """A tag of numbers or text as it is now.

    All that probes found had one group once, then each probe its own; of a run's text each had its own. A picture's
    tag was ``probes/<probe>/<figure>``.
    """
    if tag in RUN_TEXTS:
        return f"run/{tag}"
    of_probes = tag.removeprefix("probes/")
    probe, _, rest = of_probes.removeprefix(f"{LAYERS}/").partition("/")
    return scalar_tag(probe, rest) if probe in PROBES or of_probes != tag else tag


def scalars(results: Mapping[str, ProbeResult]) -> dict[str, float]:
    """All numbers of a probing by tag: what answers the questions, and each probe's quantities."""
    known = with_what_follows(results)
    found = {
        f"{_answer_tag(question)}/{name.rpartition('/')[2]}": float(headline.value)
        for question in asked_of(known)
        for name, headline in question.answers(known).items()
    }
    return found | {scalar_tag(name, key): value for name, one in results.items() for key, value in one.scalars.items()}


def sentences(results: Mapping[str, ProbeResult]) -> dict[str, str]:
    """Markdown by tag: each question with its answers and what was published, then each probe's own sentences."""
    found, known = {}, with_what_follows(results)
    for question in asked_of(known):
        if answers := question.answers(known).values():
            said = [f"{one.sentence}{_interval(one.interval)}" for one in answers]
            found[_answer_tag(question)] = "\n\n".join(
                [f"**{question.text}**", *said, f"*Published:* {question.paper}"]
            )
    for name, result in results.items():
        found |= {scalar_tag(name, key): headline.sentence for key, headline in result.headlines.items()}
    return found


def picture_tags(probe: str, figure: str) -> list[str]:
    """The tags of a picture: that of the question that it answers, if it does, and its probe's.

    Neither is a number's, which may have the same name: TensorBoard takes all events of a tag for one kind.
    """
    answered = [question for question in QUESTIONS if f"{probe}/{figure}" in question.pictures]
    return [f"{group}/{FIGURES}/{figure}" for group in (*map(_answer_tag, answered), group_of(probe))]


def is_of_probes(tag: str, probes: Iterable[str]) -> bool:
    """Whether a tag is of a probing, and not of training.

    Args:
        tag: As it is now (:func:`present_tag`).
        probes: Names of the probes that are known.
    """
    group, _, rest = tag.partition("/")
    return group in (ANSWERS, COST, *LOOKED_AT, *probes) or (group == LAYERS and not rest.startswith(f"{TRAIN}/"))


def _answer_tag(question: Question) -> str:
    """With its number, which keeps the order where tags are sorted."""
    return f"{ANSWERS}/{QUESTIONS.index(question) + 1}_{question.name}"


def _interval(interval: tuple[float, float] | None) -> str:
    return f" (95 %: {interval[0]:.3g} to {interval[1]:.3g})" if interval is not None else ""
