"""The driver: one pass over layer views feeds every probe.

It has no Trainer, path or logger; ``probes.callback`` gives it those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from moebed.views import LayerView, Need
from probes.base import Probe, ProbeResult

_PER_EXPERT = frozenset({Need.OUTPUTS, Need.ACTIVATIONS})


@dataclass
class Timing:
    """Where the seconds of one pass went.

    Args:
        forward: Seconds of the walk itself, which all probes share.
        probe: Seconds of each probe by name; running every expert on every token is split evenly between the probes
            that asked for it.
    """

    forward: float = 0.0
    probe: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of the whole pass."""
        return self.forward + sum(self.probe.values())


def needs_of(probes: Iterable[Probe]) -> frozenset[Need]:
    """All that these probes ask of a layer view."""
    return frozenset().union(*(probe.needs for probe in probes))


@torch.no_grad()
def run_probes(
    views: Iterable[LayerView], probes: Sequence[Probe], timing: Timing | None = None
) -> dict[str, ProbeResult]:
    """Show every layer to every probe, running the experts of a layer once for all probes that look at them.

    Args:
        views: The walk over a model's layers, made with ``needs_of(probes)``.
        probes: Fresh probe objects; each serves one pass.
        timing: Filled in, where given.

    Returns:
        Each probe's result, by name.
    """
    timing = Timing() if timing is None else timing
    for probe in probes:
        timing.probe[probe.name] = 0.0
    per_expert = [probe for probe in probes if probe.needs & _PER_EXPERT]
    needs = needs_of(per_expert)
    with ExitStack() as stack:
        iterator = iter(views)
        if hasattr(iterator, "close"):
            stack.callback(iterator.close)  # a walk restores the model when it is closed, also after an error
        while True:
            start = _now()
            view = next(iterator, None)
            timing.forward += _now() - start
            if view is None:
                break
            if per_expert and view.num_experts:
                _show_experts(view, per_expert, needs, timing)
            for probe in probes:
                start = _now()
                probe.update(view)
                timing.probe[probe.name] += _now() - start
    results = {}
    for probe in probes:
        start = _now()
        results[probe.name] = probe.compute()
        timing.probe[probe.name] += _now() - start
    return results


def _show_experts(view: LayerView, probes: Sequence[Probe], needs: frozenset[Need], timing: Timing) -> None:
    mark = _now()
    for expert in view.experts(needs):
        share = (_now() - mark) / len(probes)
        for probe in probes:
            start = _now()
            probe.update_expert(view, expert)
            timing.probe[probe.name] += share + _now() - start
        mark = _now()


def _now() -> float:
    """Seconds, once the device has done what was asked of it: kernels run on after their launch returns."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
