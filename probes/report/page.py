"""The report: one HTML file that says what was found in one run, or in several side by side.

It opens without a network: pictures, styles and all are inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.machine import storage
from moebed.machine.precision import COMPUTED_IN
from moebed.machine.templates import render
from probes.contract import Headline
from probes.questions import QUESTIONS, Question
from probes.registry import PROBES
from probes.running import store
from probes.running.published import PUBLISHED, paper_model, published
from probes.running.run_folder import RunFolder, read_run

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


def write_report(
    run_dirs: Sequence[Path], out: Path, first: Mapping[str, Markup] | None = None, kind: str = "Study"
) -> Path:
    """Write the report of one or several runs.

    Args:
        run_dirs: Folders of runs or of probed checkpoints; what each holds is reported.
        out: The file to write, or a folder, in which it becomes ``report.html``.
        first: Title -> HTML of sections that come before those of the runs.
        kind: What those sections are of, in front of each title.

    Returns:
        The file written.

    Raises:
        UserError: A folder is missing, damaged, or holds nothing to report.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    _tell_apart(runs, [Path(folder) for folder in run_dirs])
    path = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    from probes.report.charts import run_colours

    page = render(
        "probes.report/page.html",
        title=", ".join([*(first or {}), *(run.name for run in runs)]),
        first={f"{kind} {title}": content for title, content in (first or {}).items()},
        runs=runs,
        colours=run_colours(runs),
        said=_said(runs),
        notes=_notes(runs),
        questions=[question for question in QUESTIONS if any(_asked(run, question) for run in runs)],
        answers=_answers,
        reasons=lambda run, question: [note for name in _asked(run, question) for note in run.results[name].notes],
        probes={name: probe for name, probe in PROBES.items() if any(name in run.results for run in runs)},
        papers=[found for run in runs if (found := _beside_the_paper(run))[2]],
        numbers=_numbers(runs),
        number=_format,
        drawn=_drawn,
        **_training(runs),
        **_history(runs),
    )
    return storage.write_text(path, page)


def _tell_apart(runs: Sequence[RunFolder], folders: Sequence[Path]) -> None:
    """Runs of one name get their parent's in front, or a number where that does not help."""
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = f"{folder.resolve().parent.name}/{run.name}"
    seen: list[str] = []
    for run in runs:
        seen.append(run.name)
        if seen.count(run.name) > 1:
            run.name = f"{run.name} ({seen.count(run.name)})"


def _said(runs: Sequence[RunFolder]) -> list[str]:
    """What was probed, of each run that says it."""
    said = []
    for run in runs:
        model = run.summary.get("model")
        if isinstance(model, dict):
            said.append(f"{run.name}: checkpoint {model.get('name')}, family {model.get('model_type')}")
        elif "step" in run.summary:
            said.append(f"{run.name}: probed last at step {run.summary['step']}")
    return said


def _notes(runs: Sequence[RunFolder]) -> list[str]:
    notes = [(run.name, note) for run in runs for note in run.summary.get("notes", ())]
    return [f"{name}: {note}" if len(runs) > 1 else note for name, note in notes] + left_out(runs)


def left_out(runs: Sequence[RunFolder]) -> list[str]:
    """A line for each reason for which results that lie in a folder are not reported."""
    lines = []
    for run in runs:
        for why in dict.fromkeys(run.left_out.values()):
            names = ", ".join(name for name, other in run.left_out.items() if other == why)
            lines.append(f"{run.name}: results/ also holds {names}, which are left out: {why}")
    return lines


def _asked(run: RunFolder, question: Question) -> list[str]:
    """The probes of a run that a question is about."""
    names = dict.fromkeys(name.partition("/")[0] for name in question.headlines)
    return [name for name in names if name in run.results]


def _answers(run: RunFolder, question: Question) -> list[Headline]:
    parts = [name.partition("/")[::2] for name in question.headlines]
    found = [run.results[probe].headlines.get(key) for probe, key in parts if probe in run.results]
    return [headline for headline in found if headline is not None]


def _beside_the_paper(run: RunFolder) -> tuple[str, str, list[tuple[str, float, Any]]]:
    """A run, the paper's model that it is of, and what was found and published of it."""
    model = _paper_model(run.summary.get("model"))
    rows = [
        (f"{probe}: {key}", float(headline.value), wanted)
        for probe, result in run.results.items()
        for key, headline in result.headlines.items()
        if (wanted := published(f"{probe}/{key}", model)) is not None
    ]
    return run.name, model or "", rows


def _paper_model(model: Any) -> str | None:
    """The paper's name of what ``summary.json`` says was probed: that name itself, or the config's main settings."""
    if isinstance(model, dict):
        return paper_model(model.get("model_type"), model.get("num_hidden_layers"), model.get("hidden_size"))
    return model if isinstance(model, str) and model in PUBLISHED else None


def _numbers(runs: Sequence[RunFolder]) -> dict[str, list[list[str]]]:
    """Rows of the key numbers by group: what it is, and that of each run."""
    groups: dict[str, list[dict[str, Any]]] = {
        "The run": [run.numbers for run in runs],
        "Last logged": [_last_logged(run) for run in runs],
        "The probes": [
            {f"{n}: {k}": h.value for n, result in run.results.items() for k, h in result.headlines.items()}
            for run in runs
        ],
    }
    tables = {
        group: [
            [str(key), *(_format(numbers.get(key, "")) for numbers in columns)]
            for key in dict.fromkeys(key for numbers in columns for key in numbers)
        ]
        for group, columns in groups.items()
    }
    return {group: rows for group, rows in tables.items() if rows}


def _last_logged(run: RunFolder) -> dict[str, float]:
    from probes.report.charts import FIRST_TAGS

    return {tag: run.curves[tag][1][-1] for tag in FIRST_TAGS if tag in run.curves and tag not in run.numbers}


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def _training(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Pictures of what was logged, by what they show, and what is to be said of them."""
    from probes.report.charts import LOSSES, MOST_PANELS, draw_curves, draw_losses, tags_in_order

    tags, curves = tags_in_order(runs), {}
    if any(tag in run.curves for run in runs for pair in LOSSES.values() for tag in pair):
        curves["loss curves"] = _png(draw_losses(runs))
    if tags:
        curves["curves of the logged scalars"] = _png(draw_curves(runs, tags))
    further = f" {len(tags) - MOST_PANELS} further ones are in TensorBoard only." if len(tags) > MOST_PANELS else ""
    return {"curves": curves, "curves_note": further + _computed_in(runs)}


def _computed_in(runs: Sequence[RunFolder]) -> str:
    """What the losses were computed in, where the runs say it."""
    said = {run.name: run.numbers[COMPUTED_IN] for run in runs if COMPUTED_IN in run.numbers}
    if len(set(said.values())) == 1:
        return f" Computed in {next(iter(said.values()))}."
    return "".join(f" {name}: computed in {how}." for name, how in said.items())


def _history(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Pictures of the headlines, and by layer those of each run that was probed more than once."""
    from probes.report.charts import draw_headlines, draw_history, headline_series, layer_series

    if not any(len(run.history) > 1 for run in runs):
        return {"history": {}}
    columns = 4 if len(runs) == 1 else 2
    series = {run.name: layer_series(run.history) if len(run.history) > 1 else {} for run in runs}
    headlines = headline_series(runs)
    return {
        "headlines_png": _png(draw_headlines(headlines, runs)) if headlines else None,
        "history": {name: _png(draw_history(one, columns)) if one else None for name, one in series.items()},
    }


def _drawn(run: RunFolder, name: str, figure: str, build: Callable[[], Figure]) -> bytes:
    """A probe's picture: the one that lies in the folder, where it is as new as the arrays, or one drawn now."""
    drawn, arrays = store.picture_path(run.folder, name, figure), store.results_dir(run.folder) / f"{name}.npz"
    if drawn.exists() and drawn.stat().st_mtime_ns >= arrays.stat().st_mtime_ns:
        return drawn.read_bytes()
    return _png(build())


def _png(fig: Figure) -> bytes:
    from probes.figures.drawing import to_png

    return to_png(fig)
