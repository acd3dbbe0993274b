"""Which probes run: those that a person named, as far as what is probed has what they need."""

from __future__ import annotations

from collections.abc import Sequence

from moebed.errors import ConfigError
from moebed.views.layer import Need
from probes.contract import in_order
from probes.registry import BY_NAME_ONLY, PROBES, TRAINING_ONLY, resolve_probes

HEAD_NEEDS = frozenset({Need.PREDICTIONS, Need.LOGITS})
WITHOUT_TEXT = frozenset({Need.WEIGHTS})
_NO_TEXT = "needs text; give --text, --input-ids or --domain"
# What each is called where it is not to be had.
_CALLED = {
    Need.WEIGHTS: "matrices of experts",
    Need.ROUTING: "router logits",
    Need.CHOICES: "chosen experts",
    Need.NEIGHBOURS: "order of tokens",
    Need.OUTPUTS: "outputs of experts",
    Need.ACTIVATIONS: "activations",
    Need.PREDICTIONS: "predictions",
    Need.LOGITS: "logits",
    Need.ATTRIBUTION: "parts of logits",
}


def probes_for(names: Sequence[str] | None, with_text: bool, in_order_given: bool = False) -> tuple[str, ...]:
    """Names of the probes to run on a checkpoint: the ones named, or all that the inputs allow.

    Args:
        names: Names, ``all`` for all that the inputs allow; the same if not given.
        with_text: Whether there is text.
        in_order_given: Whether it is one of several of a model, so that what follows a model over steps can run.

    Raises:
        ConfigError: A name is unknown, or its probe cannot run here.
    """
    return _chosen(names, _with(with_text), _NO_TEXT, () if in_order_given else TRAINING_ONLY)


def probes_that_fit(
    names: Sequence[str] | None, offers: frozenset[Need], what: str, with_text: bool = True
) -> tuple[tuple[str, ...], list[str]]:
    """The same on what offers less than a checkpoint does.

    Args:
        names: Names, ``all`` for all that fit; the same if not given.
        offers: What probes can be shown.
        what: What is probed, in words: ``a trace``.
        with_text: Whether there is text.

    Returns:
        The names, and a line for each thing that others lack.

    Raises:
        ConfigError: A name is unknown, or its probe cannot run here.
    """
    everything = probes_for(names, with_text)
    if names is not None and "all" not in names:
        return _chosen(names, offers, f"cannot run: {what} has no {{missing}}; leave it out"), []
    lacking: dict[str, list[str]] = {}
    for name in everything:
        lacking.setdefault(_lacking(name, offers), []).append(name)
    fitting = lacking.pop("", [])
    return tuple(fitting), [f"{what} has no {one}: left out {', '.join(some)}" for one, some in lacking.items()]


def _with(text: bool) -> frozenset[Need]:
    return frozenset(Need) if text else WITHOUT_TEXT


def _chosen(
    names: Sequence[str] | None, offers: frozenset[Need], why: str, barred: Sequence[str] = TRAINING_ONLY
) -> tuple[str, ...]:
    allowed = [name for name in PROBES if name not in barred and not _lacking(name, offers)]
    if names is None or "all" in names:
        named = [name for name in resolve_probes(names or []) if name in BY_NAME_ONLY and name in allowed]
        return tuple(name for name in allowed if name not in BY_NAME_ONLY or name in named)
    chosen = resolve_probes(names)
    for name in chosen:
        if name in barred:
            raise ConfigError(
                f"probes: {name} follows a model while it trains; of checkpoints, give those before with --earlier"
            )
        if missing := _lacking(name, offers):
            raise ConfigError(f"probes: {name} {why.format(missing=missing)}, or choose from {', '.join(allowed)}")
    return chosen


def _lacking(name: str, offers: frozenset[Need]) -> str:
    """What a probe, or one that it takes its numbers from, needs in vain; empty where it can run."""
    needs = frozenset().union(*(PROBES[one].needs for one in in_order([name], PROBES)))
    return " and no ".join(_CALLED[need] for need in Need if need in needs - offers)
