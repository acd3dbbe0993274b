"""The report: one HTML file that says what was found in one run, or in several side by side.

It opens without a network: pictures, styles and all are inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moebed.machine import storage
from moebed.machine.precision import COMPUTED_IN
from moebed.machine.templates import render
from probes.contract import ProbeResult
from probes.questions import QUESTIONS, Question, with_what_follows
from probes.registry import PROBES
from probes.report.index import search_index
from probes.report.pictures import drawn, png
from probes.running.published import PUBLISHED, paper_model, published
from probes.running.run_folder import RunFolder, read_run

if TYPE_CHECKING:
    from markupsafe import Markup

ALERTS = "alerts"  # of run_summary.json: sentences


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

    known = {run.name: with_what_follows(run.results) for run in runs}
    questions = [one for one in QUESTIONS if any(set(one.probes) & known[run.name].keys() for run in runs)]
    answered = {(run.name, one.name): _first_picture(run, known[run.name], one) for run in runs for one in questions}
    parts: dict[str, Any] = {
        "questions": questions,
        "probes": {name: probe for name, probe in PROBES.items() if any(name in run.results for run in runs)},
        "papers": [found for run in runs if (found := _beside_the_paper(run))[2]],
        "numbers": _numbers(runs),
        **_training(runs),
        **_history(runs),
    }
    page = render(
        "probes.report/page.html",
        title=", ".join([*(first or {}), *(run.name for run in runs)]),
        first={f"{kind} {title}": content for title, content in (first or {}).items()},
        contents=_contents(parts, runs),
        runs=runs,
        colours=run_colours(runs),
        said=_said(runs),
        notes=_notes(runs),
        known=known,
        first_picture=lambda run, question: answered[run.name, question.name],
        shown_above={
            (run, shown.probe, shown.figure): question for (run, question), shown in answered.items() if shown
        },
        reasons=lambda run, question: [
            note for name in question.probes if name in known[run.name] for note in known[run.name][name].notes
        ],
        number=_format,
        drawn=drawn,
        said_of=_said_of,
        index=search_index(runs),
        **parts,
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
            name, family = model.get("name"), model.get("model_type")
            said.append(f"{run.name}: checkpoint {name}, family {family}{_sizes(model)}{_text(run)}")
        elif "step" in run.summary:
            config = run.summary.get("provenance", {}).get("config")
            said.append(f"{run.name}: probed last at step {run.summary['step']}{_sizes(config or {})}{_text(run)}")
    return said


def _sizes(model: Mapping[str, Any]) -> str:
    """Layers, experts of a layer, and how many of them a token has, as far as they are known."""
    called = {"num_hidden_layers": "layers", "num_experts": "experts", "num_experts_per_tok": "a token"}
    said = []
    for key, what in called.items():
        value = model.get(key)
        found = sorted({one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int) and one})
        if found:
            said.append(f"{found[0]} to {found[-1]} {what}" if len(found) > 1 else f"{found[0]} {what}")
    return f", {', '.join(said)}" if said else ""


def _text(run: RunFolder) -> str:
    """How much text the probes saw, where one of them kept where its sequences begin."""
    for result in run.results.values():
        if {"token_ids", "sequence_start"} <= result.arrays.keys():
            tokens, texts = (len(result.arrays[key]) for key in ("token_ids", "sequence_start"))
            return f", on {tokens:,} tokens of {texts} text{'s' if texts != 1 else ''}"
    return ""


def _notes(runs: Sequence[RunFolder]) -> list[str]:
    notes = [(run.name, note) for run in runs for note in run.summary.get("notes", ())]
    notes += [(run.name, f"alert: {said}") for run in runs for said in run.numbers.get(ALERTS, ())]
    return [f"{name}: {note}" if len(runs) > 1 else note for name, note in notes] + left_out(runs)


def left_out(runs: Sequence[RunFolder]) -> list[str]:
    """A line for each reason for which results that lie in a folder are not reported."""
    lines = []
    for run in runs:
        for why in dict.fromkeys(run.left_out.values()):
            names = ", ".join(name for name, other in run.left_out.items() if other == why)
            lines.append(f"{run.name}: results/ also holds {names}, which are left out: {why}")
    return lines


class Shown(NamedTuple):
    """A picture that lies beside an answer."""

    probe: str
    figure: str
    png: bytes


def _said_of(probe: str, figure: str) -> str:
    """What a picture is, for those who cannot see it: the probe's question, and its name."""
    return f"{PROBES[probe].question} ({probe}: {figure.replace('_', ' ')})"


def _first_picture(run: RunFolder, results: Mapping[str, ProbeResult], question: Question) -> Shown | None:
    """The picture that shows the answer best, of those that there are."""
    for name in question.pictures:
        probe, _, figure = name.partition("/")
        if probe in results and figure in results[probe].figures:
            return Shown(probe, figure, drawn(run, probe, figure, results[probe].figures[figure]))
    return None


def _contents(parts: Mapping[str, Any], runs: Sequence[RunFolder]) -> dict[str, str]:
    """The sections that there are, by the names that links to them have."""
    there = {
        "answers": ("What was found", parts["questions"]),
        "training": ("Over training", parts["curves"] or parts["history"]),
        "probes": ("Every probe", parts["probes"]),
        "papers": ("Beside the papers", parts["papers"]),
        "numbers": ("Key numbers", parts["numbers"]),
        "configuration": ("Configuration", any(run.config for run in runs)),
    }
    return {link: title for link, (title, is_there) in there.items() if is_there}


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
        "The run": [{key: value for key, value in run.numbers.items() if key != ALERTS} for run in runs],
        "Last logged": [_last_logged(run) for run in runs],
        "The probes": [
            {f"{n}: {k}": h.value for n, result in run.results.items() for k, h in result.headlines.items()}
            for run in runs
        ],
    }
    tables = {
        group: [
            [str(key), *_beside_the_first([numbers.get(key, "") for numbers in columns])]
            for key in dict.fromkeys(key for numbers in columns for key in numbers)
        ]
        for group, columns in groups.items()
    }
    return {group: rows for group, rows in tables.items() if rows}


def _beside_the_first(values: Sequence[Any]) -> list[str]:
    """Each run's number, and how far it is from the first one's."""
    cells = [_format(value) for value in values]
    for at, value in enumerate(values[1:], 1):
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in (values[0], value)):
            cells[at] += f" ({value - values[0]:+.3g})"
    return cells


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

    tags: list[str] = tags_in_order(runs)
    curves: dict[str, bytes] = {}
    if any(tag in run.curves for run in runs for pair in LOSSES.values() for tag in pair):
        curves["loss curves"] = png(draw_losses(runs))
    if tags:
        curves["curves of the logged scalars"] = png(draw_curves(runs, tags))
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
    from probes.report.charts import draw_headlines, draw_history, headline_series, layer_series, trained_layers

    series = {run.name: trained_layers(run.curves) | layer_series(run.history) for run in runs}
    series = {name: {key: one for key, one in found.items() if _moves(one)} for name, found in series.items()}
    if not any(series.values()):
        return {"history": {}}
    columns = 4 if len(runs) == 1 else 2
    headlines = headline_series(runs)
    return {
        "headlines_png": png(draw_headlines(headlines, runs)) if headlines else None,
        "history": {name: png(draw_history(one, columns)) if one else None for name, one in series.items()},
    }


def _moves(by_layer: Mapping[int, tuple[list[int], list[float]]]) -> bool:
    """Whether some layer has more than one point."""
    return any(len(steps) > 1 for steps, _ in by_layer.values())
