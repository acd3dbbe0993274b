"""What is kept of a step: one JSON file, written whenever a row begins or ends, and what it was measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebed.check.contract import Finding, Verdict
from moebed.machine import storage
from moebed.machine.progress import duration

ADVICE = "make room or choose another --out"
NOT_ASKED = "not asked for"
_KEPT = ("under_way", "stopped", "is_broken", "cut", "cut_seconds", "start_seconds")


@dataclass
class Record:
    """A step's record.

    Args:
        path: Its file.
        identity: Machine, versions and source that it holds for.
        names: All rows of the step, once they are known.
        findings: Of the rows that have ended, by name.
        under_way: The row that was begun and has not ended.
        stopped: Why rows are left over, as the last process that measured them was ended.
        is_broken: Whether that is an error: it came to no row at all.
        cut: The row that it was at then; the next process measures it from its beginning.
        cut_seconds: How long it had been at it.
        start_seconds: What its last process took until its first row began.
    """

    path: Path
    identity: Mapping[str, Any]
    names: list[str] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    under_way: str | None = None
    stopped: str = ""
    is_broken: bool = False
    cut: str | None = None
    cut_seconds: float = 0.0
    start_seconds: float = 0.0

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any] | None) -> Record:
        """What is kept; nothing, if that was measured on another machine, or by other code or versions.

        Args:
            path: The file.
            identity: What it must have been measured on; whatever it says, if not given.
        """
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if identity is None or kept["identity"] == json.loads(json.dumps(identity)):
                found = [Finding(**each | {"verdict": Verdict(each["verdict"])}) for each in kept["findings"]]
                by_name = {finding.name: finding for finding in found}
                rest = {name: kept[name] for name in _KEPT}
                return cls(path, kept["identity"], kept["names"], by_name, **rest)
        except (OSError, ValueError, KeyError, TypeError):  # none, or one that no writer of ours left like this
            pass
        return cls(path, identity or {})

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to measure."""
        return bool(self.names) and not self.missing

    @property
    def is_left(self) -> bool:
        """Whether its time was over before all was measured."""
        return bool(self.stopped) and not self.is_broken and not self.is_complete

    @property
    def missing(self) -> Sequence[str]:
        """Rows that have not ended."""
        return [name for name in self.names if name not in self.findings]

    def all_findings(self) -> Iterator[Finding]:
        """Of all rows, in their order; those that were not measured say why."""
        if not self.names or self.is_broken:
            verdict = Verdict.WRONG if self.is_broken else Verdict.NOT_RUN
            yield Finding("all", verdict, self.stopped or NOT_ASKED)
        for name in self.names:
            yield self.findings.get(name, self._not_run(name))

    def _not_run(self, name: str) -> Finding:
        if name == self.cut:
            said = f"had not ended after {duration(self.cut_seconds)}, as {self.stopped}"
            return Finding(name, Verdict.NOT_RUN, said, seconds=self.cut_seconds)
        return Finding(name, Verdict.NOT_RUN, self.stopped or NOT_ASKED)

    def tally(self) -> str:
        """How many rows have each verdict: ``7 works, 1 slow``."""
        found = [each.verdict for each in self.all_findings()]
        return ", ".join(f"{found.count(verdict)} {verdict}" for verdict in Verdict if verdict in found)

    def begin(self, name: str) -> None:
        """A row is about to be measured."""
        self.under_way = name
        self.save()

    def end(self, finding: Finding) -> None:
        """A row has ended."""
        self.findings[finding.name], self.under_way = finding, None
        self.save()

    def stop(self, why: str, is_broken: bool = False, after: float = 0.0) -> None:
        """Its process was ended, and rows are left over; it had been at one of them for so many seconds."""
        self.cut, self.cut_seconds = self.under_way, after
        self.stopped, self.is_broken, self.under_way = why, is_broken, None
        self.save()

    def save(self) -> None:
        """Write the file."""
        content = {
            "identity": dict(self.identity),
            "names": self.names,
            "findings": [plain(asdict(finding)) for finding in self.findings.values()],
            **{name: getattr(self, name) for name in _KEPT},
        }
        storage.write_text(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n", ADVICE)


def plain(value: Any) -> Any:
    """The same as JSON can have it: numbers that are not finite become words."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
