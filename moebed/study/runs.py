"""What a study will run: every run's command line and what it depends on, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moebed.checkpoints.companions import START_RECIPE
from moebed.checkpoints.families.meaning import NOT_IN_CHECKPOINTS
from moebed.data.datamodule import TextDataModule
from moebed.data.sources import Source
from moebed.errors import ConfigError, UserError
from moebed.machine import provenance
from moebed.model.config import ModelConfig
from moebed.model.flops import count_parameters, flops_per_token
from moebed.model.routers import cautions
from moebed.study.identity import TEXT, fingerprint, known_as, settings_of
from moebed.study.precision import KEY as PRECISION
from moebed.study.precision import study_precision
from moebed.study.progress import status_path
from moebed.study.recipe import Overrides, Step, StudyRecipe
from moebed.study.resolving import Resolved, as_arguments, resolve
from moebed.training.trainer import AUTO
from moebed.upcycling.command import read_layers, read_options, read_settings, text_files
from moebed.upcycling.upcycle import upcycled_config

_SAME_TEXT = ("data.batch_size", "data.rows_by_domain")  # in other batches, or other rows of a batch


@dataclass(frozen=True)
class Run:
    """One process of a study.

    Args:
        name: Its folder below the study's: ``runs/ARM/seed_S``, or ``stages/KIND_HASH/seed_S`` for an earlier step,
            which arms share where it is the same.
        arguments: Of ``moebed``.
        identity: Every setting that decides the result.
        steps: Optimizer steps; 0 where nothing is trained.
        finished: File below the folder that is there when all is done.
        needs: Name of the run that must be finished before.
        from_random: Whether training starts from random weights.
        devices: GPUs that it is to see; 0 where it takes none, or names its own.
        data: The text that it trains on; None where nothing is trained.
    """

    name: str
    arguments: Sequence[str]
    identity: Mapping[str, Any]
    steps: int
    finished: str
    needs: str | None = None
    from_random: bool = True
    devices: int = 0
    data: TextDataModule | None = None

    @property
    def hash(self) -> str:
        """Stands for the identity, and through it for that of the steps before."""
        return fingerprint(self.identity)


@dataclass(frozen=True)
class Arm:
    """What is known of an arm before it runs; its parameters and FLOPs are those of its last step."""

    config: ModelConfig
    settings: Overrides
    steps: int
    tokens: int
    total_parameters: int
    active_parameters: int
    active_flops: int  # forward, of a token


@dataclass
class StudyPlan:
    """A checked study.

    Args:
        recipe: The YAML file's content.
        arms: By name.
        runs: By name, each after what it needs, seed by seed, so that pairs are complete early.
        final: (arm, seed) -> name of the run whose result counts.
        tasks: (arm, seed) -> name of the run of ``moebed tasks`` over it; empty where none is wanted.
        notes: What a person should know before it starts.
        precision: What ``trainer.precision: auto`` is in all of its runs; None where none has it.
        precision_said: The same, for a person.
    """

    recipe: StudyRecipe
    arms: dict[str, Arm] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    final: dict[tuple[str, int], str] = field(default_factory=dict)
    tasks: dict[tuple[str, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    precision: str | None = None
    precision_said: str = ""


def plan_study(recipe: StudyRecipe, out: Path) -> StudyPlan:
    """Check a study and lay out its runs below ``out``.

    Raises:
        ConfigError: An arm's config is wrong, or the arms cannot be compared: other text, budget, or size.
    """
    plan = StudyPlan(recipe)
    resolved: dict[str, list[_CheckedStep]] = {}
    for name, steps in recipe.arms.items():
        try:
            resolved[name] = _resolve_steps(recipe, steps, plan, out)
        except UserError as error:
            raise ConfigError(f"arm {name!r}: {error}") from error
        last = resolved[name][-1]
        assert last.config is not None
        total, active = count_parameters(last.config)
        flops = flops_per_token(last.config, last.identity["data.sequence_length"])
        settings = steps[-1].settings
        plan.arms[name] = Arm(last.config, settings, last.steps, last.tokens, total, active, flops)
    _check_comparable(recipe, plan.arms, {name: steps[-1].identity for name, steps in resolved.items()})
    for seed in recipe.seeds:
        for name in recipe.arms:
            _add_runs(plan, name, resolved[name], seed, out)
    plan.notes += [f"arm {name!r}: {said}" for name, arm in plan.arms.items() for said in cautions(arm.config)]
    plan.notes += _widths(plan.arms, recipe.baseline)
    plan.notes += _notes(recipe, {name: steps[-1].identity for name, steps in resolved.items()})
    return plan


def prepare_texts(runs: Iterable[Run]) -> None:
    """Tokenize what runs will train on, each text once, into the cache that they read it from.

    Raises:
        UserError: What the first of them that cannot be trained would say, with its name.
    """
    done = set()
    for run in runs:
        text = fingerprint({key: run.identity[key] for key in run.identity if key.startswith("data.") or key == TEXT})
        if run.data is not None and text not in done:
            done.add(text)
            try:
                run.data.prepare_data()
            except UserError as error:
                raise UserError(f"{run.name} and what has the same text: {error}") from error


@dataclass(frozen=True)
class _CheckedStep:
    """A step of an arm, whatever the seed."""

    kind: str
    arguments: list[str]
    identity: dict[str, Any]
    config: ModelConfig | None
    steps: int = 0
    tokens: int = 0
    from_random: bool = True
    devices: int = 0
    data: TextDataModule | None = None


def _resolve_steps(recipe: StudyRecipe, steps: Sequence[Step], plan: StudyPlan, out: Path) -> list[_CheckedStep]:
    found: list[_CheckedStep] = []
    code = _code_identity()
    upcycled: dict[str, Any] = {}  # what the model becomes before the step that follows
    for index, step in enumerate(steps):
        after = {"after": known_as(found[-1].kind, found[-1].identity, out)} if found else {}
        if step.kind == "upcycle":
            dense = found[-1].config
            assert dense is not None
            arguments = _as_options(step.settings)
            options = read_options(["DENSE", "--out=OUT", *arguments])
            shared, layers = options.get("shared_experts", 0), read_layers(options)
            settings = read_settings(options)
            config = upcycled_config(dense, options["method"], settings, shared, layers, "the step before")
            upcycled = {
                f"model.config.{key}": value
                for key, value in config.to_dict().items()
                if key not in NOT_IN_CHECKPOINTS and value != getattr(dense, key)
            }
            texts = provenance.files_record(text_files(options))
            identity = {**options, **after, **code, **({"texts": texts} if texts else {})}
            found.append(_CheckedStep("upcycle", arguments, identity, None))
            continue
        last = index == len(steps) - 1
        overrides = {**recipe.settings, **upcycled, **step.settings}
        arguments = ["--config", str(recipe.base), *as_arguments(overrides)]
        if last and recipe.tokens is None and recipe.steps is not None:
            arguments += _budget(step, recipe.steps)
        resolved = resolve(arguments)
        if resolved.content["trainer"]["precision"] == AUTO:
            resolved.content["trainer"]["precision"] = _precision(plan, out, resolved)
            arguments.append(f"--{PRECISION}={plan.precision}")
        if last and recipe.tokens is not None:
            steps_wanted, rest = divmod(recipe.tokens, resolved.tokens_per_step)
            if rest:
                raise ConfigError(
                    f"a budget of {recipe.tokens} tokens is no whole number of steps of {resolved.tokens_per_step}; "
                    "give a multiple"
                )
            arguments += _budget(step, steps_wanted)
            resolved = resolve(arguments)
        number = resolved.content["trainer"]["max_steps"]
        if number < 1:
            raise ConfigError("trainer.max_steps is not set; give it in the base recipe, or the study a budget")
        if last and resolved.content["trainer"]["limit_val_batches"] == 0:
            raise ConfigError(
                "trainer.limit_val_batches is 0, but arms are compared by their loss on held-out text; take it out"
            )
        identity = settings_of(resolved.content) | after
        # Content tells the text of two days or two machines apart where paths do not.
        identity |= code | {TEXT: provenance.fingerprint([Source(one).content() for one in resolved.data.sources])}
        found.append(
            _CheckedStep(
                "fit",
                arguments,
                identity,
                resolved.config,
                number,
                number * resolved.tokens_per_step,
                from_random=not found and resolved.content["model"]["init_from"] is None,
                devices=resolved.devices,
                data=resolved.data,
            )
        )
    return found


def _as_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of a command; one that holds a list is given as often."""
    return [
        f"--{key.replace('_', '-')}={value}"
        for key, given in settings.items()
        for value in (given if isinstance(given, list) else [given])
    ]


def _precision(plan: StudyPlan, out: Path, resolved: Resolved) -> str:
    """What auto is: asked once, so that no two runs of a study differ in it."""
    if plan.precision is None:
        accelerator = resolved.content["trainer"]["accelerator"]
        plan.precision, plan.precision_said = study_precision(out, accelerator)
    return plan.precision


def _code_identity() -> dict[str, Any]:
    """What computes a run, beside its settings."""
    plugins = provenance.plugins_record()
    versions = {"moebed": provenance.moebed_version(), "torch": torch.__version__}
    return versions | ({"plugins": plugins} if plugins else {})


def _budget(step: Step, steps: int) -> list[str]:
    if "trainer.max_steps" in step.settings:
        raise ConfigError(
            "sets trainer.max_steps, but the study's budget decides how long every arm is trained; take it out"
        )
    return [f"--trainer.max_steps={steps}"]


def _check_comparable(
    recipe: StudyRecipe, arms: Mapping[str, Arm], identities: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse arms that differ from the baseline in text, budget, or in what the study wants matched."""
    base = arms[recipe.baseline]
    for name, arm in arms.items():
        for key, value in identities[name].items():
            wanted = identities[recipe.baseline].get(key)
            if key.startswith("data.") and key not in _SAME_TEXT and value != wanted:
                raise ConfigError(
                    f"arm {name!r} has {key} {value!r} but baseline {recipe.baseline!r} has {wanted!r}; arms are "
                    "compared on the same text, so change it for all, in the study's settings"
                )
        if arm.tokens != base.tokens:
            raise ConfigError(
                f"arm {name!r} trains on {arm.tokens} tokens but baseline {recipe.baseline!r} on {base.tokens}; give "
                f"every arm the same budget, such as `budget: {{tokens: {base.tokens}}}` in the study"
            )
        for what in recipe.match:
            found, wanted = getattr(arm, what), getattr(base, what)
            if abs(found / wanted - 1) > recipe.tolerance:
                raise ConfigError(
                    f"arm {name!r} has {found:,} {what.replace('_', ' ')} but baseline {recipe.baseline!r} has "
                    f"{wanted:,}: {found / wanted:.3f} times as many, outside the tolerance of {recipe.tolerance:g}; "
                    f"change the arm's sizes, the tolerance, or leave {what} out of match"
                )


def _add_runs(plan: StudyPlan, arm: str, steps: Sequence[_CheckedStep], seed: int, out: Path) -> None:
    needs: Run | None = None
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        part = f"runs/{arm}" if last else f"stages/{step.kind}_{known_as(step.kind, step.identity, out)}"
        name = f"{part}/seed_{seed}"
        folder = out / name
        identity = {**step.identity, "seed": seed}
        if step.kind == "upcycle":
            assert needs is not None
            given = [] if "seed" in step.identity else [f"--seed={seed}"]
            checkpoint = str(out / needs.name / "checkpoints" / "last.ckpt")
            arguments = ["upcycle", checkpoint, f"--out={folder}", *step.arguments, *given]
            run = Run(name, arguments, identity, 0, START_RECIPE, needs.name)
        else:
            arguments = ["fit", *step.arguments, f"--seed_everything={seed}", f"--data.seed={seed}"]
            arguments += [f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]
            steps_done = status_path(out, name, "step")
            arguments += [
                "--trainer.callbacks+=moebed.training.callbacks.StepFile",
                f"--trainer.callbacks.path={steps_done}",
            ]
            if needs is not None:
                arguments.append(f"--model.init_from={out / needs.name}")
            before = needs.name if needs else None
            run = Run(
                name,
                arguments,
                identity,
                step.steps,
                "run_summary.json",
                before,
                step.from_random,
                step.devices,
                step.data,
            )
        plan.runs.setdefault(name, run)
        needs = run
    assert needs is not None
    plan.final[arm, seed] = needs.name
    if plan.recipe.tasks:
        run = _tasks_run(plan.recipe.tasks, needs, f"tasks/{arm}/seed_{seed}", out)
        plan.runs[run.name] = run
        plan.tasks[arm, seed] = run.name


def _tasks_run(settings: Mapping[str, Any], trained: Run, name: str, out: Path) -> Run:
    """``moebed tasks`` over a run's last checkpoint."""
    names = settings.get("tasks", [])
    options = {**settings, "tasks": names if isinstance(names, str) else ",".join(map(str, names)), "probes": "none"}
    checkpoint = str(out / trained.name / "checkpoints" / "last.ckpt")
    arguments = ["tasks", checkpoint, f"--out={out / name}", *_as_options(options)]
    identity = {**settings, "after": trained.hash, **_code_identity()}
    return Run(name, arguments, identity, 0, "run_summary.json", trained.name)


def _widths(arms: Mapping[str, Arm], baseline: str) -> list[str]:
    """Arms whose widths are not the baseline's, at one learning rate."""
    base = arms[baseline].config
    found = []
    for key in ("hidden_size", "moe_intermediate_size"):
        other = [
            name
            for name, arm in arms.items()
            if getattr(arm.config, key) != getattr(base, key) and arm.config.base_hidden_size is None
        ]
        if other:
            found.append(
                f"{', '.join(other)}: another {key} than {baseline} at one learning rate, which suits one width more "
                "than another; model.config.base_hidden_size scales it (muP)"
            )
    return found


def _notes(recipe: StudyRecipe, identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    if len(recipe.seeds) == 1:
        notes.append("one seed: there will be no interval, and nothing can be concluded")
    first: dict[str, str] = {}
    for name, identity in identities.items():
        same = first.setdefault(fingerprint(identity), name)
        if same != name:
            notes.append(f"arms {same!r} and {name!r} have the same config: their runs will be equal")
    return notes
