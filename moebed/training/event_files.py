"""TensorBoard's event files of a run that goes on from a checkpoint: what came after it is taken out."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from moebed.machine import storage

_HEADER, _FOOTER = struct.Struct("<QI"), 4  # length and its checksum before a record, a checksum after it


def forget_between(folder: Path, begin: float, end: float) -> int:
    """Remove what was logged between two moments: it comes again.

    Args:
        folder: Of the event files.
        begin: Seconds since 1970: when the checkpoint was written.
        end: When the process began that goes on from it; what it logs itself stays.

    Returns:
        How many events went.
    """
    gone = 0
    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = list(_events(path.read_bytes()))
        kept = [record for time, record in events if not begin < time < end]
        if len(kept) < len(events):
            gone += len(events) - len(kept)
            storage.write_bytes(path, b"".join(kept))
    return gone


def _events(content: bytes) -> Iterator[tuple[float, bytes]]:
    """Time of each event, and its record as it stands; one that a kill left unfinished ends the file."""
    from tensorboard.compat.proto.event_pb2 import Event

    at = 0
    while at + _HEADER.size <= len(content):
        length, _ = _HEADER.unpack_from(content, at)
        stop = at + _HEADER.size + length + _FOOTER
        if stop > len(content):
            return
        event = Event.FromString(content[at + _HEADER.size : stop - _FOOTER])
        yield event.wall_time, content[at:stop]
        at = stop
