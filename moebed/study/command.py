"""``moebed study RECIPE.yaml``: run arms over seeds and compare them; ``moebed study STUDY.json`` shows them again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moebed.arguments import OneLineParser, number, whole
from moebed.errors import UserError
from moebed.extras import require_lm_eval
from moebed.machine.places import require_writable
from moebed.machine.progress import say, waiting
from moebed.plugins import OPTION as PLUGINS
from moebed.plugins import named_plugins
from moebed.study.files import STUDY_FILE, load_study
from moebed.study.recipe import StudyRecipe, read_recipe

PAIRS = 3  # of a pilot, of each arm: two leave the deviation open by a factor of 70, three by one of 12

if TYPE_CHECKING:
    from moebed.study.runs import Run, StudyPlan


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed study",
        description="Run the arms of a study over its seeds, each run a folder of its own, and compare them: paired "
        "differences with intervals, tables, pictures. Called again, it continues; finished runs are left alone.",
    )
    parser.add_argument(
        "study",
        type=Path,
        metavar="RECIPE.yaml | STUDY.json",
        help="a study, such as recipes/studies/router_tiny.yaml; or a study.json, to make tables and pictures again",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study; default runs/studies/NAME")
    parser.add_argument(
        "--jobs", type=whole(1), default=1, metavar="N", help="runs at a time, which share cores and GPUs"
    )
    parser.add_argument("--arms", metavar="A,B", help="run only these arms, and the baseline")
    parser.add_argument("--slurm", action="store_true", help="print a script that runs the study as a SLURM job array")
    parser.add_argument("--run", type=whole(0), metavar="I", help="run only the I-th run, and what it needs")
    parser.add_argument("--collect", action="store_true", help="run nothing; compare what is there")
    parser.add_argument(
        "--pilot",
        type=whole(2),
        nargs="?",
        const=PAIRS,
        metavar="N",
        help=f"run no more than what gives each arm N pairs with the baseline (default {PAIRS}; what is finished "
        "counts), and say from how they scatter how many seeds a difference takes, and how long",
    )
    parser.add_argument(
        "--difference",
        type=number(above=0),
        metavar="NATS",
        help="with --pilot: the difference that is wanted; default several",
    )
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a study, or show it again.

    Raises:
        UserError: The study is refused, a run has failed, or the study was stopped.
    """
    options = build_parser().parse_args(arguments)
    if options.study.suffix == ".json":
        if options.study.name != STUDY_FILE:
            raise UserError(f"{options.study}: a study's result is called {STUDY_FILE}; it lies in the study's folder")
        defaults = vars(build_parser().parse_args([str(options.study)]))
        for name, value in vars(options).items():
            if value != defaults[name]:
                raise UserError(
                    f"--{name} does nothing with a study.json, which is shown again in its own folder; leave it out"
                )
        load_study(options.study)
        _present(options.study.parent)
        return
    if options.difference is not None and options.pilot is None:
        raise UserError(f"--difference is {options.difference:g}; give it with --pilot")
    if options.pilot is not None and (options.run is not None or options.slurm):
        raise UserError("--pilot goes with neither --run nor --slurm; give it alone")
    recipe = read_recipe(options.study)
    arms = _read_arms(options.arms, recipe)
    count = len(recipe.arms) * len(recipe.seeds)
    if options.run is not None and not 0 <= options.run < count:
        raise UserError(f"--run {options.run}: the study has runs 0 to {count - 1}; give one of them")
    if recipe.tasks and not options.collect:
        require_lm_eval(f"study {options.study.name}, which has tasks,")
    out = options.out or Path("runs/studies") / recipe.name
    if not options.slurm:  # a script may be for a machine that has other folders
        require_writable(out, "--out")
    # Heavy imports wait until the file is known to be well formed.
    with waiting("loading PyTorch"):
        from moebed.study.collecting import collect
        from moebed.study.comparison import compare_arms
        from moebed.study.pilot import WANTED, pilot_runs, print_pilot
        from moebed.study.precision import keep_precision
        from moebed.study.runner import Outcome, check_unchanged, is_finished, run_all
        from moebed.study.runs import plan_study, prepare_texts

    plan = plan_study(recipe, out)
    for note in plan.notes:
        say(f"note: {note}")
    if options.slurm:
        from moebed.study.slurm import job_array

        own = ["moebed", "study", str(options.study), "--out", str(out)]
        if named_plugins():
            own += [PLUGINS, ",".join(named_plugins())]
        numbers = [number for number, (arm, _) in enumerate(plan.final) if arm in arms]
        print(job_array(own, recipe.name, numbers, options.jobs))
        return
    if plan.precision is not None and not options.collect and keep_precision(out, plan.precision) != plan.precision:
        plan = plan_study(recipe, out)  # another call began the study meanwhile, and chose otherwise
    if plan.precision_said:
        say(plan.precision_said)
    check_unchanged(list(plan.runs.values()), out)  # all, since all that are finished are compared
    final = list(plan.final) if options.run is None else [list(plan.final)[options.run]]
    final = [(arm, seed) for arm, seed in final if arm in arms]
    if options.pilot is not None:
        final = pilot_runs(compare_arms(load_study(collect(plan, out))), arms, options.pilot)
    runs, outcome = _choose(plan, final, out), Outcome()
    if not options.collect:
        trained = sum(run.name in plan.final.values() for run in runs)
        say(f"study {recipe.name}: {trained} runs of {len(recipe.arms)} arms and {len(recipe.seeds)} seeds in {out}")
        prepare_texts(run for run in runs if not is_finished(run, out))
        outcome = run_all(runs, out, options.jobs)
    if options.pilot is not None:
        wanted = WANTED if options.difference is None else (options.difference,)
        print_pilot(compare_arms(load_study(collect(plan, out))), wanted, options.jobs)
    elif options.run is None:
        collect(plan, out)
        _present(out)
    for name, said in outcome.diverged.items():
        say(f"diverged: {name}: {said}")
    if outcome.failed:
        raise UserError(
            f"{len(outcome.failed)} of {len(runs)} runs failed: {outcome.why_failed()}; logs are in {out / 'status'}"
        )


def _read_arms(text: str | None, recipe: StudyRecipe) -> list[str]:
    """The arms to run: those named and the baseline, or all."""
    if text is None:
        return list(recipe.arms)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in recipe.arms:
            raise UserError(f"--arms: {name!r} is no arm; the study has {', '.join(recipe.arms)}")
    return [*names, recipe.baseline]


def _choose(plan: StudyPlan, final: Sequence[tuple[str, int]], out: Path) -> list[Run]:
    """The runs of these arms and seeds, in order, with those that they still need."""
    from moebed.study.runner import is_finished

    wanted: set[str] = set()
    for pair in final:
        wanted |= {plan.tasks[pair]} if pair in plan.tasks else set()
        name: str | None = plan.final[pair]
        while name is not None:
            wanted.add(name)
            name = None if is_finished(plan.runs[name], out) else plan.runs[name].needs
    return [run for name, run in plan.runs.items() if name in wanted]


def _present(folder: Path) -> None:
    from moebed.study.page import present

    for path in present(folder):
        say(str(path))
