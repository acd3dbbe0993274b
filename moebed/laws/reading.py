"""A table of runs, from a CSV file or a study's ``study.json``, and the columns that a law takes of it."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moebed.data.file_formats import not_utf8
from moebed.errors import UserError
from moebed.laws.contract import Array, Law, LossLaw, Shape, training_flops
from moebed.machine.storage import reason_of

# Column of ours -> what it may be called, and in words.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "N": ("parameters", "params"),  # whatever the law means by it
    "dense_parameters": ("n_dense", "dense_params"),
    "active_parameters": ("n_active", "active_params", "active"),
    "total_parameters": ("n_total", "total_params", "total"),
    "total_nonembedding_parameters": ("n_total_nonembedding",),
    "tok": ("tokens", "D", "training_tokens", "dataset_size"),
    "E": ("experts", "num_experts", "n_experts"),
    "K": ("top_k", "num_experts_per_tok", "experts_per_token"),
    "G": ("granularity",),
    "expansion_rate": ("expansion",),
    "A": ("activation_ratio",),
    "flops": ("C", "training_flops", "compute"),
    "loss": ("L", "val_loss", "val/loss", "validation_loss"),
    "leverage": ("EL", "efficiency_leverage"),
}


def _folded(name: str) -> str:
    """Case matters in names of one letter alone: A is not a."""
    return name if len(name) == 1 else name.lower()


_NAMES = {_folded(name): ours for ours, names in COLUMNS.items() for name in (ours, *names)}
MOST = 1e60  # what is larger is a slip of the pen, and more than numbers of a law can be multiplied with
_COMMA = re.compile(r"[-+]?\d*,\d+([eE][-+]?\d+)?")
_TOO_OLD = "does not say what its arms' models are; run `moebed study RECIPE.yaml --collect` again"


@dataclass(frozen=True)
class RunTable:
    """Runs as numbers.

    Args:
        name: Of the file.
        columns: By our name, (n,) each, finite and positive.
        notes: What a reader must know of it: rows and columns that were left out, defaults.
    """

    name: str
    columns: dict[str, Array]
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """n."""
        return len(next(iter(self.columns.values())))


def read_table(path: Path) -> RunTable:
    """Read a table of runs.

    Args:
        path: A study's ``study.json``, or a CSV file whose first line names its columns.

    Raises:
        UserError: It is missing, damaged, or has a number that cannot be one.
    """
    if path.is_dir():
        inside = path / "study.json"
        advice = f"give {inside}" if inside.is_file() else "give a CSV file or a study.json"
        raise UserError(f"{path} is a folder, and no table of runs; {advice}")
    if path.suffix.lower() == ".json":
        return _read_study(path)
    return _read_csv(path)


def _read_csv(path: Path) -> RunTable:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, error)) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); give a CSV file or a study.json") from error
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    lines = enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1)
    rows = [(number, row) for number, row in lines if any(cell.strip() for cell in row)]  # ,,, ends a spreadsheet's
    if len(rows) < 2:
        raise UserError(f"{path} has no runs: its first line must name the columns, and each other be a run")
    names, unknown = [cell.strip() for cell in rows[0][1]], []
    known: dict[str, int] = {}
    for index, name in enumerate(names):
        ours = _NAMES.get(_folded(name))
        if ours is None:
            unknown += [name] if name else []  # a spreadsheet's line may end in empty cells
        elif ours in known:
            raise UserError(f"{path}: columns {names[known[ours]]!r} and {name!r} both mean {ours}; leave one of them")
        else:
            known[ours] = index
    if not known:
        raise UserError(
            f"{path}: no column is known, of {', '.join(names)}; the first line names them, and known are "
            f"{', '.join(COLUMNS)}"
        )
    columns: dict[str, list[float]] = {ours: [] for ours in known}
    for number, row in rows[1:]:
        if len(row) != len(names):
            raise UserError(f"{path}, line {number}: {len(row)} cells under {len(names)} columns; mend the line")
        for ours, index in known.items():
            columns[ours].append(_number(row[index], f"{path}, line {number}, column {names[index]}"))
    notes = [f"not used: column{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"] if unknown else []
    if again := _repeated(rows[1:]):
        shown = ", ".join(map(str, again[:5])) + (", ..." if len(again) > 5 else "")
        notes.append(
            f"{len(again)} line{'s' if len(again) > 1 else ''} repeat{'' if len(again) > 1 else 's'} an earlier one in "
            f"every cell (line {shown}), and each counts as a run: take out what is there twice, or intervals are too "
            "narrow"
        )
    return RunTable(path.name, {ours: np.array(values) for ours, values in columns.items()}, notes)


def _repeated(rows: Sequence[tuple[int, list[str]]]) -> list[int]:
    """Numbers of the lines that are as an earlier one."""
    first: dict[tuple[str, ...], int] = {}
    return [number for number, row in rows if first.setdefault(tuple(row), number) != number]


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        advice = "write a point for the comma" if _COMMA.fullmatch(cell.strip()) else "mend the cell"
        raise UserError(f"{where}: {cell!r} is no number; {advice}, or take the line out") from None
    if not 0 < value < MOST:
        raise UserError(
            f"{where} is {cell.strip()}; it must be finite, above 0 and below {MOST:g}: leave out runs that diverged"
        )
    return value


def _read_study(path: Path) -> RunTable:
    from moebed.study.files import load_study

    study = load_study(path)
    rows: list[dict[str, float]] = []
    notes = []
    for name, arm in study["arms"].items():
        if "sizes" not in arm:
            raise UserError(f"{path} {_TOO_OLD}")
        sizes = arm["sizes"]
        if arm["steps_before"]:
            notes.append(f"left out: arm {name}, which was trained in several steps")
        elif sizes is None:
            notes.append(f"left out: arm {name}, whose layers have experts of several numbers or widths")
        else:
            own = {"tok": arm["tokens"], "flops": 3 * arm["active_flops_per_token"] * arm["tokens"], **sizes}
            for seed, run in arm["runs"].items():
                if run["status"] == "finished" and run["loss"] is not None:
                    rows.append({**own, "loss": _number(str(run["loss"]), f"{path}, arm {name}, seed {seed}")})
                else:
                    notes.append(f"left out: arm {name}, seed {seed}: {run['status']}")
    if not rows:
        raise UserError(f"{path} has no finished run that a law can be fitted to: {'; '.join(notes)}")
    columns = {key: np.array([row[key] for row in rows], dtype=np.float64) for key in rows[0]}
    return RunTable(f"study {study['name']}", columns, notes)


def select(law: Law, table: RunTable) -> RunTable:
    """The columns that a law needs, under the names that it has for them.

    Args:
        law: The law.
        table: All columns.

    Raises:
        UserError: One is missing, or a run cannot be.
    """
    columns, notes = dict(table.columns), list(table.notes)
    if law.size in columns:
        columns["N"] = columns[law.size]
    elif law.size and "N" in columns:
        notes.append(f"N is taken as {law.size_words}")
    if "K" in columns and "E" in columns and (columns["K"] > columns["E"]).any():
        raise UserError(
            f"{table.name}: a run has more experts a token (K) than experts (E); "
            "exchange the columns, or take the run out"
        )
    if isinstance(law, LossLaw):
        _complete_shape(law, columns, table.runs, notes)
    if "E" in columns and "K" in columns:
        columns["S"] = 1 - columns["K"] / columns["E"]
        columns.setdefault("A", columns["K"] / columns["E"])
    if "flops" not in columns and {"active_parameters", "tok"} <= set(columns):
        columns["flops"] = training_flops(columns["active_parameters"], columns["tok"])
    if law.target == "leverage" and "leverage" not in columns:
        columns = _leverage(columns, table.name, notes)
    missing = [name for name in law.needs if name not in columns]
    if missing:
        called = ", ".join(f"{name} (or {law.size})" if name == "N" else _called(name) for name in missing)
        unused = f"; {table.notes[0]}" if table.notes and table.notes[0].startswith("not used") else ""
        raise UserError(f"{table.name}: the law {law.form} needs {', '.join(law.needs)}; missing: {called}{unused}")
    if isinstance(law, LossLaw):
        shapes = Shape(columns["E"], columns["K"], columns["G"])  # type: ignore[arg-type]
        columns["flops"] = law.flops_per_token(columns["N"], shapes) * columns["tok"]
    kept = dict.fromkeys([*law.needs, *law.varies, "E", "K", "G", "flops"])
    return RunTable(table.name, {name: columns[name] for name in kept if name in columns}, notes)


def _complete_shape(law: LossLaw, columns: dict[str, Array], runs: int, notes: list[str]) -> None:
    """E as the law means it, and what a table without a column of the shape is taken to mean."""
    if law.experts in columns:
        columns["E"] = columns[law.experts]
    for column in ("E", "K", "G"):
        if column in columns or column in law.needs:
            continue
        value = law.default(law.experts if column == "E" else column, columns)
        if value is not None:
            columns[column] = np.broadcast_to(value, (runs,)).astype(np.float64)
            taken = "/".join(f"{v:g}" for v in np.unique(columns[column]))
            notes.append(f"no column {column}: {taken} is taken")


def _called(name: str) -> str:
    return f"{name} (also {', '.join(COLUMNS[name])})" if COLUMNS.get(name) else name


def _leverage(columns: dict[str, Array], name: str, notes: list[str]) -> dict[str, Array]:
    """Leverage of the runs with experts from the table's own dense runs: their FLOPs at an equal loss.

    Between the dense runs' lowest losses the logarithm of FLOPs is interpolated; beyond them nothing is claimed.
    """
    if not {"loss", "A", "flops"} <= set(columns):
        return columns
    dense = columns["A"] == 1
    if dense.sum() < 2 or dense.all():
        raise UserError(
            f"{name}: efficiency leverage is over dense models; give a column leverage, or runs with a loss of which "
            "at least two are dense (E 1) and others are not"
        )
    order = np.argsort(columns["flops"][dense], kind="stable")
    flops, losses = columns["flops"][dense][order], np.minimum.accumulate(columns["loss"][dense][order])
    first = np.concatenate([[True], np.diff(losses) < 0])  # the least FLOPs that reach each loss
    within = ~dense & (columns["loss"] <= losses.max()) & (columns["loss"] >= losses.min())
    outside = int((~dense & ~within).sum())
    if outside:
        notes.append(f"left out: {outside} runs whose loss lies beyond those of the dense runs")
    if not within.any():
        raise UserError(
            f"{name}: no run's loss lies between those of the dense runs, so that none can be compared; "
            "train dense runs longer or of other sizes"
        )
    needed = np.interp(columns["loss"][within], losses[first][::-1], np.log(flops[first])[::-1])
    kept = {key: np.asarray(value)[within] for key, value in columns.items()}
    return {**kept, "leverage": np.exp(needed) / kept["flops"]}
