"""What a fitted law leaves for a reader: ``law.json``, pictures, a page, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moebed.laws.findings import Fitted
from moebed.laws.sentences import sentences, tables
from moebed.machine import storage
from moebed.study.files import write_json
from moebed.study.page import html_table
from moebed.study.tables import print_rows

PAGE = "law.html"


def present(out: Path, fitted: Fitted, content: Mapping[str, Any]) -> list[Path]:
    """Write all that is kept of a law, and print it.

    Returns:
        What was written. ``law.json`` is first, so that a folder belongs to it from then on.
    """
    from moebed.laws.figures import draw_all
    from probes.figures.drawing import to_png
    from probes.report.page import write_report

    said = {**content, "sentences": sentences(content)}
    written = [write_json(out / "law.json", said)]
    pictures = {name: to_png(draw()) for name, draw in draw_all(fitted).items()}
    written += [storage.write_bytes(out / "figures" / f"{name}.png", png) for name, png in pictures.items()]
    title = f"{content['form']} of {content['table']['name']}"
    written.append(write_report([], out / PAGE, {title: section(said, pictures)}, kind="Scaling law"))
    print_law(said)
    return written


def section(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """A law as a piece of HTML."""
    from probes.report.page import embedded

    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in content["sentences"])
    parts = [f'<p class="muted">{escape(_about(content))}</p>', f'<ul class="found">{said}</ul>']
    notes = "".join(f"<li>{escape(note)}</li>" for note in content["table"]["notes"])
    parts += [f"<ul>{notes}</ul>"] if notes else []
    parts += [embedded(png, name) for name, png in pictures.items()]
    for table in tables(content):
        parts.append(f"<h3>{escape(table.title)}</h3>{html_table(table.columns, table.rows)}")
        parts += [f'<p class="muted">{escape(table.note)}</p>'] if table.note else []
    return "".join(parts)


def print_law(content: Mapping[str, Any]) -> None:
    """Tables, notes and sentences on standard output."""
    for table in tables(content):
        print_rows(table.title, table.columns, table.rows)
        if table.note:
            print(table.note + "\n")
    for line in [*content["table"]["notes"], *content["sentences"]]:
        print(line)


def _about(content: Mapping[str, Any]) -> str:
    ranges = ", ".join(
        f"{name} {low:.4g}" + (f" to {high:.4g}" if high != low else "")
        for name, (low, high) in content["table"]["ranges"].items()
    )
    size = f" N: {content['N']}." if content["N"] else ""
    return f"{content['formula']} ({content['source']}), {content['table']['runs']} runs: {ranges}.{size}"
