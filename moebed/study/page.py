"""What a study leaves for a reader, all from its ``study.json``: Markdown, pictures, and sections of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moebed.machine import storage
from moebed.machine.templates import render
from moebed.study.comparison import Comparison, compare_arms, power
from moebed.study.files import STUDY_FILE, load_study
from moebed.study.hparams import write_hparams
from moebed.study.tables import (
    COLUMNS,
    DOMAIN_NOTE,
    GAIN_NOTE,
    NOTE,
    STEP_NOTE,
    arm_rows,
    domain_rows,
    gain_rows,
    headline_note,
    headline_rows,
    markdown,
    print_table,
    step_rows,
    verdicts,
)

if TYPE_CHECKING:
    from markupsafe import Markup


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study's result."""
    return (folder / STUDY_FILE).is_file()


def present(folder: Path) -> list[Path]:
    """Write ``study.md``, ``figures/``, ``report.html`` and ``hparams/`` beside a study.json, and print the table.

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
    return [text, *written, report, write_hparams(found.study, folder)]


def sections(folders: Sequence[Path]) -> dict[str, Markup]:
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


def section(folder: Path, found: Comparison, pictures: dict[str, bytes]) -> Markup:
    """A study as a piece of HTML."""
    study, (columns, steps) = found.study, step_rows(found)
    arms = study["arms"]
    return render(
        "moebed.study/section.html",
        found=found,
        study=study,
        tokens=f"{arms[found.baseline]['tokens']:,}",
        verdicts=verdicts(found),
        arms=(COLUMNS, arm_rows(found)),
        arms_note=NOTE,
        power=power(found),
        marks=[f"{arm.name}: {mark}" for arm in found.arms.values() for mark in arm.marks],
        pictures=pictures,
        tables=[
            ("What routing gains", *gain_rows(found), GAIN_NOTE),
            ("Over training", columns, steps, STEP_NOTE),
            ("By domain", ("arm", *found.domains), found.domains and domain_rows(found), DOMAIN_NOTE),
            ("Probes", ("headline at the last step", *found.arms), headline_rows(found), headline_note(found)),
        ],
        # Each run's own report, where there is one; links hold as long as the page lies in the study's folder.
        runs={
            name: [
                (seed, run["folder"], (folder / run["folder"] / "report.html").is_file())
                for seed, run in arm["runs"].items()
            ]
            for name, arm in arms.items()
        },
    )
