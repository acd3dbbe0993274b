"""Runs a command whose Python processes see CUDA devices that are emulated on the host.

python -m tests.emulated_cuda [--devices 2] [--capability 9.0] [--waits DIR] python -m moebed.cli fit --config RECIPE
"""

import argparse
import os
import sys
from pathlib import Path

from tests.emulated_cuda.environment import environment

parser = argparse.ArgumentParser(prog="python -m tests.emulated_cuda", description=__doc__.splitlines()[0])
parser.add_argument("--devices", type=int, default=1, help="how many (1)")
parser.add_argument("--capability", default="9.0", help="the compute capability they say they have (9.0)")
parser.add_argument("--waits", type=Path, metavar="DIR", help="where each process leaves its waits, by place")
parser.add_argument("command", nargs=argparse.REMAINDER)
options = parser.parse_args()
given = options.command[options.command[:1] == ["--"] :]
if not given:
    parser.error("name a command")
command = [sys.executable if given[0] == "python" else given[0], *given[1:]]
os.execvpe(command[0], command, environment(options.devices, options.capability, options.waits))
