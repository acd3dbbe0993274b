"""A study as its YAML file says it: base recipe, arms, seeds, budget. Plain data; nothing here needs torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moebed.arguments import is_run_recipe, read_yaml
from moebed.errors import ConfigError, did_you_mean
from moebed.study.gain import ROLES

MATCHES = ("total_parameters", "active_flops")
# What the study itself sets in every run; an arm that set it would break the pairing or lose the run's folder.
RESERVED = (
    "seed_everything",
    "data.seed",
    "trainer.default_root_dir",
    "checkpoint.dirpath",
    "ckpt_path",
    "model.init_from",
)
# Options of `moebed tasks` that a study may give: names, or whole numbers.
TASK_NAMES = ("tasks", "text", "include")
TASK_NUMBERS = ("limit", "num_fewshot", "batch_tokens")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

Overrides = Mapping[str, Any]  # dotted key, as on the command line -> value


@dataclass(frozen=True)
class Step:
    """A part of an arm: ``fit`` with overrides of the base recipe, or ``upcycle`` with options of `moebed upcycle`."""

    kind: Literal["fit", "upcycle"]
    settings: Overrides


@dataclass(frozen=True)
class StudyRecipe:
    """What a study's YAML file holds.

    Args:
        name: The file's name without its ending.
        base: The recipe that every run starts from.
        arms: Name -> its steps; the last is a ``fit``, whose result is compared. Most arms have no other.
        baseline: The arm that the others are compared with.
        seeds: Each arm is run with each. Seed s gives all arms the same data order and, where names and shapes of
            parameters are equal, the same initial weights.
        question: What the study is to answer, in a sentence.
        settings: Overrides for all arms, before the arm's own.
        steps: Optimizer steps of every arm's last step; not given if ``tokens`` is, or if the base recipe decides.
        tokens: Training tokens of every arm's last step.
        match: What must agree with the baseline: ``total_parameters``, ``active_flops``, both, or nothing.
        tolerance: Relative difference that counts as agreement.
        gain: Which arms are ``random`` and ``oracle``, if every arm's share of what lies between them is wanted.
        tasks: Options of ``moebed tasks``, if every run's last checkpoint is to be evaluated by it.
    """

    name: str
    base: Path
    arms: Mapping[str, Sequence[Step]]
    baseline: str
    seeds: Sequence[int]
    question: str = ""
    settings: Overrides = field(default_factory=dict)
    steps: int | None = None
    tokens: int | None = None
    match: Sequence[str] = ()
    tolerance: float = 0.02
    gain: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)


def read_recipe(path: Path) -> StudyRecipe:
    """Read and check a study's YAML file.

    Raises:
        ConfigError: The file cannot be read, or something in it is unknown, missing or contradictory.
    """
    content = study_content(path)
    where = f"study {path.name}"
    if is_run_recipe(content):
        raise ConfigError(
            f"{path} is a recipe of one run, and no study: `moebed fit --config {path}` trains it; a study names it as "
            "its base, beside arms and seeds"
        )
    known = [f.name for f in dataclasses.fields(StudyRecipe) if f.name not in ("name", "steps", "tokens")]
    _check_keys(where, content, [*known, "budget", "like"])
    for key in ("base", "arms", "seeds"):
        if not content.get(key):
            raise ConfigError(f"{where}: {key} is missing")
    arms = {str(name): _arm(f"{where}: arm {name!r}", name, value) for name, value in _mapping(where, content, "arms")}
    baseline = str(content.get("baseline", next(iter(arms))))
    if len(arms) < 2:
        raise ConfigError(f"{where} has one arm; a study compares at least two")
    if baseline not in arms:
        raise ConfigError(f"{where}: baseline {baseline!r} is no arm; {did_you_mean(baseline, arms, _known(arms))}")
    base = path.parent / str(content["base"])
    if not base.is_file():
        raise ConfigError(f"{where}: base recipe {base} does not exist; its path is seen from the study's file")
    settings = dict(_mapping(where, content, "settings"))
    _check_overrides(f"{where}: settings", settings)
    return StudyRecipe(
        path.stem,
        base,
        arms,
        baseline,
        _seeds(where, content["seeds"]),
        str(content.get("question", "")),
        settings,
        **_budget(where, content.get("budget")),
        match=_match(where, content.get("match")),
        tolerance=_number(where, "tolerance", content.get("tolerance", 0.02)),
        gain=_gain(where, content, arms),
        tasks=_tasks(where, content),
    )


def study_content(path: Path) -> dict[str, Any]:
    """The keys of a study's file; where it says ``like: OTHER.yaml``, over those of the other study.

    A key of its own takes the place of the other's, but for ``settings``, which are merged key by key. The other's base
    recipe is seen from the other's folder.

    Raises:
        ConfigError: A file is missing or holds no keys, or the other one is like a third.
    """
    content = read_yaml(path, "study")
    if not isinstance(content, dict):
        raise ConfigError(f"study {path} holds no keys; it needs base, arms and seeds")
    if "like" not in content:
        return content
    own = dict(content)
    other = path.parent / str(own.pop("like"))
    shared = read_yaml(other, "study") if other.is_file() else None
    if not isinstance(shared, dict) or "like" in shared:
        raise ConfigError(
            f"study {path.name}: like: {other} is no study with arms of its own, seen from the study's file; "
            "name one that has them"
        )
    if "base" in shared:
        shared["base"] = str(other.parent.resolve() / str(shared["base"]))
    settings = {
        key: value
        for each in (shared, own)
        for key, value in _mapping(f"study {path.name}", each, "settings")
    }  # fmt: skip
    return {**shared, **own, "settings": settings}


def _arm(where: str, name: Any, value: Any) -> list[Step]:
    if not _NAME.fullmatch(str(name)):
        raise ConfigError(f"{where}: a name becomes a folder; use letters, digits, and _ . + -")
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{where} must hold overrides such as model.config.num_experts: 16, or steps")
    content = dict(value or {})
    if "steps" not in content:
        _check_overrides(where, content)
        return [Step("fit", content)]
    _check_keys(where, content, ["steps"])
    steps = []
    for step in content["steps"] if isinstance(content["steps"], list) else [None]:
        if not (isinstance(step, Mapping) and len(step) == 1 and next(iter(step)) in ("fit", "upcycle")):
            raise ConfigError(f"{where}: each of its steps is one of `fit: {{...}}` and `upcycle: {{...}}`")
        (kind, settings), *_ = step.items()
        if kind == "fit":
            _check_overrides(where, settings or {})
        steps.append(Step(kind, dict(settings or {})))
    kinds = [step.kind for step in steps]
    if kinds != ["fit", "upcycle"] * (len(kinds) // 2) + ["fit"]:
        raise ConfigError(f"{where}: its steps are {', '.join(kinds)}; they must be fit, upcycle, fit")
    return steps


def _check_overrides(where: str, overrides: Overrides) -> None:
    for key in overrides:
        if key in RESERVED:
            raise ConfigError(f"{where} sets {key}, which the study sets in every run; leave it out")


def _seeds(where: str, value: Any) -> list[int]:
    seeds = value if isinstance(value, list) else [value]
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        raise ConfigError(f"{where}: seeds is {value!r}; give a list of whole numbers, such as [1, 2, 3, 4]")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{where}: seeds {seeds} holds a number twice, which would be counted as two runs; take it out once"
        )
    return seeds


def _budget(where: str, value: Any) -> dict[str, int]:
    if value is None:
        return {}
    if not (isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in ("steps", "tokens")):
        raise ConfigError(f"{where}: budget is {value!r}; give steps or tokens, such as {{steps: 300}}")
    ((unit, number),) = value.items()
    if not (isinstance(number, int) and number > 0):
        raise ConfigError(f"{where}: budget has {number!r} {unit}; give a whole number above 0")
    return {unit: number}


def _match(where: str, value: Any) -> list[str]:
    wanted = [] if value in (None, "none") else value if isinstance(value, list) else [value]
    for name in wanted:
        if name not in MATCHES:
            raise ConfigError(f"{where}: match is {name!r}; choose none, or of {', '.join(MATCHES)}")
    return wanted


def _gain(where: str, content: Mapping[str, Any], arms: Mapping[str, Any]) -> dict[str, str]:
    found = {str(role): str(arm) for role, arm in _mapping(where, content, "gain")}
    if not found:
        return {}
    if set(found) != set(ROLES) or not set(found.values()) <= set(arms) or len(set(found.values())) < len(ROLES):
        raise ConfigError(
            f"{where}: gain is {found}; name two arms, such as {{random: {next(iter(arms))}, oracle: {list(arms)[-1]}}}"
        )
    return found


def _tasks(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(key): value for key, value in _mapping(where, content, "tasks")}
    _check_keys(f"{where}: tasks", found, [*TASK_NAMES, *TASK_NUMBERS])
    if found and not (found.get("tasks") or found.get("text")):
        raise ConfigError(f"{where}: tasks names none; give tasks, such as {{tasks: [moebed_recall]}}, or text")
    for key in TASK_NUMBERS:
        if key in found and not (isinstance(found[key], int) and found[key] >= 0):
            raise ConfigError(f"{where}: tasks has {key} {found[key]!r}; give a whole number")
    return found


def _number(where: str, key: str, value: Any) -> float:
    if not isinstance(value, int | float) or value < 0:
        raise ConfigError(f"{where}: {key} is {value!r}; give a number of at least 0, such as 0.02")
    return float(value)


def _mapping(where: str, content: Mapping[str, Any], key: str) -> Iterable[tuple[Any, Any]]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} must hold names with values")
    return value.items()


def _check_keys(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {did_you_mean(key, known, _known(known))}")


def _known(names: Iterable[str]) -> str:
    return f"the known ones are {', '.join(names)}"
