"""``moebed tasks CHECKPOINT --out DIR --tasks A,B``: benchmarks of lm-eval, and the use of experts on each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebed.arguments import OneLineParser, whole
from moebed.checkpoints.hub import find_checkpoint, require_nameable
from moebed.commands.probe_options import require_probes
from moebed.errors import ConfigError, UserError
from moebed.extras import require_lm_eval
from moebed.machine import storage
from moebed.machine.places import require_writable
from moebed.machine.progress import say, waiting
from moebed.tasks.options import TaskOptions

PROBES = "balance,domain_share,domain_purity"


def build_parser() -> OneLineParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed tasks",
        description="Evaluate a model on tasks of lm-eval and on the perplexity of texts, and look at what its experts "
        "do on each. A second run goes on where the first one stopped. Tasks that need no network: moebed_recall, "
        "moebed_agreement, moebed_addition.",
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint, or a .ckpt file; it is read into memory whole")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for results and report.html")
    parser.add_argument("--tasks", default="", metavar="A,B", help="names of lm-eval's tasks")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a text whose perplexity is a task as well; may be repeated",
    )
    parser.add_argument("--include", type=Path, metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="items of each task at most; default all")
    parser.add_argument(
        "--num-fewshot", type=whole(0), metavar="N", help="examples before each item; default as tasks say"
    )
    parser.add_argument(
        "--batch-tokens", type=whole(1), default=4096, metavar="N", help="of a forward pass; default 4096"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute; default cpu")
    parser.add_argument(
        "--probes",
        default=PROBES,
        metavar="A,B",
        help=f"probes of the tasks' text, a domain each; default {PROBES}; none for none",
    )
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Evaluate a checkpoint.

    Raises:
        UserError: Nothing could be evaluated, or the text could not be probed; what was found is written then.
    """
    given = vars(build_parser().parse_args(arguments))
    probes = given.pop("probes")
    names = [name.strip() for name in given.pop("tasks").split(",") if name.strip()]
    options = TaskOptions(tasks=names, texts=_texts(given.pop("text")), **given)
    require_nameable(options.checkpoint)
    require_writable(options.out, "--out")
    if (options.out / "config.yaml").exists():
        raise UserError(f"{options.out} is the folder of a run; choose another one for its tasks")
    if probes != "none":
        require_probes([name.strip() for name in probes.split(",") if name.strip()], {})
    require_lm_eval("moebed tasks")
    # Heavy imports wait until the options are known to be well formed.
    with waiting("loading PyTorch"):
        from moebed.tasks.running import run_tasks, texts_of

    found = run_tasks(options)
    numbers = {f"tasks/{task}/{key}": value for task, one in found.items() for key, value in one.items()}
    storage.write_text(options.out / "run_summary.json", json.dumps(numbers, indent=1) + "\n")
    print(table(found))
    texts = texts_of(options.out, list(found))
    if probes == "none" or not texts:
        return
    from moebed.checkpoints import Checkpoint

    if not Checkpoint.open(find_checkpoint(options.checkpoint)).config.moe_layers:
        say("note: the model has no experts, so its text is not probed")
        return
    from moebed.commands.probe import run as probe

    domains = [f"--domain={name}={file}" for name, file in texts.items()]
    probe("probe", [options.checkpoint, "--out", str(options.out), "--probes", probes, *domains])


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a number, with its standard error where the task has one."""
    lines = []
    for task, numbers in found.items():
        for key, value in numbers.items():
            if key != "items" and not key.endswith("_stderr"):
                error = numbers.get(f"{key}_stderr")
                spread = "" if error is None else f" ± {error:.4f}"
                lines.append(f"{task:<24}{key:<20}{value:.4f}{spread}  ({numbers['items']} items)")
    return "\n".join(lines)


def _texts(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not (name and equals and file):
            raise ConfigError(f"--text {one}: write it as NAME=FILE")
        if name in found:
            raise ConfigError(f"--text {one}: there are two texts called {name}")
        found[name] = Path(file)
    return found
