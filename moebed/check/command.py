"""``moebed check``: what this machine can do with moebed, in order of what must be known first, within a given time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moebed.arguments import OneLineParser, number
from moebed.check import backends, table
from moebed.check.contract import MINUTES, Verdict
from moebed.check.ladder import LADDER, MODULE
from moebed.check.runner import climb
from moebed.errors import UserError
from moebed.machine.places import require_writable
from moebed.study.lock import HeldError, RunLock

EXIT_CODES = "exit code 0: nothing is wrong (slow, or not run, is not wrong); 1: something is; 2: it could not be begun"


class FoundWrong(UserError):
    """Something is wrong."""

    exit_code = 1


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    names = "\n".join(f"  {step.name:<18}{step.question}" for rung in LADDER for step in rung)
    parser = OneLineParser(
        prog="moebed check",
        description=__doc__,
        epilog=f"steps:\n{names}\n\nEach step is a process with its own time, and keeps what it found in DIR/steps, so "
        f"that the same command goes on where it was.\n{EXIT_CODES}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=number(above=0), default=MINUTES, help="shared among the steps; default %(default)g"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/check"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--only", default="", metavar="STEP,...", help="these steps alone")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept in DIR")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Climb the ladder, show a table, and write the page.

    Raises:
        FoundWrong: A row has another result than its reference, or ended with an error.
        UserError: It could not be begun.
    """
    steps = {step.name: step for rung in LADDER for step in rung}
    options = build_parser().parse_args(arguments)
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in only:
        if name not in steps:
            raise UserError(f"--only {name}: choose among {', '.join(steps)}")
    require_writable(options.out, "--out")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(options.out / ".lock")
    except HeldError as error:
        raise UserError(
            f"another `moebed check` is at work in {options.out}; wait for it, or choose another --out"
        ) from error
    try:
        records = climb(
            MODULE, LADDER, options.out, options.minutes, options.fresh, only,
            after_rung=lambda so_far: table.write_page(LADDER, so_far, options.out),
        )  # fmt: skip
    finally:
        lock.release()
    if gpu := next((record.identity["gpu"] for record in records.values() if record.identity.get("gpu")), None):
        backends.write(records, gpu)
    table.show(LADDER, records)
    page = options.out / table.PAGE
    found = table.all_findings(LADDER, records)
    wrong = [f"{step.name}, {each.name}" for step, each in found if each.verdict == Verdict.WRONG]
    if wrong:
        raise FoundWrong(f"{len(wrong)} wrong ({'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}); see {page}")
    print(f"nothing is wrong; every figure is in {page}")
