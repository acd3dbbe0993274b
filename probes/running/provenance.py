"""What each probe's numbers were made from, kept beside them: results are put together only where it matches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebed.machine import provenance, storage
from moebed.views.layer import Need
from probes.registry import PROBES

_MOST_NOTE = 60_000  # bytes; an archive's comment holds no more than 65,535


@dataclass(frozen=True)
class Provenance:
    """What one probing looked at.

    Args:
        record: Plain data: the model's files and settings, the text, the types, the layers, moebed's version and code.
            Keys of ``text`` do not count for probes that look at weights alone. ``options`` are the probes' settings,
            of which each probe's own count for it.
    """

    record: Mapping[str, Any]

    def _of(self, name: str) -> dict[str, Any]:
        told = self.record.get("options", {}).get(name)
        rest = {key: value for key, value in self.record.items() if key != "text" or not weights_alone(name)}
        return _without_options(rest) | ({"options": told} if told else {})

    def inputs(self, name: str) -> tuple[str, str]:
        """What stands for all that decides what a layer shows to a probe, whichever layers are asked for, and for it.

        Raises:
            KeyError: There is no such probe.
        """
        return _without_layers(self._of(name)), source_of(name)

    @property
    def streams(self) -> str:
        """What stands for all that decides the way of the text."""
        return _without_layers(_without_options(self.record))

    def fingerprint(self, name: str) -> str:
        """What stands for all that a probe looked at: what is put together must have been made from the same."""
        return provenance.fingerprint(self._of(name))


def _without_options(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "options"}


def _without_layers(record: Mapping[str, Any]) -> str:
    return provenance.fingerprint({key: value for key, value in record.items() if key != "layers"})


def weights_alone(name: str) -> bool:
    """Whether a probe's numbers do not depend on a text."""
    probe = PROBES[name]
    return probe.needs <= {Need.WEIGHTS} and all(map(weights_alone, (*probe.sources, *probe.optional_sources)))


def source_of(name: str) -> str:
    """Stands for a probe's code, and for that of those it takes its numbers from."""
    probe = PROBES[name]
    return provenance.fingerprint([provenance.source_of(probe), *map(source_of, probe.sources)])


def note_of(made_from: Provenance, name: str, notes: Sequence[str]) -> str:
    """What is written into a probe's file of arrays: what it was made from, and what was left out."""
    notes = list(notes)
    while True:
        content = {"fingerprint": made_from.fingerprint(name), "source": source_of(name), "notes": notes}
        note = json.dumps(content | {"moebed": provenance.moebed_version()})
        if len(note.encode()) <= _MOST_NOTE:
            return note
        notes = [*notes[: len(notes) // 2], "and more"]


def read_note(path: Path) -> dict[str, Any]:
    """What was written into a file of arrays; empty where nothing was."""
    try:
        found = json.loads(storage.read_note(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
