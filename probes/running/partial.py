"""What a pass over a checkpoint has finished, by what it was computed from, so that another pass need not do it again.

<out>/results/.partial/<inputs>/<probe>-<source>/layer_07.npz   keys "<key>/<layer>[/<part>]", and those of no layer
<out>/results/.partial/<inputs>/<probe>-<source>/head.npz       what the probe stored of the model's predictions
<out>/results/.partial/<inputs>/stream.npz                      residual streams of the text, where it is

What is large is not held in memory once it is there: a probe's arrays are then those of the file, read when needed. Nor
is it kept twice: once the results are written, ``results/<probe>.npz`` alone has what is in both, and the file here the
checksums.

``<inputs>`` stands for the model's files, the text and the types, ``<source>`` for the probe's code. The text comes to
a layer by way of those before it: where they are run differs in the last digits, so each file notes its way.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from moebed.machine import storage
from moebed.machine.mapped import checksums, mapped_arrays
from moebed.machine.tags import layer_tag
from moebed.views.text_pass import Stream
from probes.contract import ArrayName, Arrays, Probe
from probes.running import store

_STREAMS = ("model", "reference")
_ELSEWHERE = "in_results"  # all names in order, and the checksums of what lies in the results, as JSON
HEAD = -1  # in place of a layer: what comes after the last one
_DAMAGED = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile)


class KeptLayers:
    """The finished layers of the probes on one combination of checkpoint, text and types.

    Args:
        out: Folder of the results.
        inputs: What stands for all that decides what a layer shows to a probe, and for the probe's code, by its name.
        streams: What stands for all that decides the way of the text.
    """

    def __init__(self, out: Path, inputs: Mapping[str, tuple[str, str]], streams: str) -> None:
        self._root = store.results_dir(out) / ".partial"
        self._out, self._inputs, self._streams = out, inputs, self._root / streams / "stream.npz"
        self._common: dict[str, dict[str, np.ndarray]] = {}  # arrays of no layer that are in some file, by probe
        self._holder: dict[str, dict[str, int]] = {}  # the layer whose file that is

    def _folder(self, probe: str) -> Path:
        inputs, source = self._inputs[probe]
        return self._root / inputs / f"{probe}-{source}"

    def load(self, probe: Probe, layers: Collection[int], way: Callable[[int], str]) -> dict[int, Arrays]:
        """A probe's arrays of those layers that are finished, by layer; a damaged file is no file.

        Args:
            probe: The probe; it is given the arrays of no layer.
            layers: Those that are asked for; ``HEAD`` among them, where it may be.
            way: How the text comes to a layer now.
        """
        found: dict[int, Arrays] = {}
        folder = self._folder(probe.name)
        for path in sorted(folder.glob("*.npz")):
            layer = HEAD if path.stem == "head" else int(path.stem.partition("_")[2])
            wanted = layer in layers and storage.read_note(path) == way(layer)
            try:
                large = mapped_arrays(path, check=True) if wanted else {}
                with np.load(path, allow_pickle=False) as file:
                    names, elsewhere = _names(file)
                    if wanted and elsewhere:
                        large |= self._in_results(probe.name, elsewhere)
                    arrays = {
                        key: large[key] if key in large else file[key]
                        for key in names
                        if wanted or (ArrayName.of(key).layer is None and key not in elsewhere)
                    }
            except _DAMAGED:
                continue
            common = {key: value for key, value in arrays.items() if ArrayName.of(key).layer is None}
            own = {key: value for key, value in arrays.items() if ArrayName.of(key).layer is not None}
            if layer == HEAD:
                own, common = own | (common if wanted else {}), {}
            self._common.setdefault(probe.name, {}).update(common)
            self._holder.setdefault(probe.name, {}).update(dict.fromkeys(common, layer))
            if wanted:
                found[layer] = own
        probe.arrays.update(self._common.get(probe.name, {}))
        return found

    def _in_results(self, probe: str, wanted: Mapping[str, int]) -> Arrays:
        """Arrays that lie in the results; KeyError if others are there now."""
        path = store.arrays_path(self._out, probe)
        there = checksums(path)
        if any(there[name] != checksum for name, checksum in wanted.items()):
            raise KeyError(f"{path} holds other arrays")
        return mapped_arrays(path, check=True, only=wanted.keys())

    def hand_over(self) -> None:
        """After the results are written: let them alone have what is large and in both, if the disk takes it."""
        for probe in self._inputs:
            there = checksums(store.arrays_path(self._out, probe))
            for path in sorted(self._folder(probe).glob("*.npz")):
                with suppress(*_DAMAGED, storage.NotWritten):
                    _leave_out(path, there)

    def save(self, layer: int, way: str, probes: Sequence[Probe]) -> None:
        """Keep what the probes stored of a layer, and of none."""
        for probe in probes:
            kept, holder = self._common.setdefault(probe.name, {}), self._holder.setdefault(probe.name, {})
            common = {
                key: value
                for key, value in probe.arrays.items()
                if ArrayName.of(key).layer is None and (kept.get(key) is not value or holder[key] == layer)
            }
            own = {key: value for key, value in probe.arrays.items() if ArrayName.of(key).layer == layer}
            path = self._folder(probe.name) / f"{layer_tag(layer)}.npz"
            storage.write_arrays(path, common | own, note=way, compressed=False)
            kept.update(common)
            holder.update(dict.fromkeys(common, layer))
            probe.arrays.update({key: value for key, value in mapped_arrays(path).items() if key in own})

    def save_head(self, way: str, probes: Sequence[Probe], before: Mapping[str, Arrays]) -> None:
        """Keep what the probes stored of the model's predictions: all that was not there before, by probe."""
        for probe in probes:
            known = before[probe.name]
            new = {key: value for key, value in probe.arrays.items() if known.get(key) is not value}
            path = self._folder(probe.name) / "head.npz"
            storage.write_arrays(path, new, note=way, compressed=False)
            probe.arrays.update(mapped_arrays(path))

    def save_streams(self, way: str, streams: Sequence[Stream | None]) -> None:
        """Keep where the text is."""
        arrays: dict[str, np.ndarray] = {}
        for name, stream in zip(_STREAMS, streams, strict=True):
            if stream is not None:
                arrays |= {f"{name}_layer": np.asarray(stream.layer), f"{name}_hidden": stream.hidden.cpu().numpy()}
        storage.write_arrays(self._streams, arrays, note=way, compressed=False)

    def load_streams(self, way: Callable[[int], str]) -> tuple[Stream | None, Stream | None]:
        """Where the text was; nothing if that is not known, or if it came another way. A damaged file is no file."""
        try:
            with np.load(self._streams, allow_pickle=False) as file:
                found = [
                    Stream(int(file[f"{name}_layer"]), torch.from_numpy(file[f"{name}_hidden"]))
                    if f"{name}_layer" in file.files
                    else None
                    for name in _STREAMS
                ]
        except _DAMAGED:
            return None, None
        if found[0] is None or way(found[0].layer) != storage.read_note(self._streams):
            return None, None
        return found[0], found[1]

    def drop_streams(self) -> None:
        """Delete the streams, which are large, once the text is through."""
        storage.remove(self._streams)

    def drop_others(self) -> None:
        """Delete what other checkpoints, texts, or versions of the probes left; this is kept for the next time."""
        inputs = {self._streams.parent.name, *(inputs for inputs, _ in self._inputs.values())}
        mine = {self._folder(name) for name in self._inputs}
        for folder in self._root.iterdir() if self._root.is_dir() else ():
            if folder.name not in inputs:
                storage.remove(folder)
                continue
            for other in folder.iterdir():
                if other.name.rpartition("-")[0] in self._inputs and other not in mine:
                    storage.remove(other)

    def forget(self) -> None:
        """Delete everything: all is computed anew."""
        storage.remove(self._root)


def _names(file: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, int]]:
    """All arrays that a file is to hold, in order, and the checksums of those that the results have instead."""
    if _ELSEWHERE not in file:
        return list(file), {}
    content = json.loads(str(file[_ELSEWHERE]))
    return content["names"], content["checksums"]


def _leave_out(path: Path, there: Mapping[str, int]) -> None:
    """Rewrite a file without the large arrays, of its layer or of the head, that the results have: their checksums."""
    is_head = path.stem == "head"
    both = {
        name: checksum
        for name, checksum in checksums(path).items()
        if there.get(name) == checksum and (is_head or ArrayName.of(name).layer is not None)
    }
    if not both:
        return
    large = mapped_arrays(path)
    with np.load(path, allow_pickle=False) as file:
        names, elsewhere = _names(file)
        both |= elsewhere
        rest = {name: large[name] if name in large else file[name] for name in names if name not in both}
    rest[_ELSEWHERE] = np.asarray(json.dumps({"names": names, "checksums": both}))
    storage.write_arrays(path, rest, note=storage.read_note(path), compressed=False)


def way_to(layers: Sequence[int], layer: int, every_expert: bool) -> str:
    """How the text comes to a layer: past which layers' every expert, and past the others' chosen ones alone."""
    return json.dumps([other for other in layers if every_expert and (layer == HEAD or other < layer)])
