"""What a pass over a checkpoint has finished, by what it was computed from, so that another pass need not do it again.

<out>/results/.partial/<inputs>/<probe>-<source>/layer_07.npz   keys "<key>/<layer>[/<part>]", and those of no layer
<out>/results/.partial/<inputs>/<probe>-<source>/head.npz       what the probe stored of the model's predictions
<out>/results/.partial/<inputs>/stream.npz                      residual streams of the text, where it is

What is large is not held in memory once it is there: a probe's arrays are then those of the file, read when needed.

``<inputs>`` stands for the model's files, the text and the types, ``<source>`` for the probe's code. The text comes to
a layer by way of those before it: where they are run differs in the last digits, so each file notes its way.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from moebed import storage
from moebed.mapped import mapped_arrays
from moebed.text_pass import Stream
from probes import store
from probes.base import Arrays, Probe, layer_of, layer_tag

_STREAMS = ("model", "reference")
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
        self._inputs, self._streams = inputs, self._root / streams / "stream.npz"
        self._common: dict[str, dict[str, np.ndarray]] = {}  # arrays of no layer that are in some file, by probe

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
                    arrays = {
                        key: large[key] if key in large else file[key]
                        for key in file.files
                        if wanted or layer_of(key) is None
                    }
            except _DAMAGED:
                continue
            common = {key: value for key, value in arrays.items() if layer_of(key) is None}
            own = {key: value for key, value in arrays.items() if layer_of(key) is not None}
            if layer == HEAD:
                own, common = own | (common if wanted else {}), {}
            self._common.setdefault(probe.name, {}).update(common)
            if wanted:
                found[layer] = own
        probe.arrays.update(self._common.get(probe.name, {}))
        return found

    def save(self, layer: int, way: str, probes: Sequence[Probe]) -> None:
        """Keep what the probes stored of a layer, and of none."""
        for probe in probes:
            kept = self._common.setdefault(probe.name, {})
            common = {k: v for k, v in probe.arrays.items() if layer_of(k) is None and kept.get(k) is not v}
            own = {key: value for key, value in probe.arrays.items() if layer_of(key) == layer}
            path = self._folder(probe.name) / f"{layer_tag(layer)}.npz"
            storage.write_arrays(path, common | own, note=way, compressed=False)
            kept.update(common)
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


def way_to(layers: Sequence[int], layer: int, every_expert: bool) -> str:
    """How the text comes to a layer: past which layers' every expert, and past the others' chosen ones alone."""
    return json.dumps([other for other in layers if every_expert and (layer == HEAD or other < layer)])
