"""What a study leaves for a reader, all from its ``study.json``: Markdown, pictures, and sections of a report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moebed.machine import storage
from moebed.study.comparison import Comparison, compare_arms, power
from moebed.study.files import STUDY_FILE, load_study
from moebed.study.tables import (
    COLUMNS,
    DOMAIN_NOTE,
    NOTE,
    STEP_NOTE,
    arm_rows,
    domain_rows,
    headline_note,
    headline_rows,
    markdown,
    print_table,
    step_rows,
    verdicts,
)


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study's result."""
    return (folder / STUDY_FILE).is_file()


def present(folder: Path) -> list[Path]:
    """Write ``study.md``, ``figures/`` and ``report.html`` beside a study.json, and print the table.

    Returns:
        What was written.

    Raises:
        UserError: The study.json is missing or damaged.
    """
    from moebed.study.figures import draw_all
    from probes.figures.drawing import to_png
    from probes.report.page import write_report

    found = compare_arms(load_study(folder / STUDY_FILE))
    written, pictures = [], {}
    for name, draw in draw_all(found).items():
        pictures[name] = to_png(draw())
        written.append(storage.write_bytes(folder / "figures" / f"{name}.png", pictures[name]))
    names = [f"figures/{path.name}" for path in written]
    text = storage.write_text(folder / "study.md", markdown(found, names))
    report = write_report([], folder / "report.html", {found.study["name"]: section(folder, found, pictures)})
    print_table(found)
    return [text, *written, report]


def sections(folders: Sequence[Path]) -> dict[str, str]:
    """Sections of a report, by title, one a study; pictures are drawn now."""
    from moebed.study.figures import draw_all
    from probes.figures.drawing import to_png

    content = {}
    for folder in folders:
        found = compare_arms(load_study(folder / STUDY_FILE))
        pictures = {name: to_png(draw()) for name, draw in draw_all(found).items()}
        name = found.study["name"]
        content[name if name not in content else str(folder)] = section(folder, found, pictures)
    return content


def section(folder: Path, found: Comparison, pictures: dict[str, bytes]) -> str:
    """A study as a piece of HTML."""
    from probes.report.page import embedded

    study = found.study
    seeds = ", ".join(map(str, study["seeds"]))
    tokens = study["arms"][found.baseline]["tokens"]
    parts = [f"<p>{escape(study['question'])}</p>"] if study["question"] else []
    parts.append(f'<p class="muted">{len(found.arms)} arms, seeds {seeds}, {tokens:,} training tokens a run.</p>')
    parts += [f"<p><strong>{escape(warning)}</strong></p>" for warning in found.warnings]
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdicts(found))
    parts.append(f'<ul class="found">{said}</ul>')
    parts.append(html_table(COLUMNS, arm_rows(found)))
    parts.append(f'<p class="muted">{escape(NOTE)}</p>')
    parts += [f'<p class="muted">{escape(sentence)}</p>'] if (sentence := power(found)) else []
    marks = [f"<li>{escape(arm.name)}: {escape(mark)}</li>" for arm in found.arms.values() for mark in arm.marks]
    parts += [f"<ul>{''.join(marks)}</ul>"] if marks else []
    parts += [embedded(png, name) for name, png in pictures.items()]
    columns, steps = step_rows(found)
    if steps:
        parts.append(f'<h3>Over training</h3>{html_table(columns, steps)}<p class="muted">{escape(STEP_NOTE)}</p>')
    if found.domains:
        rows = html_table(("arm", *found.domains), domain_rows(found))
        parts.append(f'<h3>By domain</h3>{rows}<p class="muted">{escape(DOMAIN_NOTE)}</p>')
    if found.headlines:
        rows = html_table(("headline at the last step", *found.arms), headline_rows(found))
        parts.append(f'<h3>Probes</h3>{rows}<p class="muted">{escape(headline_note(found))}</p>')
    arms = [[arm.name, arm.settings, _links(folder, found, arm.name)] for arm in found.arms.values()]
    parts.append("<h3>Arms</h3>" + html_table(("arm", "is", "its runs"), arms, raw=2, numbers=False))
    return "".join(parts)


def _links(folder: Path, found: Comparison, arm: str) -> str:
    """Each run's own report, where there is one; links hold as long as the page lies in the study's folder."""
    cells = []
    for seed, run in found.study["arms"][arm]["runs"].items():
        there = (folder / run["folder"] / "report.html").is_file()
        name = f"seed {escape(seed)}"
        cells.append(f'<a href="{escape(run["folder"])}/report.html">{name}</a>' if there else name)
    return ", ".join(cells)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], raw: int = -1, numbers: bool = True) -> str:
    """Rows as HTML; the cells of column ``raw`` are HTML already, columns but the first numbers unless said."""
    form = ' class="number"' if numbers else ""
    head = "".join(f"<th{form if index else ''}>{escape(column)}</th>" for index, column in enumerate(columns))
    lines = [
        "<tr>"
        + "".join(
            f"<td{form if index else ''}>{cell if index == raw else escape(cell)}</td>"
            for index, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    return f'<div style="overflow-x:auto"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
