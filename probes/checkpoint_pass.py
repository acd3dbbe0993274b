"""One pass over a checkpoint that is read layer by layer: kept as it goes, continued where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moebed.allocator import release_freed_memory
from moebed.errors import ConfigError, UserError
from moebed.pretrained import PretrainedMoE
from moebed.views import HeadView, LayerView, Need
from probes import store
from probes.base import ProbeResult
from probes.driver import ProbePass, Timing, needs_of
from probes.partial import PartialResults
from probes.registry import BY_NAME_ONLY, PROBES, TRAINING_ONLY, resolve_probes, with_sources


def probes_for(names: Sequence[str] | None, with_text: bool) -> tuple[str, ...]:
    """Names of the probes to run on a checkpoint: the ones named, or all that the inputs allow.

    Args:
        names: Names, ``all`` for all that the inputs allow; the same if not given.
        with_text: Whether there is text.

    Raises:
        ConfigError: A name is unknown, or its probe cannot run here.
    """
    possible = [name for name, probe in PROBES.items() if with_text or probe.needs <= {Need.WEIGHTS}]
    allowed = [name for name in possible if set(with_sources(name)) <= set(possible) and name not in TRAINING_ONLY]
    if names is None or "all" in names:
        named = [name for name in resolve_probes(names or []) if name in BY_NAME_ONLY and name in allowed]
        return tuple(name for name in allowed if name not in BY_NAME_ONLY or name in named)
    chosen = resolve_probes(names)
    for name in chosen:
        if name in TRAINING_ONLY:
            raise ConfigError(f"probes: {name} follows a model while it trains; a checkpoint does not have it")
        if name not in allowed:
            raise ConfigError(
                f"probes: {name} needs text; give --text, --input-ids or --domain, or choose from {', '.join(allowed)}"
            )
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
        self.model, self.timing = model, Timing()
        self.identity = model.identity
        earlier = store.load_summary(out)
        if earlier and earlier.get("model") != self.identity:
            other = earlier.get("model", {}).get("name", "a training run")
            raise UserError(f"{out} holds the results of {other}; choose another folder for those of {model.name}")
        self._pass = ProbePass([PROBES[name]() for name in names], self.timing)
        self._partial = PartialResults(out, model.fingerprint(), names)
        kept = self._partial.load([*model.layers, model.config.num_hidden_layers])
        for arrays in kept.values():
            for probe in self._pass.probes:
                probe.arrays.update(arrays.get(probe.name, {}))
        self.continued = len(kept)
        needs = needs_of(self._pass.probes)
        streams = self._partial.load_streams(model.device) if model.text is not None else (None, None)
        model.prepare(kept, needs, streams)

    @property
    def missing(self) -> dict[int, str]:
        """Layers that could not be read or that the text did not pass, and why."""
        stopped = self.model.text_pass.stopped if self.model.text_pass is not None else None
        known = self._pass.missing
        return known if stopped is None or known else {self.model.layers[-1]: str(stopped)}

    def show(self, view: LayerView | HeadView) -> None:
        """Show a layer, or what the model predicts after the last one, to the probes; keep what they stored of it."""
        if isinstance(view, LayerView) and view.text is not None and self.model.text_pass is not None:
            self._partial.save_streams(self.model.text_pass.streams)
        whole = self._pass.show(view)
        if isinstance(view, HeadView):
            self._partial.save(self.model.config.num_hidden_layers, self._pass.probes, everything=True)
        elif whole:
            self._partial.save(view.index, self._pass.probes)
        release_freed_memory()  # or the holes of one layer's work add up to those of the next

    def results(self) -> dict[str, ProbeResult]:
        """Each probe's result over the layers that could be read, with a note on each that could not."""
        self.model.close()  # the weights give room to the pictures
        results = self._pass.results()
        if not self.missing:
            self._partial.drop_streams()
        self._partial.drop_others()
        return results
