"""What a fitted law leaves for a reader: ``law.json``, pictures, a page, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.laws.findings import Fitted
from moebed.laws.sentences import sentences, tables
from moebed.machine import storage
from moebed.machine.templates import render
from moebed.study.files import write_json
from moebed.study.tables import print_rows

if TYPE_CHECKING:
    from markupsafe import Markup

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


def section(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Markup:
    """A law as a piece of HTML."""
    return render(
        "moebed.laws/section.html",
        about=_about(content),
        sentences=content["sentences"],
        notes=content["table"]["notes"],
        pictures=pictures,
        tables=tables(content),
    )


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
