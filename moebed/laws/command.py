"""``moebed law TABLE.csv | study.json --form FORM --out DIR``: a scaling law of runs, and what follows from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.arguments import OneLineParser, number, whole
from moebed.errors import UserError
from moebed.machine import provenance
from moebed.machine.places import require_writable
from moebed.machine.progress import say, waiting

if TYPE_CHECKING:
    from moebed.laws.contract import Law

FORMS = ("yun", "joint", "krajewski", "abnar", "leverage")
LAW_FILE = "law.json"
FORMAT = 1


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed law",
        description="Fit a scaling law to runs, and say with intervals what follows from it: losses, optima under a "
        "training budget, and models that are cheaper to use. Results are in DIR/law.json, DIR/law.html, DIR/figures.",
    )
    parser.add_argument(
        "table",
        type=Path,
        metavar="TABLE.csv | study.json",
        help="runs: a CSV file with columns such as N, tokens, E, K, G, loss; or what `moebed study` wrote",
    )
    parser.add_argument("--form", choices=FORMS, required=True, help="the law")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--fix", action="append", default=[], metavar="NAME=VALUE", help="a constant that is given; may be repeated"
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        type=number(1e6, 1e31),
        metavar="FLOPS",
        help="training FLOPs to ask about; may be repeated; default the largest run's, and ten times that",
    )
    parser.add_argument(
        "--cost", choices=("total", "active"), default="total", help="what using a model costs: parameters held, or met"
    )
    parser.add_argument(
        "--resamples", type=whole(40), default=200, metavar="N", help="fits to resampled runs; at least 40"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of starts and resamples")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Fit a law and write what it says.

    Raises:
        UserError: The table cannot tell, or the folder holds something else.
    """
    options = build_parser().parse_args(arguments)
    require_writable(options.out, "--out")
    # Heavy imports wait until the options are known to be well formed.
    from moebed.laws.findings import Fitted, describe
    from moebed.laws.fitting import Problem, bootstrap, check, fit, leave_largest_out
    from moebed.laws.page import present
    from moebed.laws.reading import read_table, select
    from moebed.laws.registry import LAWS

    law = LAWS[options.form]
    fixed = _read_fixed(options.fix, law)
    table = select(law, read_table(options.table))
    check(law, table.columns, fixed, str(options.table))
    identity = {
        "table": provenance.content_record(options.table),
        "form": law.form,
        "fixed": fixed,
        "budgets": options.budget,
        "cost": options.cost,
        "resamples": options.resamples,
        "seed": options.seed,
    }
    _check_free(options.out, identity)
    problem = Problem(law, table.columns, fixed)
    with waiting(f"fitting {law.form} to {table.runs} runs, and to {options.resamples} resamples of them"):
        found = fit(problem, options.seed)
        largest = float(table.columns["flops"].max())
        fitted = Fitted(
            table,
            found,
            bootstrap(found, options.resamples, options.seed),
            leave_largest_out(problem, table.columns["flops"], options.seed),
            tuple(options.budget) or (largest, 10 * largest),
            options.cost,
        )
    record = {"identity": identity, "version": provenance.moebed_version(), "code": provenance.code()}
    content = {"format": FORMAT, **describe(fitted), "provenance": record}
    for path in present(options.out, fitted, content):
        say(str(path))


def _read_fixed(given: Sequence[str], law: Law) -> dict[str, float]:
    """Constants that are given.

    Raises:
        UserError: One is none of the law's, or has a value that it cannot have.
    """
    fixed = {}
    known = {constant.name: constant for constant in law.constants}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(f"--fix {text}: {name!r} is no constant of {law.form}; it has {', '.join(known)}")
        try:
            fixed[name] = float(value)
        except ValueError:
            raise UserError(f"--fix {text}: give a number, as in --fix {name}=1.5") from None
        if not abs(fixed[name]) < float("inf") or (known[name].positive and fixed[name] <= 0):
            raise UserError(f"--fix {text}: {name} must be finite{' and above 0' if known[name].positive else ''}")
    if len(fixed) == len(known):
        raise UserError(f"--fix: all constants of {law.form} are given, so that nothing is left to fit; leave one out")
    return fixed


def _check_free(out: Path, identity: Any) -> None:
    """Whether results of this table and these options may go to a folder.

    Raises:
        UserError: There are some of others.
    """
    from moebed.study.files import read_json

    there = read_json(out / LAW_FILE)
    if there is None:
        return
    theirs = there.get("provenance", {}).get("identity") if isinstance(there, dict) else None
    if theirs != identity:
        differs = [key for key in identity if not isinstance(theirs, dict) or theirs.get(key) != identity[key]]
        raise UserError(
            f"{out / LAW_FILE} was made from something else ({', '.join(differs) or 'other options'}); choose another "
            "--out, or delete it"
        )
