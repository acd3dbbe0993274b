"""The driver: one pass over layer views feeds every probe.

It has no Trainer, path or logger; ``probes.running.callback`` gives it those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.machine.float32 import exact_products
from moebed.views.layer import MATRICES, HeadView, LayerView, Need
from probes.contract import ArrayName, Probe, ProbeResult, in_order, require_result

PER_EXPERT = frozenset({Need.OUTPUTS, Need.ACTIVATIONS})


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
    return frozenset().union(*(probe.needs | probe.wants for probe in probes))


class ProbePass:
    """One pass of probes over the layers of a model.

    Args:
        probes: Fresh probe objects; each serves one pass.
        timing: Filled in, where given.
        shown: Those of the probes that are shown something; all of them if not given. Of the others everything is
            known already.
    """

    def __init__(
        self, probes: Sequence[Probe], timing: Timing | None = None, shown: Sequence[Probe] | None = None
    ) -> None:
        self.probes, self.missing = probes, dict[int, str]()
        self.shown = probes if shown is None else shown
        self.timing = Timing() if timing is None else timing
        by_name = {probe.name: probe for probe in probes}
        self._in_order = [by_name[name] for name in in_order(by_name, by_name)]
        for probe in probes:
            self.timing.probe[probe.name] = 0.0
        self._per_expert = [probe for probe in self.shown if probe.needs & PER_EXPERT]
        self._per_matrix = [probe for probe in self.shown if Need.WEIGHTS in probe.needs]

    @torch.no_grad()
    @exact_products()
    def show(self, view: LayerView | HeadView) -> bool:
        """Show a layer to every probe, running its experts once for all probes that look at them.

        Returns:
            Whether all was seen. Of a layer that cannot be read, or where the text ends in NaN, the probes then know
            nothing, and ``missing`` says why; where the text ended earlier, they know the layer's weights.
        """
        if isinstance(view, HeadView):
            for probe in self.shown:
                with self._clock(probe):
                    probe.update_head(view)
            return True
        try:
            if view.error is not None:
                raise view.error
            for probe in self.shown:
                probe.begin_layer(view)
            for name in MATRICES if view.num_experts else ():
                for probe in self._per_matrix:
                    with self._clock(probe):
                        probe.update_matrix(view, name)
            if self._per_expert and view.num_experts and view.moe_input is not None:
                _show_experts(view, self._per_expert, self.timing)
            for probe in self.shown:
                with self._clock(probe):
                    probe.update(view)
        except UserError as error:
            self.missing[view.index] = str(error)
            for probe in self.shown:
                probe.forget(view.index)
            return False
        return view.text_error is None

    @torch.no_grad()
    @exact_products()
    def results(self) -> dict[str, ProbeResult]:
        """Each probe's result over the layers shown, by name, with a note on each layer that is missing."""
        results: dict[str, ProbeResult] = {}
        for probe in self.probes:  # layer after layer, whichever of them were kept from an earlier pass
            probe.arrays = dict(sorted(probe.arrays.items(), key=lambda item: _place(item[0])))
        for probe in self._in_order:
            with self._clock(probe):
                if probe.sources:
                    named = (*probe.sources, *(name for name in probe.optional_sources if name in results))
                    probe.derive({name: results[name].arrays for name in named})
                result = probe.compute()
                require_result(result, probe.name)
                results[probe.name] = result
        for result in results.values():
            result.notes.extend(f"layer {layer} is missing: {why}" for layer, why in self.missing.items())
        return {probe.name: results[probe.name] for probe in self.probes}

    @contextmanager
    def _clock(self, probe: Probe) -> Iterator[None]:
        start = _now()
        yield
        self.timing.probe[probe.name] += _now() - start


@torch.no_grad()
def run_probes(
    views: Iterable[LayerView | HeadView],
    probes: Sequence[Probe],
    timing: Timing | None = None,
    missing: dict[int, str] | None = None,
) -> dict[str, ProbeResult]:
    """Show every layer to every probe.

    Args:
        views: The walk over a model's layers, made with ``needs_of(probes)``.
        probes: Fresh probe objects; each serves one pass.
        timing: Filled in, where given.
        missing: Filled in, where given, with the layers that could not be looked at, and why.

    Returns:
        Each probe's result, by name.
    """
    one_pass = ProbePass(probes, timing)
    with ExitStack() as stack:
        iterator = iter(views)
        if hasattr(iterator, "close"):
            stack.callback(iterator.close)  # a walk restores the model when it is closed, also after an error
        while True:
            start = _now()
            view = next(iterator, None)
            one_pass.timing.forward += _now() - start
            if view is None:
                break
            one_pass.show(view)
    if missing is not None:
        missing |= one_pass.missing
    return one_pass.results()


def _show_experts(view: LayerView, probes: Sequence[Probe], timing: Timing) -> None:
    """Run the experts once for all probes that look at them; what that takes is shared evenly between those."""
    watchers = [probe for probe in probes if Need.ACTIVATIONS in probe.needs]
    watched = 0.0

    def watch(expert: int, tokens: slice, activations: Tensor) -> None:
        nonlocal watched
        for probe in watchers:
            start = _now()
            probe.update_activations(view, expert, tokens, activations)
            timing.probe[probe.name] += _now() - start
            watched += _now() - start

    mark = _now()
    for expert in view.experts(watch if watchers else None):
        share, watched = (_now() - mark - watched) / len(probes), 0.0
        for probe in probes:
            start = _now()
            probe.update_expert(view, expert)
            timing.probe[probe.name] += share + _now() - start
        mark = _now()


def _place(key: str) -> tuple[int, str]:
    """Sorts arrays by layer, those of none first and by name: which layer stored them depends on what was kept."""
    layer = ArrayName.of(key).layer
    return (-1, key) if layer is None else (layer, "")


def _now() -> float:
    """Seconds, once the device has done what was asked of it: kernels run on after their launch returns."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
