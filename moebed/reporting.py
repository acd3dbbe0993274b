"""``moebed report DIR [DIR ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(command: str, arguments: Sequence[str]) -> None:
    """Write one HTML file about one or several run folders."""
    parser = argparse.ArgumentParser(prog=f"moebed {command}", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folder, such as runs/demo")
    parser.add_argument("--out", type=Path, help="HTML file; report.html in the first folder if not given")
    options = parser.parse_args(arguments)
    from probes.report import write_report

    print(write_report(options.folders, options.out or options.folders[0] / "report.html"))
