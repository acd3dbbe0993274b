"""One pass over a checkpoint that is read layer by layer: kept as it goes, continued where it stopped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.errors import UserError
from moebed.machine import provenance
from moebed.machine.allocator import release_freed_memory
from moebed.machine.places import require_room
from moebed.machine.units import human
from moebed.views.layer import HeadView, LayerView
from probes.contract import Probe, ProbeResult
from probes.registry import Settings, make_probes
from probes.running import store
from probes.running.choosing import HEAD_NEEDS
from probes.running.driver import PER_EXPERT, ProbePass, Timing, needs_of
from probes.running.partial import HEAD, KeptLayers, way_to
from probes.running.provenance import Provenance
from probes.running.writing import require_same_model
from probes.saturation import Saturation, joined

WORTH_SAYING = 10**8  # bytes of results


class CheckpointPass:
    """The probes' pass over a checkpoint.

    A layer is kept once it is finished; a layer whose weights cannot be read is left out and the pass goes on. What is
    kept of the same checkpoint, text, types and code is not computed again: a probe of which everything is kept is not
    shown anything, and the others are shown the layers that one of them lacks.

    Args:
        model: The checkpoint.
        names: The probes.
        out: Folder of the results.
        device: Where it is computed.
        fresh: Forget what is kept.
        options: Settings of the probes.
        earlier: Folders where earlier checkpoints were probed by what follows a model over steps, in order.

    Raises:
        UserError: The folder holds the results of another model, its disk has no room for these, or an earlier
            checkpoint was probed on another text.
    """

    def __init__(
        self,
        model: PretrainedMoE,
        names: Sequence[str],
        out: Path,
        device: str = "cpu",
        fresh: bool = False,
        options: Settings | None = None,
        earlier: Sequence[Path] = (),
    ) -> None:
        self.model, self.timing = model, Timing()
        model.scratch = store.results_dir(out)
        self.identity = model.identity
        require_same_model(out, self.identity)
        probes = make_probes(names, options)
        record = {**model.record(), "device": device, "layers": model.layers}
        told = {**_told(probes, options or {}, model), **self._begin(probes, earlier)}
        self.provenance = Provenance(record | ({"options": told} if told else {}))
        self._kept = KeptLayers(out, {name: self.provenance.inputs(name) for name in names}, self.provenance.streams)
        if fresh:
            self._kept.forget()
        layers, end = model.layers, model.config.num_hidden_layers
        self._every_expert = model.text is not None and bool(needs_of(probes) & PER_EXPERT)
        kept = {probe.name: self._kept.load(probe, [*layers, HEAD], self._way) for probe in probes}
        with_head = {probe.name for probe in probes if (probe.needs | probe.wants) & HEAD_NEEDS}
        whole = {name for name in names if set(kept[name]) >= {*layers, *([HEAD] if name in with_head else [])}}
        shown = [probe for probe in probes if probe.name not in whole]
        done: list[int] = [
            place
            for place in [*layers, HEAD]
            if all(place in kept[p.name] for p in shown if place != HEAD or p.name in with_head)
        ]
        for probe in probes:
            for place, arrays in kept[probe.name].items():
                if probe.name in whole or place in done:
                    probe.arrays.update(arrays)
        self.continued = len(done) - (HEAD in done)
        self._require_room(out, shown, done)
        self._pass = ProbePass(probes, self.timing, shown)
        self._with_head = [probe for probe in shown if probe.name in with_head]
        skipped = [end if place == HEAD else place for place in done]
        streams = self._kept.load_streams(self._way)
        asked = {one.name: one for probe in shown for one in probe.interventions(model.config)}
        model.prepare(skipped, needs_of(shown), streams, self._every_expert, list(asked.values()))

    def _begin(self, probes: Sequence[Probe], earlier: Sequence[Path]) -> Settings:
        """Hand over what is known of earlier checkpoints; what stands for it."""
        found = {}
        for probe in probes:
            if not isinstance(probe, Saturation):
                continue
            known = {folder.name: store.load_arrays(folder, probe.name) for folder in earlier}
            for folder, arrays in zip(earlier, known.values(), strict=True):
                text, seen = self.model.text, arrays.get("token_ids")
                if text is None or seen is None or not np.array_equal(seen, text.token_ids.cpu().numpy()):
                    raise UserError(f"{folder} holds what {probe.name} saw of another text; give one that is alike")
            probe.begin(len(known), joined(list(known.values())), self.model.name)
            files = {folder.name: store.arrays_path(folder, probe.name) for folder in earlier}
            found[probe.name] = {"earlier": {n: provenance.content_record(path) for n, path in files.items()}}
        return found

    def _require_room(self, out: Path, shown: Sequence[Probe], done: Collection[int]) -> None:
        """Set ``room``: what the probes will keep, where that is much; refuse a disk that has no room for it.

        What is kept as the pass goes on is written once more with the results, and only then let go.
        """
        text, config = self.model.text, self.model.config
        tokens = int(text.token_mask.sum()) if text is not None else 0
        places = [layer for layer in self.model.layers if layer in config.moe_layers] + [HEAD]

        def stored(probe: Probe, left: Collection[int]) -> int:
            return tokens * sum(probe.token_bytes(config, None if p == HEAD else p) for p in places if p not in left)

        whole = {probe.name: stored(probe, ()) for probe in shown}
        more = sum(stored(probe, done) for probe in shown)
        self.room = ""
        if more:
            largest = max(whole, key=lambda name: whole[name])
            needed = more + sum(whole.values())
            free = require_room(
                out,
                needed,
                "the probes need, until their results are written,",
                f"of {human(sum(whole.values()), 'B')} that they keep {human(whole[largest], 'B')} are of {largest}: "
                "leave it out, give less text, make room or choose another folder",
            )
            if needed >= WORTH_SAYING:
                self.room = (
                    f"{human(sum(whole.values()), 'B')} will be kept, mapped from files in {store.results_dir(out)}, "
                    f"and {human(needed, 'B')} are needed until the results are written; {human(free, 'B')} are free"
                )

    def _way(self, place: int) -> str:
        """How the text comes to a layer, or to the head."""
        return way_to(self.model.layers, place, self._every_expert)

    @property
    def missing(self) -> dict[int, str]:
        """Layers that could not be read or that the text did not pass, and why."""
        stopped = self.model.text_pass.stopped if self.model.text_pass is not None else None
        known = self._pass.missing
        return known if stopped is None or known else {self.model.layers[-1]: str(stopped)}

    def show(self, view: LayerView | HeadView) -> None:
        """Show a layer, or what the model predicts after the last one, to the probes; keep what they stored of it."""
        if isinstance(view, HeadView):
            before = {probe.name: dict(probe.arrays) for probe in self._with_head}
            self._pass.show(view)
            self.model.require_unchanged()
            self._kept.save_head(self._way(HEAD), self._with_head, before)
        else:
            if view.text is not None and self.model.text_pass is not None:
                self.model.require_unchanged()
                self._kept.save_streams(self._way(view.index), self.model.text_pass.streams)
            seen = self._pass.show(view)
            self.model.require_unchanged()
            if seen:
                self._kept.save(view.index, self._way(view.index), self._pass.shown)
        release_freed_memory()  # or the holes of one layer's work add up to those of the next

    def results(self) -> dict[str, ProbeResult]:
        """Each probe's result over the layers that could be read, with a note on each that could not."""
        self.model.close()  # the weights give room to the pictures
        results = self._pass.results()
        if not self.missing:
            self._kept.drop_streams()
        self._kept.drop_others()
        return results

    def finish(self) -> None:
        """After the results are written: nothing is kept twice."""
        self._kept.hand_over()


def _told(probes: Sequence[Probe], options: Settings, model: PretrainedMoE) -> Settings:
    """The settings of probes, and what they will change: a name that reads a file stands for its content."""
    found = {name: dict(given) for name, given in options.items()}
    for probe in probes:
        names = [one.name for one in probe.interventions(model.config)]
        if names:
            found[probe.name] = {**found.get(probe.name, {}), "interventions": names}
    return found
