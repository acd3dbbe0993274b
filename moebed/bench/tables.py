"""Tables of ``moebed bench experts`` and ``moebed bench kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moebed.model.native.compiled import NAMES as INSTRUCTION_SETS


def _show(table: Table, width: int) -> None:
    Console(width=max(width, Console().width)).print(table)


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    table = Table(title=title)
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="left" if number < left else "right", no_wrap=number == 0)
    return table


def _spread(ratio: Sequence[float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f} \\[{ratio[0]:.2f}, {ratio[2]:.2f}]"


def experts(found: dict[str, Any]) -> None:
    """One case in one type."""
    best = found["best_transformers"] or "transformers"
    title = (
        f"{found['case']}, {found['dtype']}, {found['device']}: {found['sizes']}\n"
        f"median \\[least, most] of {found['rounds']} rounds; more is faster"
    )
    columns = ["expert MLP", "", "ms", f"over {best}", "over dense", "share of products", "peak MB", "difference"]
    table = _table(title, columns, 2)
    for row in found["rows"]:
        for phase, label in (("forward", "forward"), ("both", "forward+backward")):
            last = phase == "both"
            table.add_row(
                row["name"] if not last else "",
                label,
                f"{1e3 * row[phase + '_seconds']:.2f}",
                *(_spread(row.get(f"{phase}_over_{base}")) for base in ("best_transformers", "dense", "products")),
                f"{row['peak_bytes'] / 1e6:.0f}" if last and "peak_bytes" in row else "",
                _difference(row) if last else "",
            )
    shares = [f"{r['name']} {r['share_of_roofline']:.2f}" for r in found["rows"] if "share_of_roofline" in r]
    notes = ["a router is no part of any contestant; peak memory is that of forward+backward, weights not counted"]
    if shares:
        notes.append(f"share of the roofline, forward+backward: {', '.join(shares)}")
    if found["instruction_set"] is not None:
        notes.append(f"moebed native ran on {INSTRUCTION_SETS[found['instruction_set']]}")
    notes += [f"left out: {name}: {why}" for name, why in found["left_out"].items()]
    table.caption = "\n".join(notes).replace("[", "\\[")
    table.caption_justify = "left"
    _show(table, 140)


def _difference(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    return f"{row['difference']:.1e}" + ("" if row["agrees"] else " DIFFERS: no ratio")


def gates(found: dict[str, Any]) -> None:
    """Kernels and their gates."""
    columns = ["kernel", "", "", "regs", "spills", "shared", "CTA/SM", "loop / MMA", "ρ", "AI", "stages", "in flight"]
    table = _table("kernels as compiled", [*columns, "missed gates"], 3)
    for row in found["rows"]:
        facts = row["facts"]
        # Names of types would run into those of architectures, so the two have a column each.
        name = [row["kernel"], row["arch"], row["dtype"]]
        if facts is None:
            table.add_row(*name, *[""] * 9, row["error"].replace("[", "\\["))
            continue
        instructions = sum(facts["mma"].values())
        missed = [g for g in row["gates"] if not g["held"]]
        table.add_row(
            *name,
            str(facts["registers"]),
            str(facts["spills"]),
            str(facts["shared"]),
            str(row["programs"]),
            f"{facts['loop']}/{instructions}" if instructions else "",
            f"{row['rho']:.2f}" if row["rho"] is not None else "",
            f"{row['intensity']:.0f}" if row["intensity"] else "",
            str(facts["stages"] or ""),
            str(facts["in_flight"]) if facts["in_flight"] >= 0 else "",
            ", ".join(f"{g['name']} {g['measured']:.3g} ({g['bound']})" for g in missed),
        )
    held = sum(g["held"] for row in found["rows"] for g in row["gates"])
    total = sum(len(row["gates"]) for row in found["rows"])
    table.caption = (
        f"{held} of {total} gates hold; ρ: loop instructions per warp / tensor-core cycles; AI: FLOP per byte"
    )
    _show(table, 170)
    if found["best"]:
        reach = _table("best configuration of each product, sm_90", ["op", "ρ", "AI", "missed"])
        for op, (ratio, intensity) in found["best"].items():
            missed = [f"{g['name']} {g['bound']}" for g in (ratio, intensity) if not g["held"]]
            reach.add_row(op, f"{ratio['measured']:.2f}", f"{intensity['measured']:.0f}", ", ".join(missed))
        _show(reach, 80)


def roofline(found: dict[str, Any]) -> None:
    """Expected bytes and bounds of the designs."""
    title = "expected bytes = 2(a·TH + b·RH + c·RF) + d·W and the bound of an H100, T = 8192, bf16"
    table = _table(title, ["", "", "design", "a", "b", "c", "d", "GB", "ms"], 3)
    last = None
    for row in found["roofline"]:
        where = (row["shape"], row["direction"])
        if last is not None and where != last:
            table.add_section()
        cells = [f"{value:.3g}" for value in row["coefficients"]]
        head = where if where != last else ("", "")
        table.add_row(*head, row["design"], *cells, f"{row['gigabytes']:.2f}", f"{row['milliseconds']:.2f}")
        last = where
    _show(table, 110)
    padding = _table("rows that padding adds, experts drawn evenly", ["op", "shape", "share", "E·(step − 1)/2R"], 2)
    for row in found["padding"]:
        padding.add_row(row["op"], row["shape"], f"{row['drawn']:.3f}", f"{row['half_a_step']:.3f}")
    _show(padding, 80)
