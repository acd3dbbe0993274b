"""The gates: what a kernel's machine code must show before it ships, each with the number that was measured.

They veto and catch regressions; they do not rank, since L2 hits, imbalance and clocks are invisible here. ρ is loop
instructions per warp over the cycles that their products keep a tensor core busy; AI = BM·BN/(BM+BN) is FLOPs per
byte of 2-byte operands that a program reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from triton_kernels.gates.compile import CompileError, facts_of
from triton_kernels.gates.facts import Facts
from triton_kernels.spec import KernelSpec


@dataclass(frozen=True)
class Machine:
    """What one multiprocessor of an architecture holds (vendors' programming guides)."""

    shared: int  # bytes of shared memory that one program may take
    shared_all: int  # bytes of all programs together
    reserved: int  # bytes that each program takes besides
    registers: int  # 32-bit registers
    granule: int  # registers of a thread are handed out in these
    threads: int
    tensor_flops: int  # 16-bit FLOPs a cycle
    warp: int = 32


MACHINES = {
    "sm_80": Machine(166_912, 167_936, 1024, 65_536, 8, 2048, 2048),
    "sm_86": Machine(101_376, 102_400, 1024, 65_536, 8, 1536, 1024),
    "sm_89": Machine(101_376, 102_400, 1024, 65_536, 8, 1536, 1024),
    "sm_90": Machine(232_448, 233_472, 1024, 65_536, 8, 2048, 4096),
    "sm_100": Machine(232_448, 233_472, 1024, 65_536, 8, 2048, 8192),
    "sm_120": Machine(101_376, 102_400, 1024, 65_536, 8, 1536, 1024),
    "gfx942": Machine(65_536, 65_536, 0, 4 * 512 * 64, 8, 2048, 2048, 64),
}
SIXTEEN_BIT = ("fp16", "bf16")
MAX_RHO, BEST_RHO = 0.45, 0.25
MIN_INTENSITY, BEST_INTENSITY = 64.0, 85.0


@dataclass(frozen=True)
class Gate:
    """One gate: its name, what was measured, what is asked, and whether it holds."""

    name: str
    measured: float
    bound: str
    held: bool


@dataclass(frozen=True)
class Row:
    """One kernel for one element type and architecture; ``facts`` is None where the compiler refused it."""

    kernel: str
    op: str
    dtype: str
    arch: str
    facts: Facts | None
    rho: float | None = None
    intensity: float = 0.0
    useful: float | None = None
    programs: int = 0
    gates: list[Gate] = field(default_factory=list)
    error: str = ""

    @property
    def missed(self) -> list[Gate]:
        """Gates that do not hold."""
        return [gate for gate in self.gates if not gate.held]

    def plain(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def programs_per_multiprocessor(facts: Facts, machine: Machine) -> int:
    """Programs that fit on one multiprocessor at a time by registers, shared memory and threads."""
    threads = facts.warps * machine.warp
    registers = -(-max(facts.registers, 1) // machine.granule) * machine.granule
    fits = [machine.registers // (registers * threads), machine.threads // threads]
    if facts.shared > machine.shared:
        return 0
    if facts.shared + machine.reserved:
        fits.append(machine.shared_all // (facts.shared + machine.reserved))
    return min(fits)


def rho(spec: KernelSpec, facts: Facts, arch: str) -> float | None:
    """Loop instructions per warp over tensor-core cycles; None where the kernel has no products or the code no shape.

    tcgen05 instructions keep their shape in a descriptor: on sm_100 the cycles are those of the spec's own FLOPs.
    """
    if not facts.loop or not facts.mma:
        return None
    cycles = facts.tensor_cycles
    if any(name.startswith("UTC") for name in facts.mma):
        cycles = spec.loop_flops / MACHINES[arch].tensor_flops
    return facts.loop / cycles if cycles else None


def issued_over_useful(spec: KernelSpec, facts: Facts) -> float | None:
    """FLOPs that the loop issues over those of the spec; None where the instructions do not tell their shape."""
    if not facts.mma_flops or not spec.loop_flops:
        return None
    issuers = spec.num_warps
    if "HGMMA" in facts.mma:  # issued by groups of four warps
        issuers = spec.num_warps // 4
    return facts.mma_flops * issuers / spec.loop_flops


def wide_share(spec: KernelSpec, facts: Facts) -> float:
    """Of the two operands' bytes in one step of the loop (16-bit elements), what asynchronous wide loads bring.

    TMA moves a whole operand: both, or the matrices beside rows that are gathered by other loads.
    """
    rows, columns, depth = spec.tile
    by_tma = facts.loads.get("tma", 0)
    if by_tma and len(facts.loads) == 1:
        return float(by_tma >= 2)
    loaded = facts.loads.get("128", 0) * 16 * 32 * spec.num_warps + 2 * columns * depth * bool(by_tma)
    return loaded / (2 * (rows + columns) * depth)


def _at_least(name: str, measured: float, bound: float) -> Gate:
    return Gate(name, measured, f"≥ {bound:g}", measured >= bound)


def _at_most(name: str, measured: float, bound: float) -> Gate:
    return Gate(name, measured, f"≤ {bound:g}", measured <= bound)


def _none(name: str, measured: int) -> Gate:
    return Gate(name, measured, "0", measured == 0)


def gates_of(spec: KernelSpec, dtype: str, arch: str, facts: Facts) -> list[Gate]:
    """The gates that apply to this kernel, type and architecture, checked."""
    gates = [
        _none("spills", facts.spills),
        _none("local memory in the loop", facts.loop_spills),
        _at_least("programs per multiprocessor", programs_per_multiprocessor(facts, MACHINES[arch]), 1),
    ]
    if not spec.is_product or dtype not in SIXTEEN_BIT:
        return gates
    family = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}.get(arch, "HMMA")
    right = sum(count for name, count in facts.mma.items() if name.startswith(family))
    gates.append(_at_least(f"{family}{'*MMA' if family == 'UTC' else ''} in the loop", right, 1))
    gates.append(_none("other matrix instructions", sum(facts.mma.values()) - right))
    if arch == "gfx942":
        return gates
    # A gathered index is four bytes; that the operands themselves are wide, the share below says.
    indices = facts.narrow_loads if spec.gathers_indices else 0
    gates += [
        _none("narrow loads in the loop", facts.narrow_loads - indices),
        _none("loads through registers in the loop", max(0, facts.plain_loads - indices)),
        _at_least("share of the operands by 128-bit asynchronous loads or TMA", wide_share(spec, facts), 1),
        _none("narrow stores", facts.narrow_stores),
        _none("stores to shared memory in the loop", facts.shared_stores),
        _none("layout conversions in the loop", facts.conversions),
    ]
    useful = issued_over_useful(spec, facts)
    if useful is not None:
        gates.append(Gate("products issued / useful", useful, "1", useful == 1.0))
    if arch == "sm_90":
        gates += _hopper(spec, facts, arch)
    return gates


def _hopper(spec: KernelSpec, facts: Facts, arch: str) -> list[Gate]:
    ratio = rho(spec, facts, arch)
    gates = [_at_least("stages", facts.stages, 3), _at_least("AI", spec.intensity, MIN_INTENSITY)]
    gates.append(_at_most("ρ", float("inf") if ratio is None else ratio, MAX_RHO))
    gates.append(_at_least("products in flight at the wait", facts.in_flight, 1))
    return gates


def check(spec: KernelSpec, dtype: str, arch: str) -> Row:
    """Compile one kernel and hold it to its gates."""
    try:
        facts = facts_of(spec, dtype, arch)
    except CompileError as error:
        refused = Gate("compiles", 0, "1", False)
        return Row(spec.name, spec.op, dtype, arch, None, gates=[refused], error=str(error))
    return Row(
        spec.name,
        spec.op,
        dtype,
        arch,
        facts,
        rho(spec, facts, arch),
        spec.intensity,
        issued_over_useful(spec, facts),
        programs_per_multiprocessor(facts, MACHINES[arch]),
        gates_of(spec, dtype, arch, facts),
    )


def best_gates(rows: Iterable[Row]) -> dict[str, list[Gate]]:
    """Of each op with products on sm_90 in 16 bits, what its best configuration must reach."""
    of_op: dict[str, list[Row]] = {}
    for row in rows:
        if row.arch == "sm_90" and row.dtype in SIXTEEN_BIT and row.intensity:
            of_op.setdefault(row.op, []).append(row)
    return {
        op: [
            _at_most("best ρ", min((r.rho for r in found if r.rho is not None), default=float("inf")), BEST_RHO),
            _at_least("best AI", max(r.intensity for r in found), BEST_INTENSITY),
        ]
        for op, found in of_op.items()
    }
