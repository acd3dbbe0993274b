"""One pass over a checkpoint that is read layer by layer: kept as it goes, continued where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moebed.allocator import release_freed_memory
from moebed.errors import ConfigError, UserError
from moebed.pretrained import PretrainedMoE
from moebed.views import LayerView, Need
from probes import store
from probes.base import ProbeResult
from probes.driver import ProbePass, Timing, needs_of
from probes.partial import PartialResults
from probes.registry import PROBES, resolve_probes


def probes_of_weights(names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the probes to run where there are weights and no text: all of those, or the ones named.

    Raises:
        ConfigError: A name is unknown, or its probe needs text.
    """
    allowed = [name for name, probe in PROBES.items() if probe.needs <= {Need.WEIGHTS}]
    if names is None or "all" in names:
        return tuple(allowed)
    chosen = resolve_probes(names)
    for name in chosen:
        if name not in allowed:
            raise ConfigError(f"probes: {name} needs text, but only weights are read; choose from {', '.join(allowed)}")
    return chosen


class CheckpointPass:
    """The probes' pass over a checkpoint.

    A layer is stored once it is finished; a layer whose weights cannot be read is left out and the pass goes on.

    Args:
        model: The checkpoint.
        names: The probes.
        out: Folder of the results.

    Raises:
        UserError: The folder holds the results of another model.
    """

    def __init__(self, model: PretrainedMoE, names: Sequence[str], out: Path) -> None:
        self.model, self.missing, self.timing = model, dict[int, str](), Timing()
        self.identity = model.identity
        earlier = store.load_summary(out)
        if earlier and earlier.get("model") != self.identity:
            other = earlier.get("model", {}).get("name", "a training run")
            raise UserError(f"{out} holds the results of {other}; choose another folder for those of {model.name}")
        self._pass = ProbePass([PROBES[name]() for name in names], self.timing)
        self._partial = PartialResults(out, model.fingerprint(), names)
        kept = self._partial.load(model.layers)
        for arrays in kept.values():
            for probe in self._pass.probes:
                probe.arrays.update(arrays.get(probe.name, {}))
        self.continued = len(kept)
        model.skip(kept, needs_of(self._pass.probes))

    def show(self, view: LayerView) -> None:
        """Show a layer to the probes and keep what they stored of it."""
        try:
            self._pass.show(view)
        except UserError as error:
            self.missing[view.index] = str(error)
        else:
            self._partial.save(view.index, self._pass.probes)
        release_freed_memory()  # or the holes of one layer's work add up to those of the next

    def results(self) -> dict[str, ProbeResult]:
        """Each probe's result over the layers that could be read, with a note on each that could not."""
        self.model.close()  # the weights give room to the pictures
        results = self._pass.results()
        for result in results.values():
            result.notes.extend(f"layer {layer} is missing: {why}" for layer, why in self.missing.items())
        self._partial.drop_others()
        return results
