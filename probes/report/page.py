"""The report: one HTML file that says what was found in one run, or in several side by side.

It opens without a network: pictures, styles and all are inside.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.machine import storage
from moebed.machine.precision import COMPUTED_IN
from probes.contract import Headline
from probes.registry import PROBES
from probes.report.answers import QUESTIONS
from probes.running import store
from probes.running.published import PUBLISHED, paper_model, published
from probes.running.run_folder import RunFolder, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { --ink: #1f2933; --muted: #6b7785; --line: #dde3ea; --soft: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1300px; margin: 0 auto; padding: 28px 28px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 38px 0 10px; }
h3 { font-size: 15px; margin: 16px 0 6px; }
.muted { color: var(--muted); font-size: 13px; }
.runs { display: grid; gap: 22px; overflow-x: auto; }
.name { font-weight: 600; padding-left: 9px; border-left: 5px solid; margin: 0 0 8px; }
.found { list-style: none; margin: 0; padding: 0; }
.found li { background: var(--soft); border-radius: 6px; padding: 9px 13px; margin: 0 0 7px; }
.found b { display: block; font-size: 12px; color: var(--muted); font-weight: 600; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-left: 18px; padding-right: 0; }
.numbers { display: flex; flex-wrap: wrap; gap: 24px 56px; align-items: flex-start; }
img { max-width: 100%; height: auto; display: block; margin: 6px 0 14px; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 10px; padding: 0 16px; }
details[open] { padding-bottom: 14px; }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; }
details.section { border: 0; padding: 0; margin: 26px 0 0; }
details.section > summary { padding: 0; } details.section > summary h2 { display: inline-block; margin: 6px 0 10px; }
summary span { font-weight: 400; color: var(--muted); }
pre { background: var(--soft); padding: 12px; overflow-x: auto; font-size: 12.5px; border-radius: 6px; }
"""


def write_report(
    run_dirs: Sequence[Path], out: Path, first: Mapping[str, str] | None = None, kind: str = "Study"
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
    sections = {
        **{f"{kind} {escape(title)}": content for title, content in (first or {}).items()},
        "What was found": _answers(runs),
        "Every probe in a sentence": _found(runs),
        "Beside the papers": _beside_the_paper(runs),
        "Key numbers": _numbers(runs),
        "Training": _training(runs),
        "The probes over steps": _history(runs),
        "The probes in pictures": _probes(runs),
        "Configuration": _configs(runs),
    }
    header = [_header(runs)] if runs else []
    body = "\n".join([*header, *(_section(title, content) for title, content in sections.items() if content)])
    title = escape(", ".join([*(first or {}), *(run.name for run in runs)]))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>moebed: {title}</title>'
        f"<style>{_STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
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


def _header(runs: Sequence[RunFolder]) -> str:
    names = " · ".join(escape(run.name) for run in runs)
    said = []
    for run in runs:
        model = run.summary.get("model")
        if isinstance(model, dict):
            said.append(f"{run.name}: checkpoint {model.get('name')}, family {model.get('model_type')}")
        elif "step" in run.summary:
            said.append(f"{run.name}: probed last at step {run.summary['step']}")
    notes = [(run.name, note) for run in runs for note in run.summary.get("notes", ())]
    lines = [f"{name}: {note}" if len(runs) > 1 else note for name, note in notes] + left_out(runs)
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    listed = f'<ul class="muted">{listed}</ul>' if listed else ""
    return f'<h1>{names}</h1><p class="muted">moebed report. {escape("; ".join(said))}</p>{listed}'


def left_out(runs: Sequence[RunFolder]) -> list[str]:
    """A line for each reason for which results that lie in a folder are not reported."""
    lines = []
    for run in runs:
        for why in dict.fromkeys(run.left_out.values()):
            names = ", ".join(name for name, other in run.left_out.items() if other == why)
            lines.append(f"{run.name}: results/ also holds {names}, which are left out: {why}")
    return lines


def _section(title: str, content: str) -> str:
    """A part of the report that a person can fold away."""
    return f'<details class="section" open><summary><h2>{title}</h2></summary>{content}</details>'


def _answers(runs: Sequence[RunFolder]) -> str:
    """The questions that the runs can answer, each with its numbers, and what was published."""
    parts = []
    for question in QUESTIONS:
        probes = list(dict.fromkeys(name.partition("/")[0] for name in question.headlines))
        if not any(name in run.results for run in runs for name in probes):
            continue

        def cell(run: RunFolder, names: Sequence[str] = question.headlines, probes: Sequence[str] = probes) -> str:
            found = [headline for name in names if (headline := _headline(run, name)) is not None]
            items = [f"<li><b>{_with_interval(headline)}</b>{escape(headline.sentence)}</li>" for headline in found]
            if items:
                return f'<ul class="found">{"".join(items)}</ul>'
            notes = [note for name in probes if name in run.results for note in run.results[name].notes]
            return f'<p class="muted">{escape("; ".join(notes) or "Not probed.")}</p>'

        paper = f'<p class="muted">Published: {escape(question.paper)}</p>'
        parts.append(f"<h3>{escape(question.text)}</h3>{_columns(runs, cell)}{paper}")
    return "".join(parts)


def _headline(run: RunFolder, name: str) -> Headline | None:
    probe, _, key = name.partition("/")
    return run.results[probe].headlines.get(key) if probe in run.results else None


def _with_interval(headline: Headline) -> str:
    value = _format(float(headline.value))
    if headline.interval is None:
        return value
    low, high = (_format(float(bound)) for bound in headline.interval)
    return f"{value} &nbsp;[{low}, {high}]"


def _columns(runs: Sequence[RunFolder], cell: Callable[[RunFolder], str]) -> str:
    """The runs side by side; one alone takes the whole width and needs no name."""
    if len(runs) == 1:
        return cell(runs[0])
    from probes.report.charts import run_colours

    colours = run_colours(runs)
    cells = [
        f'<div><p class="name" style="border-color:{colours[run.name]}">{escape(run.name)}</p>{cell(run)}</div>'
        for run in runs
    ]
    return (
        f'<div class="runs" style="grid-template-columns:repeat({len(runs)},minmax(520px,1fr))">{"".join(cells)}</div>'
    )


def _found(runs: Sequence[RunFolder]) -> str:
    if not any(run.results for run in runs):
        return ""

    def cell(run: RunFolder) -> str:
        items = []
        for name, result in run.results.items():
            sentences = [headline.sentence for headline in result.headlines.values()] or result.notes
            said = "<br>".join(escape(sentence) for sentence in sentences)
            items.append(f"<li><b>{escape(PROBES[name].question)}</b>{said}</li>")
        return f'<ul class="found">{"".join(items)}</ul>'

    return _columns(runs, cell)


def _beside_the_paper(runs: Sequence[RunFolder]) -> str:
    """What was found in the paper's own models, and what the paper says of it."""
    tables = []
    for run in runs:
        model, rows = _paper_model(run.summary.get("model")), []
        for probe, result in run.results.items():
            for key, headline in result.headlines.items():
                wanted = published(f"{probe}/{key}", model)
                if wanted is not None:
                    found = f'<td class="number">{_format(float(headline.value))}</td>'
                    paper = (
                        f'<td class="number">{escape(wanted.text)}</td><td class="muted">{escape(wanted.source)}</td>'
                    )
                    rows.append(f"<tr><td>{escape(f'{probe}: {key}')}</td>{found}{paper}</tr>")
        if rows:
            head = f'<th class="number">{escape(run.name)}</th><th class="number">published</th><th>where</th>'
            tables.append(f"<table><tr><th>{escape(model or '')}</th>{head}</tr>{''.join(rows)}</table>")
    if not tables:
        return ""
    return f'<div class="numbers">{"".join(tables)}</div>'


def _paper_model(model: Any) -> str | None:
    """The paper's name of what ``summary.json`` says was probed: that name itself, or the config's main settings."""
    if isinstance(model, dict):
        return paper_model(model.get("model_type"), model.get("num_hidden_layers"), model.get("hidden_size"))
    return model if isinstance(model, str) and model in PUBLISHED else None


def _numbers(runs: Sequence[RunFolder]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {
        "The run": [run.numbers for run in runs],
        "Last logged": [_last_logged(run) for run in runs],
        "The probes": [
            {f"{n}: {k}": h.value for n, result in run.results.items() for k, h in result.headlines.items()}
            for run in runs
        ],
    }
    head = "".join(f'<th class="number">{escape(run.name)}</th>' for run in runs)
    tables = []
    for group, columns in groups.items():
        rows = []
        for key in dict.fromkeys(key for numbers in columns for key in numbers):
            cells = "".join(f'<td class="number">{_format(numbers.get(key, ""))}</td>' for numbers in columns)
            rows.append(f"<tr><td>{escape(str(key))}</td>{cells}</tr>")
        if rows:
            tables.append(f"<table><tr><th>{group}</th>{head}</tr>{''.join(rows)}</table>")
    return f'<div class="numbers">{"".join(tables)}</div>' if tables else ""


def _last_logged(run: RunFolder) -> dict[str, float]:
    from probes.report.charts import FIRST_TAGS

    return {tag: run.curves[tag][1][-1] for tag in FIRST_TAGS if tag in run.curves and tag not in run.numbers}


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return escape("–" if value is None else str(value))
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return escape(str(value))


def _training(runs: Sequence[RunFolder]) -> str:
    from probes.report.charts import LOSSES, MOST_PANELS, draw_curves, draw_losses, tags_in_order

    tags = tags_in_order(runs)
    losses = any(tag in run.curves for run in runs for pair in LOSSES.values() for tag in pair)
    if not tags and not losses:
        return ""
    left_out = f" {len(tags) - MOST_PANELS} further ones are in TensorBoard only." if len(tags) > MOST_PANELS else ""
    note = f"Over optimizer steps. Long curves are smoothed, raw values behind them.{left_out}{_computed_in(runs)}"
    note = f'<p class="muted">{escape(note)}</p>'
    pictures = [_image(draw_losses(runs), "loss curves")] if losses else []
    pictures += [_image(draw_curves(runs, tags), "curves of the logged scalars")] if tags else []
    return note + "".join(pictures)


def _computed_in(runs: Sequence[RunFolder]) -> str:
    """What the losses were computed in, where the runs say it."""
    said = {run.name: run.numbers[COMPUTED_IN] for run in runs if COMPUTED_IN in run.numbers}
    if len(set(said.values())) == 1:
        return f" Computed in {next(iter(said.values()))}."
    return "".join(f" {name}: computed in {how}." for name, how in said.items())


def _history(runs: Sequence[RunFolder]) -> str:
    from probes.report.charts import draw_headlines, draw_history, headline_series, layer_series

    if not any(len(run.history) > 1 for run in runs):
        return ""

    def cell(run: RunFolder) -> str:
        series = layer_series(run.history)
        if len(run.history) < 2 or not series:
            return '<p class="muted">Probed once: see the pictures below.</p>'
        return _image(draw_history(series, 4 if len(runs) == 1 else 2), "probes over steps")

    headlines = headline_series(runs)
    first = f"<h3>Headlines</h3>{_image(draw_headlines(headlines, runs), 'headlines over steps')}" if headlines else ""
    return f"{first}<h3>By layer</h3>{_columns(runs, cell)}"


def _probes(runs: Sequence[RunFolder]) -> str:
    def cell_of(name: str) -> Callable[[RunFolder], str]:
        def cell(run: RunFolder) -> str:
            if name not in run.results:
                return '<p class="muted">Not probed.</p>'
            result = run.results[name]
            said = [f"<p>{escape(headline.sentence)}</p>" for headline in result.headlines.values()]
            said += [f'<p class="muted">{escape(note)}</p>' for note in result.notes]
            pictures = [_picture(run, name, figure, build) for figure, build in result.figures.items()]
            return "".join(said + pictures + [write() for write in result.pages.values()])

        return cell

    parts: list[str] = []
    for name, probe in PROBES.items():
        if any(name in run.results for run in runs):
            opened = "" if parts else " open"
            parts.append(
                f"<details{opened}><summary>{name} <span>{escape(probe.question)}</span></summary>"
                f"{_columns(runs, cell_of(name))}</details>"
            )
    return "".join(parts)


def _configs(runs: Sequence[RunFolder]) -> str:
    if not any(run.config for run in runs):
        return ""
    cells = _columns(runs, lambda run: f"<pre>{escape(run.config or 'no config.yaml')}</pre>")
    return f"<details><summary>config.yaml</summary>{cells}</details>"


def _picture(run: RunFolder, name: str, figure: str, build: Callable[[], Figure]) -> str:
    """A probe's picture: the one that lies in the folder, where it is as new as the arrays, or one drawn now."""
    drawn, arrays = store.picture_path(run.folder, name, figure), store.results_dir(run.folder) / f"{name}.npz"
    if drawn.exists() and drawn.stat().st_mtime_ns >= arrays.stat().st_mtime_ns:
        return embedded(drawn.read_bytes(), f"{name}: {figure}")
    return _image(build(), f"{name}: {figure}")


def _image(fig: Figure, alt: str) -> str:
    from probes.figures.drawing import to_png

    return embedded(to_png(fig), alt)


def embedded(png: bytes, alt: str) -> str:
    """A picture inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
