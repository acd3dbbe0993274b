"""``moebed report DIR [DIR ...]``: runs, probed checkpoints and studies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moebed.arguments import OneLineParser, require_run_folder
from moebed.machine.places import require_file_writable
from moebed.machine.progress import waiting


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(prog="moebed report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folder of a run or study, such as runs/demo"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="HTML file; report.html in the first folder if not given"
    )
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Write one HTML file about one or several run folders; the studies among them come first."""
    options = build_parser().parse_args(arguments)
    for folder in options.folders:
        require_run_folder(folder)
    out = options.out or options.folders[0] / "report.html"
    require_file_writable(out, "--out")
    from moebed.study.page import is_study, sections
    from probes.report.page import write_report

    studies = [folder for folder in options.folders if is_study(folder)]
    runs = [folder for folder in options.folders if folder not in studies]
    with waiting("drawing the report"):
        path = write_report(runs, out, sections(studies))
    print(path)
