"""The tables of a study: Markdown for a file, rich for the terminal; one list of rows for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moebed.machine.units import human
from moebed.study.comparison import ArmResult, Comparison, HeadlineResult, power, verdict
from moebed.study.gain import GainShare
from moebed.study.statistics import Difference

if TYPE_CHECKING:
    from rich.console import Console

MOST_STEPS = 6

COLUMNS = (
    "arm",
    "seeds",
    "loss",
    "± sd",
    "bits/byte",
    "Δ loss [95 %]",
    "p (Holm)",
    "could see",
    "tokens/s",
    "params",
    "active",
    "FLOPs",
)
NOTE = (
    "Loss in nats a token on held-out text, mean over seeds. Δ: paired difference from the baseline over seeds, with "
    "its 95 % interval; * where it excludes 0. p: of the same paired t-test, and adjusted for all comparisons. Could "
    "see: the smallest difference that this many pairs show with 80 % power at 5 %, over the 95 % interval of their "
    "deviation, which few pairs leave wide. Tokens/s as the "
    "runs went, beside each other where they did. Parameters, those active for a token, and its forward FLOPs are "
    "counted from the config."
)


def arm_rows(found: Comparison) -> list[list[str]]:
    """The cells of the main table, a row an arm."""
    return [_row(arm, found) for arm in found.arms.values()]


def _row(arm: ArmResult, found: Comparison) -> list[str]:
    planned = len(found.study["seeds"])
    seeds = str(planned) if len(arm.finished) == planned else f"{len(arm.finished)} of {planned}"
    difference = arm.difference
    p = ""
    if difference is not None and difference.p is not None:
        p = f"{difference.p:.2g} ({arm.holm:.2g})"
    return [
        arm.name,
        seeds,
        _number(arm.loss, ".4f"),
        _number(arm.loss_deviation, ".4f"),
        _number(arm.bits_per_byte, ".4f"),
        "baseline" if arm.name == found.baseline else format_difference(difference),
        p,
        _could_see(difference),
        _number(arm.tokens_per_second, ",.0f"),
        *(human(arm.facts[f"{which}_parameters"], digits=4) for which in ("total", "active")),
        human(arm.facts["active_flops_per_token"], digits=4),
    ]


def format_difference(difference: Difference | None, digits: int = 4) -> str:
    """Mean and interval; a star where the interval excludes 0."""
    if difference is None:
        return "no pair"
    mean = f"{difference.mean:+.{digits}f}"
    if difference.interval is None:
        return f"{mean} (ONE PAIR)"
    low, high = difference.interval
    return f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}]{' *' if difference.called else ''}"


def _could_see(difference: Difference | None) -> str:
    if difference is None or difference.detectable is None:
        return "–"
    ends = difference.detectable_range
    return f"{difference.detectable:.4f}" + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def gain_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of what planted text and reference routers tell: nats over the floor, share of the gain."""
    arms = list(found.arms.values())
    floors = any(arm.over_floor is not None for arm in arms)
    gains = any(arm.gain is not None for arm in arms)
    columns = ["arm", *(["nats over the floor"] if floors else []), *(["share of the gain [95 %]"] if gains else [])]
    rows = [
        [
            arm.name,
            *([_number(arm.over_floor, ".4f")] if floors else []),
            *([_share(arm.gain)] if gains else []),
        ]
        for arm in arms
    ]
    return columns, rows if floors or gains else []


def _share(gain: GainShare | None) -> str:
    if gain is None or gain.share is None:
        return "–" if gain is None else gain.why
    if gain.interval is None:
        return f"{gain.share:.3f} (ONE SEED)"
    return f"{gain.share:.3f} [{gain.interval[0]:.3f}, {gain.interval[1]:.3f}]"


GAIN_NOTE = (
    "Nats over the floor: the loss less what nobody can go below on planted text. Share of the gain: (L_random − L) / "
    "(L_random − L_oracle) over pairs of seeds, with Fieller's 95 % interval; the two references have 0 and 1 by "
    "construction, and a share is given only where the interval of L_random − L_oracle excludes 0."
)


def step_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the differences over training: a row an arm, a column a validation."""
    arms = [arm for arm in found.arms.values() if arm.by_step]
    steps = sorted(set.intersection(*(set(arm.by_step) for arm in arms))) if arms else []
    if len(steps) > MOST_STEPS:  # evenly spread, with the first and the last
        steps = [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    rows = [[arm.name, *(_with_power(arm.by_step[step]) for step in steps)] for arm in arms]
    return ["arm", *(f"step {step}" for step in steps)], rows if steps else []


def _with_power(difference: Difference) -> str:
    seen = "" if difference.detectable is None else f"; sees {difference.detectable:.3f}"
    return format_difference(difference, 3) + seen


STEP_NOTE = (
    "Paired difference from the baseline at each validation, with its 95 % interval; * where it excludes 0. After "
    "“sees”: the smallest difference that this many pairs show with 80 % power at 5 %. Not adjusted for the number of "
    "comparisons."
)


def domain_rows(found: Comparison) -> list[list[str]]:
    """The cells of the bits per byte by domain: a row an arm; the baseline's own, then differences from it."""
    rows = []
    for name in found.arms:
        results = [by_arm.get(name) for by_arm in found.domains.values()]
        plain = name == found.baseline
        rows.append([name, *("–" if r is None else _domain_cell(r, plain) for r in results)])
    return rows


def _domain_cell(result: HeadlineResult, plain: bool) -> str:
    return f"{result.mean:.3f}" if plain else format_difference(result.difference, 3)


DOMAIN_NOTE = (
    "Bits per byte on each domain's held-out text: the baseline's, then paired differences from it with 95 % "
    "intervals; * where it excludes 0. Not adjusted for the number of comparisons."
)


def headline_rows(found: Comparison) -> list[list[str]]:
    """The cells of the table of headlines: name, then a cell an arm."""
    rows = []
    for headline, by_arm in found.headlines.items():
        cells = []
        for name in found.arms:
            result = by_arm.get(name)
            if result is None:
                cells.append("–")
                continue
            beside = result.difference
            star = " *" if beside is not None and beside.called else ""
            cells.append(f"{result.mean:.3g}{star}")
        rows.append([headline, *cells])
    return rows


def headline_differences(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the headlines' differences: the baseline's mean, then each arm's paired difference."""
    rows = []
    for headline, by_arm in found.headlines.items():
        base, largest = by_arm.get(found.baseline), max(abs(result.mean) for result in by_arm.values())
        digits = 3 if largest == 0 else max(3, 1 - math.floor(math.log10(largest)))
        cells = ["–" if base is None else _with_interval(base, digits)]
        for name in found.arms:
            if name != found.baseline:
                cells.append(format_difference(by_arm[name].difference, digits) if name in by_arm else "–")
        rows.append([headline, *cells])
    return ["headline", *found.arms], rows


def _with_interval(result: HeadlineResult, digits: int) -> str:
    mean = f"{result.mean:.{digits}f}"
    if result.interval is None:
        return mean
    low, high = result.interval
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def headline_note(found: Comparison) -> str:
    """What the stars of that table mean."""
    pairs = [r.difference for by_arm in found.headlines.values() for r in by_arm.values() if r.difference is not None]
    count = sum(difference.interval is not None for difference in pairs)
    return (
        f"Mean over seeds; * where the 95 % interval of the paired difference from {found.baseline} excludes 0. "
        f"These are {count} intervals, not adjusted: about {0.05 * count:.0f} would do so by chance."
    )


def notes(found: Comparison) -> list[str]:
    """Warnings, and the marks of each arm."""
    return [*found.warnings, *(f"{arm.name}: {mark}" for arm in found.arms.values() for mark in arm.marks)]


def verdicts(found: Comparison) -> list[str]:
    """A sentence for each arm but the baseline."""
    return [verdict(arm, found.baseline) for arm in found.arms.values() if arm.name != found.baseline]


def markdown(found: Comparison, figures: Sequence[str] = ()) -> str:
    """The whole result as Markdown.

    Args:
        found: The result.
        figures: Paths of pictures, as seen from the file.
    """
    study = found.study
    parts = [f"# Study {study['name']}"]
    if study["question"]:
        parts.append(study["question"])
    tokens = study["arms"][found.baseline]["tokens"]
    seeds = ", ".join(map(str, study["seeds"]))
    parts.append(f"{len(found.arms)} arms, seeds {seeds}, {tokens:,} training tokens a run.")
    parts += [f"**{warning}**" for warning in found.warnings]
    parts.append("\n".join(f"- {sentence}" for sentence in verdicts(found)))
    parts.append(_markdown_table(COLUMNS, arm_rows(found), left=1))
    parts.append(NOTE)
    parts += [sentence] if (sentence := power(found)) else []
    marks = [f"- {arm.name}: {mark}" for arm in found.arms.values() for mark in arm.marks]
    if marks:
        parts.append("\n".join(marks))
    parts.append(_markdown_table(("arm", "is"), [[arm.name, arm.settings] for arm in found.arms.values()], left=2))
    columns, rows = gain_rows(found)
    if rows:
        parts += ["## What routing gains", _markdown_table(columns, rows, left=1), GAIN_NOTE]
    columns, rows = step_rows(found)
    if rows:
        parts += ["## Over training", _markdown_table(columns, rows, left=1), STEP_NOTE]
    if found.domains:
        parts += ["## By domain", _markdown_table(("arm", *found.domains), domain_rows(found), left=1), DOMAIN_NOTE]
    if found.headlines:
        parts.append("## Probes, at the last step")
        parts.append(_markdown_table(("headline", *found.arms), headline_rows(found), left=1))
        parts.append(headline_note(found))
        columns, rows = headline_differences(found)
        parts += ["Paired differences, beside the baseline's mean:", _markdown_table(columns, rows, left=1)]
    parts += [f"![{path}]({path})" for path in figures]
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---" if index < left else "---:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *escaped))


def print_table(found: Comparison) -> None:
    """The main table, what must be known, and the verdicts, on standard output."""
    from rich.markup import escape

    console = print_rows(f"study {found.study['name']}", COLUMNS, arm_rows(found))
    columns, rows = gain_rows(found)
    if rows:
        print_rows("what routing gains", columns, rows)
    for note in notes(found):
        console.print(escape(note), style="bold red")
    for sentence in [*verdicts(found), power(found)]:
        console.print(escape(sentence))


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Console:
    """A table on standard output, its first column words and the others numbers.

    Returns:
        The console, as wide as the table: a terminal that is too narrow wraps the lines, which is read more easily
        than cells cut short.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    natural = Measurement.get(Console(width=1000), Console(width=1000).options, table).maximum
    console = Console(width=max(natural, Console().width))
    console.print(table)
    return console
