"""What was found, as a table on the terminal and as a page of Markdown that can be committed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moebed.check.contract import Finding, Ladder, Step, Verdict
from moebed.check.record import ADVICE, Record
from moebed.machine import storage

PAGE = "check.md"
NAMED = 12  # rows of one reason, on the terminal
MEANING = {
    Verdict.WORKS: "as it should be",
    Verdict.WRONG: "another result than the reference, or an error",
    Verdict.SLOW: "right, but slower than what it is meant to beat, or not ended in its time",
    Verdict.NOT_RUN: "nothing is known",
}


def all_findings(ladder: Ladder, records: Mapping[str, Record]) -> Iterator[tuple[Step, Finding]]:
    """Of every step."""
    for rung in ladder:
        for step in rung:
            yield from ((step, finding) for finding in records[step.name].all_findings())


def show(ladder: Ladder, records: Mapping[str, Record]) -> None:
    """The table: a line a step, and below it what does not work, by its reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="moebed check")
    table.add_column("step", no_wrap=True)
    for verdict in Verdict:
        table.add_column(verdict.value, justify="right")
    table.add_column("what does not work, and why", overflow="fold")
    for rung in ladder:
        for step in rung:
            found = list(records[step.name].all_findings())
            counts = [sum(each.verdict == verdict for each in found) for verdict in Verdict]
            said = "\n".join(escape(line) for line in _by_reason(found))
            table.add_row(step.name, *(str(count or "") for count in counts), said)
    Console(width=max(120, Console().width)).print(table)


def _by_reason(found: list[Finding]) -> Iterator[str]:
    """Lines; rows of one verdict and reason share one."""
    reasons: dict[tuple[Verdict, str], list[str]] = {}
    for finding in found:
        if finding.verdict != Verdict.WORKS:
            reasons.setdefault((finding.verdict, finding.said), []).append(finding.name)
    for (verdict, said), names in reasons.items():
        which = "; ".join(names[:NAMED])
        if len(names) > 1 and len(names) == len(found):
            which = f"all {len(names)} rows"
        elif len(names) > NAMED:
            which += f"; and {len(names) - NAMED} more, in {PAGE}"
        yield f"{verdict}: {said}" if names == ["all"] else f"{verdict}: {which}: {said}"


def write_page(ladder: Ladder, records: Mapping[str, Record], out: Path) -> Path:
    """``check.md``: the machine, and every row with its verdict and its figures."""
    identity: Mapping[str, Any] = next((r.identity for r in records.values() if r.identity), {})
    lines = ["# What `moebed check` found", ""]
    for name in ("gpu", "gpus", "driver", "processor", "cores", "python", "source"):
        if identity.get(name):
            lines.append(f"- {name}: {identity[name]}")
    known = [f"{name} {number}" for name, number in (identity.get("versions") or {}).items() if number]
    lines += [f"- versions: {', '.join(known)}", ""]
    lines += [f"**{verdict}**: {words}." for verdict, words in MEANING.items()]
    for rung in ladder:
        for step in rung:
            record = records[step.name]
            lines += ["", f"## {step.name}: {record.tally()}", "", f"{step.question}{_took(record)}", ""]
            lines += ["| | | | s |", "|---|---|---|---|"]
            lines += [
                f"| {_cell(each.name)} | {each.verdict} | {_cell(each.said)} | {_seconds(each)} |"
                for each in record.all_findings()
            ]
    return storage.write_text(out / PAGE, "\n".join(lines) + "\n", ADVICE)


def _took(record: Record) -> str:
    """What it cost before it measured anything, and then."""
    if not record.start_seconds:
        return ""
    rows = sum(each.seconds for each in record.findings.values())
    return f" {record.start_seconds:.1f} s until its first row began, {rows:.1f} s for the rows that ended."


def _seconds(finding: Finding) -> str:
    return f"{finding.seconds:.2f}" if finding.seconds else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
