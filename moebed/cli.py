"""The ``moebed`` command: one entry, one line for an error, heavy imports only when a subcommand needs them."""

from __future__ import annotations

import argparse
import importlib
import io
import locale
import os
import sys
from collections.abc import Sequence

from moebed.errors import UserError
from moebed.plugins import load_plugins

COMMANDS = {
    "fit": ("moebed.commands.fit", "train a model from a recipe, with probes; --ckpt_path last continues a run"),
    "validate": ("moebed.commands.fit", "evaluate a checkpoint on the validation text"),
    "test": ("moebed.commands.fit", "evaluate a checkpoint on the test text"),
    "predict": ("moebed.commands.fit", "per-token losses of a checkpoint on the test text"),
    "probe": (
        "moebed.commands.probe",
        "run probes on a pretrained checkpoint, a layer at a time; a second run continues",
    ),
    "tasks": ("moebed.commands.tasks", "evaluate a checkpoint on tasks of lm-eval, and its experts on their text"),
    "upcycle": ("moebed.upcycling.command", "make an MoE checkpoint from a dense one, a layer at a time"),
    "export": ("moebed.exporting.command", "write a run's checkpoint as a folder that transformers loads"),
    "study": ("moebed.study.command", "run arms over seeds, then compare them with paired differences and intervals"),
    "law": ("moebed.laws.command", "fit a scaling law to runs, and say with intervals what follows from it"),
    "size": ("moebed.commands.size", "what a recipe's model has in each layer and what it costs; nothing is built"),
    "report": ("moebed.commands.report", "results of runs side by side, or of a study, as one HTML file"),
    "bench": ("moebed.bench.command", "measure side by side with the peers that are installed"),
    "check": (
        "moebed.check.command",
        "what this machine can do, kernels and all, within minutes; a second run continues",
    ),
}

SPINCOUNT = 30_000  # with 10 000 a step on quiet cores takes longer


def build_parser() -> argparse.ArgumentParser:
    """The top level; each subcommand parses its own arguments."""
    lines = "\n".join(f"  {name:<10}{sentence}" for name, (_, sentence) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="moebed",
        description="Train and probe Mixture-of-Experts language models.",
        epilog=f"commands:\n{lines}\n\n`moebed COMMAND --help` shows every knob of a command. Each takes --plugins "
        "FILE.py, with routers and probes of your own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error that a person can mend, 3 for a loss that diverged."""
    if argv is None:
        _require_utf8()
        _spin_briefly()
    options = build_parser().parse_args(argv)
    verbose = options.verbose or bool({"-v", "--verbose"} & set(options.arguments))
    arguments = [argument for argument in options.arguments if argument not in ("-v", "--verbose")]
    try:
        arguments = load_plugins(arguments)
        module, _ = COMMANDS[options.command]
        importlib.import_module(module).run(options.command, arguments)
    except UserError as error:
        if verbose:
            raise
        if not getattr(error, "said_elsewhere", False):
            print(f"moebed: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def _spin_briefly() -> None:
    """Let OpenMP's threads give a core away soon where another process holds the one that they wait for.

    They spin for 300 000 turns, which is longer than the kernel's slices of time. Read when torch is imported, and only
    by GNU's OpenMP, which PyTorch brings along on Linux; what a person has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINCOUNT)


def _require_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding (C, or a code page of Windows).

    The libraries beneath open configs, logs and data in the locale's encoding.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        if os.name == "posix":
            os.execv(sys.executable, command)
        import subprocess  # where exec does not wait

        sys.exit(subprocess.run(command).returncode)
    for stream in (sys.stdout, sys.stderr):  # a terminal may still have another encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
