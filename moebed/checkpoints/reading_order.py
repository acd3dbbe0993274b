"""In which order a walk reads a checkpoint, and what must be in memory together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from moebed.checkpoints.pool import Piece

Steps = Mapping[Hashable, Sequence[Piece]]


class ReadingPlan:
    """Groups of pieces, each of which is in memory at a time; named by layer and step.

    Args:
        limit: Bytes that are held at most.
    """

    def __init__(self, limit: int) -> None:
        self.groups: list[list[Piece]] = []
        self._limit = limit
        self._group: dict[tuple[int, Hashable], int] = {}

    def add(self, layer: int, *phases: Steps) -> None:
        """Plan a layer whose steps need these pieces.

        Phases may need the same pieces. Where everything fits, it is one group, so that nothing is read twice;
        otherwise each step is a group of its own.
        """
        phases = tuple(steps for steps in phases if any(steps.values()))
        together = _distinct(piece for steps in phases for pieces in steps.values() for piece in pieces)
        if len(phases) > 1 and sum(piece.num_bytes for piece in together) <= self._limit:
            self._group |= {(layer, name): len(self.groups) for steps in phases for name in steps}
            self.groups.append(together)
            return
        for steps in phases:
            for name, pieces in steps.items():
                self._group[layer, name] = len(self.groups)
                self.groups.append(_distinct(pieces))

    def has(self, layer: int, step: Hashable) -> bool:
        """Whether a layer's step is planned."""
        return (layer, step) in self._group

    def group(self, layer: int, step: Hashable) -> int:
        """Index of the group that a layer's step needs."""
        return self._group[layer, step]


def _distinct(pieces: Iterable[Piece]) -> list[Piece]:
    return list(dict.fromkeys(pieces))
