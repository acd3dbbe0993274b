"""The ``moebed`` command: one entry, one line for an error, heavy imports only when a subcommand needs them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import locale
import os
import select
import sys
from collections.abc import Sequence

from moebed.arguments import OneLineParser
from moebed.errors import UserError, did_you_mean
from moebed.plugins import load_plugins, mistake
from moebed.ranks import stand_alone

TRAINING = "moebed.commands.fit"  # alone may be several processes that work together
COMMANDS = {
    "fit": (TRAINING, "train a model from a recipe, with probes; --ckpt_path last continues a run"),
    "validate": (TRAINING, "evaluate a checkpoint on the validation text"),
    "test": (TRAINING, "evaluate a checkpoint on the test text"),
    "predict": (TRAINING, "per-token losses of a checkpoint on the test text"),
    "probe": (
        "moebed.commands.probe",
        "run probes on a pretrained checkpoint, a layer at a time; a second run continues",
    ),
    "tasks": ("moebed.commands.tasks", "evaluate a checkpoint on tasks of lm-eval, and its experts on their text"),
    "upcycle": ("moebed.upcycling.command", "make an MoE checkpoint from a dense one, a layer at a time"),
    "export": ("moebed.exporting.command", "write a run's checkpoint as a folder that transformers loads"),
    "prune": ("moebed.commands.prune", "write a checkpoint with fewer experts, and its loss before and after"),
    "study": ("moebed.study.command", "run arms over seeds, then compare them with paired differences and intervals"),
    "law": ("moebed.laws.command", "fit a scaling law to runs, and say with intervals what follows from it"),
    "size": ("moebed.commands.size", "what a recipe's model has in each layer and what it costs; nothing is built"),
    "report": ("moebed.commands.report", "results of runs side by side, or of a study, as one HTML file"),
    "bench": ("moebed.bench.command", "measure side by side with the peers that are installed"),
    "check": (
        "moebed.check.command",
        "what this machine can do, kernels and all, within minutes; a second run continues",
    ),
    "completion": ("moebed.commands.completion", "print a script that completes commands and options in a shell"),
}

# What a person can do who knows nothing of it yet.
FIRST_STEPS = """moebed trains and probes Mixture-of-Experts language models. Five things to do:

  moebed fit --config recipes/demo.yaml                  train a small one, with probes; minutes on a CPU
  moebed report runs/demo                                see what was found, on one page
  moebed probe CHECKPOINT --out DIR                      probe a pretrained checkpoint
  moebed study recipes/studies/router_tiny.yaml          compare settings over seeds
  moebed check                                           what this machine can do

`moebed --help` lists all commands, `moebed COMMAND --help` the options of one."""

SPINCOUNT = 30_000  # with 10 000 a step on quiet cores takes longer


class _Version(argparse.Action):
    """Says what a report of a fault should name, and ends; versions are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        parts = []
        for name in ("moebed", "torch", "lightning", "transformers"):
            with contextlib.suppress(PackageNotFoundError):
                parts.append(f"{name} {version(name)}")
        print(", ".join([*parts, f"Python {platform.python_version()}"]))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The top level; each subcommand parses its own arguments."""
    lines = "\n".join(f"  {name:<10}{sentence}" for name, (_, sentence) in COMMANDS.items())
    parser = OneLineParser(
        prog="moebed",
        description="Train and probe Mixture-of-Experts language models.",
        epilog=f"commands:\n{lines}\n\n`moebed COMMAND --help` shows every knob of a command. Each takes --plugins "
        "FILE.py, with routers and probes of your own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=_Version, nargs=0, help="say which moebed, Python and PyTorch these are")
    parser.add_argument("command", metavar="COMMAND", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 2 for an error that a person can mend, 3 for a loss that diverged, 130 for Ctrl-C, 141 where
        nobody reads on, as in ``| head``.
    """
    if argv is not None:
        return _run(argv)
    _require_utf8()
    _spin_briefly()
    try:
        try:
            code = _run(None)
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not _silence_closed():
            raise
        return 128 + 13  # as of a program that SIGPIPE ended
    return code


def _run(argv: Sequence[str] | None) -> int:
    if not (sys.argv[1:] if argv is None else argv):
        print(FIRST_STEPS)
        return 0
    verbose = False
    try:
        options = build_parser().parse_args(argv)
        if options.command not in COMMANDS:
            hint = did_you_mean(options.command, COMMANDS, f"choose one of {', '.join(COMMANDS)}")
            raise UserError(f"there is no command {options.command!r}; {hint}")
        verbose = options.verbose or bool({"-v", "--verbose"} & set(options.arguments))
        arguments = [argument for argument in options.arguments if argument not in ("-v", "--verbose")]
        arguments = load_plugins(arguments)
        module, _ = COMMANDS[options.command]
        if argv is None and module != TRAINING:
            stand_alone()
        importlib.import_module(module).run(options.command, arguments)
    except UserError as error:
        if verbose:
            raise
        if not getattr(error, "said_elsewhere", False):
            print(f"moebed: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning makes an exit with code 1 of a Ctrl-C, before the first step as in a probing.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if verbose or argv is not None:  # who calls it from Python hears of it as Python says it
            raise KeyboardInterrupt from error
        print("moebed: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = None if verbose else _too_long(error) or mistake(error)
        if line is None:
            raise
        print(f"moebed: error: {' '.join(line.split())}; -v shows how it came there", file=sys.stderr)
        return UserError.exit_code
    return 0


def _too_long(error: Exception) -> str | None:
    """One line for what no file can be called, whichever argument it is of: a text in the place of its file."""
    if not isinstance(error, OSError) or error.errno != errno.ENAMETOOLONG:
        return None
    return f"{str(error.filename)[:60]!r}... is too long for the name of a file; give the path of one"


def _flush() -> None:
    """Write what is left for standard output, as at Python's own end an error would be said aloud."""
    if sys.stdout is not None:  # as it is where a command was started without one
        sys.stdout.flush()


def _silence_closed() -> bool:
    """Whether nobody reads standard output or standard error any more; nothing is written there from now on."""
    if not hasattr(select, "poll"):  # on Windows this is another error
        return False
    found = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll = select.poll()
        poll.register(stream, 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            found = True
    return found


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
