"""``moebed report DIR [DIR ...]``: runs, probed checkpoints and studies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moebed.arguments import OneLineParser, require_run_folder


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(prog="moebed report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folder of a run or study, such as runs/demo"
    )
    parser.add_argument("--out", type=Path, help="HTML file; report.html in the first folder if not given")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Write one HTML file about one or several run folders; the studies among them come first."""
    options = build_parser().parse_args(arguments)
    for folder in options.folders:
        require_run_folder(folder)
    from moebed.machine.progress import waiting
    from moebed.machine.storage import require_writable
    from moebed.study.page import is_study, sections
    from probes.report.page import write_report

    studies = [folder for folder in options.folders if is_study(folder)]
    runs = [folder for folder in options.folders if folder not in studies]
    out = options.out or options.folders[0] / "report.html"
    if options.out or out.parent.is_dir():  # of a folder that is not there something better is said
        require_writable(out.parent, "--out")
    with waiting("drawing the report"):
        path = write_report(runs, out, sections(studies))
    print(path)
