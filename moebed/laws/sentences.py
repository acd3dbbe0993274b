"""What may be said of a fitted law, in sentences with their intervals, and its tables; all from ``law.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moebed.laws.contract import Shape
from moebed.machine.units import human

Content = Mapping[str, Any]


class Table(NamedTuple):
    """Rows for the terminal and the page alike.

    Args:
        title: What it shows.
        columns: Their names.
        rows: Cells.
        note: What a reader must know; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def with_interval(found: Content, form: str = ".4g") -> str:
    """A value and its interval."""
    if found["value"] is None:
        return "none"
    if found["interval"] is None:
        return f"{found['value']:{form}} [no interval]"
    low, high = found["interval"]
    return f"{found['value']:{form}} [{low:{form}}, {high:{form}}]"


def large(value: float | None) -> str:
    """A count in the field's words: 1.23 B."""
    if value is None:
        return "none"
    return human(value).replace(" G", " B")


def _large_interval(found: Content) -> str:
    if found["interval"] is None:
        return large(found["value"])
    return f"{large(found['value'])} [{large(found['interval'][0])}, {large(found['interval'][1])}]"


def shape_words(content: Content, shape: Content) -> str:
    """As a person says it."""
    return Shape(**shape).words(content["shape_parts"])


def tables(content: Content) -> list[Table]:
    """All tables of a law."""
    found = [_constants(content)]
    if content["target"] == "loss":
        found += [*(_optima(content, one) for one in content["optima"]), _predictions(content)]
        found += [_sparsity(content)] if "best_sparsity" in content else []
        found += [_over_trained(content, one) for one in content["over_trained"] if one["pairs"]]
    else:
        found.append(_leverage(content))
    return found


def _constants(content: Content) -> Table:
    fit = content["fit"]
    rows = [
        [
            name,
            f"{one['value']:.5g} (given)" if one["fixed"] else with_interval(one),
            "not published" if one["published"] is None else f"{one['published']:.6g}",
        ]
        for name, one in fit["constants"].items()
    ]
    note = (
        f"Intervals: 95 % of {fit['resamples']} fits to resampled runs. Constants of one fit make up for each other, "
        f"so that single ones mean little where intervals are wide; predictions are what a fit is for. "
        f"{fit['published_words']}"
    )
    return Table(f"{content['form']}: {content['formula']}", ("constant", "fitted [95 %]", "published"), rows, note)


def _optima(content: Content, one: Content) -> Table:
    published = "published" in one["shapes"][0]
    rows = [
        [
            shape_words(content, row["shape"]),
            _large_interval(row["N"]),
            _large_interval(row["tok"]),
            with_interval(row["loss"]),
            _place(row),
            *([f"{large(row['published']['N'])}, {large(row['published']['tok'])}"] if published else ()),
        ]
        for row in one["shapes"]
    ]
    columns = ("shape", "N [95 %]", "tokens [95 %]", "loss [95 %]", "within the runs")
    note = f"N: {content['N']}."
    if published:
        note += " Last column: N and tokens by the published constants; what differs there is said under the constants."
    title = f"loss-optimal models for {one['budget']:.3g} training FLOPs"
    return Table(title, (*columns, *(("published law",) if published else ())), rows, note)


def _sparsity(content: Content) -> Table:
    rows = [
        [
            f"{row['budget']:.3g}",
            large(row["N"]),
            with_interval(row, ".3f"),
            f"{row['published']:.3f}",
            _place(row),
        ]
        for row in content["best_sparsity"]
    ]
    columns = ("FLOPs", "N", "S [95 %]", "published law", "within the runs")
    note = "S of the lowest loss where N is given: the fewer parameters a token meets, the more tokens a budget buys."
    return Table("best sparsity of a size", columns, rows, note)


def _predictions(content: Content) -> Table:
    rows = [
        [shape_words(content, row["shape"]), large(row["N"]), large(row["tok"]), with_interval(row), _place(row)]
        for row in content["predictions"]
    ]
    note = "The loss that the law gives, of the mean over runs: a single run scatters about it by the error of the fit."
    return Table("predicted loss", ("shape", "N", "tokens", "loss [95 %]", "within the runs"), rows, note)


def _place(row: Content) -> str:
    return "yes" if row["inside"] else "no, extrapolated"


def _over_trained(content: Content, one: Content) -> Table:
    rows = [
        [
            shape_words(content, row["reference"]),
            shape_words(content, row["shape"]),
            "loss not reached" if row["cost_ratio"]["value"] is None else with_interval(row["cost_ratio"], ".3g"),
            with_interval(row["loss_difference"], "+.3g"),
        ]
        for row in one["pairs"]
    ]
    note = (
        f"Both are trained for the same budget; {content['cost']['words']}. Third column: the smallest model of the "
        "second shape that reaches the loss of the first shape's optimum, its cost over that one's. Last column: the "
        "loss of the second shape's model of equal cost, minus that of the optimum."
    )
    title = f"over-trained models for {one['budget']:.3g} training FLOPs"
    return Table(title, ("optimum of", "over-trained", "cost at equal loss", "Δ loss at equal cost"), rows, note)


def _leverage(content: Content) -> Table:
    rows = [
        [
            f"{row['flops']:.3g}",
            f"{row['A']:.3g}",
            f"{row['G']:.3g}",
            with_interval(row, ".3g"),
            f"{row['published']:.3g}",
            _place(row),
        ]
        for row in content["predictions"]
    ]
    columns = ("FLOPs", "A", "G", "leverage [95 %]", "published law", "within the runs")
    return Table("efficiency leverage", columns, rows, content["fit"]["published_words"])


def sentences(content: Content) -> list[str]:
    """What was found."""
    said = [_quality(content)]
    if content["target"] != "loss":
        return [*said, _granularity(content)]
    said += [_best(content, one) for one in content["optima"] if one["best"] is not None]
    said += [_cheaper(content, one) for one in content["over_trained"] if one["pairs"]]
    return said


def _quality(content: Content) -> str:
    fit, left = content["fit"], content["largest_left_out"]
    text = (
        f"The law {content['form']} describes {content['table']['runs']} runs with a root mean square error of "
        f"{100 * fit['rms_log_error']:.2g} % of the {content['target']}"
    )
    if left is None:
        return f"{text}; too few runs to leave the largest out and predict them, so how far it reaches is not known."
    return (
        f"{text}; fitted without the {left['runs']:.0f} largest, it predicts them with {100 * left['rms']:.2g} % "
        f"(mean {100 * left['mean']:+.2g} %, at most {100 * left['worst']:.2g} %)."
    )


def _best(content: Content, one: Content) -> str:
    best, difference = one["best"], one["best"]["difference"]
    row = next(row for row in one["shapes"] if row["shape"] == best["shape"])
    place = "" if row["inside"] else "; that is beyond the runs, so extrapolated"
    numbers = f"N {_large_interval(row['N'])}, tokens {_large_interval(row['tok'])}{place}"
    share = f"lowest in {100 * best['share_of_resamples']:.0f} % of resamples"
    apart = f"{with_interval(difference, '+.3g')} nats"
    first, second = (shape_words(content, best[name]) for name in ("shape", "second"))
    start = f"For {one['budget']:.3g} FLOPs {first} has the lowest"
    if difference["interval"] is None or difference["interval"][1] >= 0:
        return (
            f"{start} fitted loss, {with_interval(row['loss'])}, but cannot be told from {second} ({apart}; {share}; "
            f"{numbers})."
        )
    return f"{start} loss, {with_interval(row['loss'])}, by {apart} from {second} ({share}; {numbers})."


def _cheaper(content: Content, one: Content) -> str:
    """The largest saving at equal loss over the first shape's optimum, if its interval says that it is one."""
    reference = one["pairs"][0]["reference"]
    pairs = [row for row in one["pairs"] if row["reference"] == reference and row["cost_ratio"]["value"] is not None]
    start = f"For {one['budget']:.3g} FLOPs and at the loss of {shape_words(content, reference)}'s optimum"
    if not pairs:
        return f"{start} no other shape gets there."
    best = min(pairs, key=lambda row: row["cost_ratio"]["value"])
    ratio = with_interval(best["cost_ratio"], ".3g")
    ends = best["cost_ratio"]["interval"]
    shape, words = shape_words(content, best["shape"]), f"({content['cost']['words']})"
    if ends is not None and ends[1] < 1:
        return f"{start}, an over-trained {shape} costs {ratio} times as much in use {words}."
    return f"{start}, no other shape is shown to cost less in use: {shape} is least, {ratio} times as much {words}."


def _granularity(content: Content) -> str:
    best = content["best_granularity"]
    low, high = best["range"]
    theirs = f"published constants: {best['published']:.3g}"
    if best["value"] is None or best["interval"] is None:
        return f"Which granularity has the largest leverage cannot be told from runs of {low:g} to {high:g} ({theirs})."
    outside = "" if low <= best["value"] <= high else f", beyond the runs' {low:g} to {high:g}, so extrapolated"
    return f"Leverage is largest at granularity {with_interval(best, '.3g')}{outside} ({theirs})."
