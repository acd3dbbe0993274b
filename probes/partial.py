"""What a stopped pass over a checkpoint has finished: the arrays of each layer, by what they were computed from.

<out>/results/.partial/<fingerprint>/layer_07.npz     keys "<probe>|<key>/<layer>[/<matrix>]", and those of no layer
<out>/results/.partial/<fingerprint>/stream.npz       residual streams of the text, and the layers that they enter
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moebed import storage
from moebed.text_pass import Stream
from probes import store
from probes.base import Arrays, Probe, layer_tag

_STREAMS = ("model", "reference")


class PartialResults:
    """The finished layers of one combination of checkpoint, arguments and probes.

    Args:
        out: Folder of the results.
        fingerprint: Changes with the checkpoint's files and with the arguments.
        probes: Names of the probes.
    """

    def __init__(self, out: Path, fingerprint: str, probes: Sequence[str]) -> None:
        text = json.dumps([fingerprint, sorted(probes)])
        self.folder = store.results_dir(out) / ".partial" / hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, layers: Sequence[int]) -> dict[int, dict[str, dict[str, np.ndarray]]]:
        """The arrays of those of the layers that are finished: layer -> probe -> arrays. A damaged file is no file."""
        found: dict[int, dict[str, dict[str, np.ndarray]]] = {}
        for layer in layers:
            try:
                with np.load(self.folder / f"{layer_tag(layer)}.npz", allow_pickle=False) as file:
                    arrays: dict[str, dict[str, np.ndarray]] = {}
                    for key in file.files:
                        probe, _, name = key.partition("|")
                        arrays.setdefault(probe, {})[name] = file[key]
            except (ValueError, OSError, EOFError, zipfile.BadZipFile):
                continue
            found[layer] = arrays
        return found

    def save(self, layer: int, probes: Sequence[Probe], everything: bool = False) -> None:
        """Keep what the probes stored of a layer and of none, or everything that they have stored so far."""
        arrays: Arrays = {
            f"{probe.name}|{key}": value
            for probe in probes
            for key, value in probe.arrays.items()
            if everything or key.split("/")[1:2] in ([], [str(layer)])
        }
        storage.write_arrays(self.folder / f"{layer_tag(layer)}.npz", arrays, compressed=False)

    def save_streams(self, streams: Sequence[Stream | None]) -> None:
        """Keep where the text is."""
        arrays: dict[str, np.ndarray] = {}
        for name, stream in zip(_STREAMS, streams, strict=True):
            if stream is not None:
                arrays |= {f"{name}_layer": np.asarray(stream.layer), f"{name}_hidden": stream.hidden.cpu().numpy()}
        storage.write_arrays(self.folder / "stream.npz", arrays, compressed=False)

    def load_streams(self, device: torch.device) -> tuple[Stream | None, Stream | None]:
        """Where the text was; nothing if that is not known. A damaged file is no file."""
        try:
            with np.load(self.folder / "stream.npz", allow_pickle=False) as file:
                found = [
                    Stream(int(file[f"{name}_layer"]), torch.from_numpy(file[f"{name}_hidden"]).to(device))
                    if f"{name}_layer" in file.files
                    else None
                    for name in _STREAMS
                ]
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
            return None, None
        return found[0], found[1]

    def drop_streams(self) -> None:
        """Delete the streams, which are large, once the text is through."""
        (self.folder / "stream.npz").unlink(missing_ok=True)

    def drop_others(self) -> None:
        """Delete what other checkpoints, arguments or probes left; this one is kept, so that it need not run again."""
        for folder in self.folder.parent.iterdir() if self.folder.parent.is_dir() else ():
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)
