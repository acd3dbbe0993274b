"""Every kernel that ships, as the compiler makes it for GPUs that are not here, held to the gates of KERNELS.md.

The fast set compiles one configuration of each op; the sweep over all of them is ``slow``. What a kernel misses today
is listed, gate by gate, so that a new miss fails and so does a miss that is gone.
"""

import dataclasses

import pytest

pytest.importorskip("triton")

from triton_kernels.gates import check, roofline
from triton_kernels.gates.compile import TARGETS, CompileError, compile_spec
from triton_kernels.gates.facts import Facts
from triton_kernels.precision import version
from triton_kernels.shipped import SHIPPED, WIDE_EVEN, candidates
from triton_kernels.spec import DTYPES, Argument

# Products in float32, by version: 3 accesses at odd sizes by Triton 3.6, 2 in TF32 by later ones.
SPILLS = {
    (3, 6): [("up", "sm_90")],
    (3, 7): [("grad_hidden", "sm_120"), ("up", "sm_100"), ("grad_down", "sm_100")],
    (3, 9): [("grad_hidden", "sm_120")],
}
# Gates that kernels miss today: (op, architecture, element type) -> names of gates.
MISSED: dict[tuple[str, str, str], set[str]] = {
    ("route_small", "gfx942", "bf16"): {"spills"},
    **{(*product, "fp32"): {"spills"} for product in SPILLS.get(version(), SPILLS[3, 9])},
}
# Masks in the loop in place of a last step after it: more instructions, and less time on an H100 where experts have few
# rows (recipes/gpu/results/h100.md).
MISSED_AT_BEST = {("grad_up", "best ρ"), ("grad_down", "best ρ")}

PRODUCTS = [spec for spec in roofline.launched(SHIPPED, "sm_90", "bf16") if spec.is_product]
FIRST = roofline.launched(SHIPPED, "sm_90", "bf16")
SORTED = [spec for spec in roofline.launched(SHIPPED, "sm_90", "bf16", WIDE_EVEN[1]) if spec.least_width]


def allowed(row: check.Row) -> set[str]:
    """What is known to be missed by a row."""
    return MISSED.get((row.op, row.arch, row.dtype), set())


def described(rows: list[check.Row]) -> str:
    """Misses with their numbers, for a message."""
    lines = [
        f"{r.kernel} {r.arch} {r.dtype}: {g.name} is {g.measured:.3g}, not {g.bound} {r.error}"
        for r in rows
        for g in r.missed
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "spec", [*FIRST, *SORTED], ids=lambda spec: spec.op + " of wide experts" * bool(spec.least_width)
)
def test_first_configuration_of_each_op_passes_on_sm_90(spec):
    row = check.check(spec, "bf16", "sm_90")
    assert {gate.name for gate in row.missed} <= allowed(row), described([row])


@pytest.mark.parametrize("op", ["down", "grad_rows", "grad_up"])
@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_the_products_most_at_risk_pass_elsewhere(arch, op):
    """Those with both operands by TMA, and the deepest pipeline, on a large and a small multiprocessor."""
    spec = next(spec for spec in roofline.launched(SHIPPED, arch, "bf16") if spec.op == op)
    row = check.check(spec, "bf16", arch)
    assert {gate.name for gate in row.missed} <= allowed(row), described([row])
    assert row.facts.shared <= check.MACHINES[arch].shared


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_that_ships_passes(arch, dtype):
    rows = [check.check(spec, dtype, arch) for spec in SHIPPED if arch in spec.archs and dtype in spec.dtypes]
    assert rows
    missed = [row for row in rows if {gate.name for gate in row.missed} - allowed(row)]
    assert not missed, described(missed)
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row.missed:
            found.setdefault((row.op, arch, dtype), set()).update(gate.name for gate in row.missed)
    listed = {key: gates for key, gates in MISSED.items() if key[1:] == (arch, dtype)}
    assert found == listed, "a miss that is listed is gone: take it off the list"
    if (arch, dtype) == ("sm_90", "bf16"):
        best = check.best_gates(rows)
        assert best.keys() == {spec.op for spec in PRODUCTS}
        assert {(op, gate.name) for op, gates in best.items() for gate in gates if not gate.held} == MISSED_AT_BEST


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", check.SIXTEEN_BIT)
@pytest.mark.parametrize("op", sorted({spec.op for spec in PRODUCTS}))
def test_every_candidate_passes(op, dtype):
    """What ``moebed check`` may put in place of a shipped tile, as it is chosen with no more look at machine code."""
    specs = [spec for spec in candidates() if spec.op == op]
    assert specs
    rows = [check.check(spec, dtype, arch) for spec in specs for arch in spec.archs]
    missed = [row for row in rows if {gate.name for gate in row.missed} - allowed(row)]
    assert not missed, described(missed)


@pytest.mark.parametrize("spec", PRODUCTS, ids=lambda spec: spec.op)
def test_unaligned_pointers_are_seen(spec):
    """Without 16-byte hints loads fall to narrow ones and the loop grows: the gates must notice.

    Descriptors hold their own alignment; where both operands come through them, the stores alone suffer.
    """
    arguments = {name: dataclasses.replace(each, aligned=False) for name, each in spec.arguments.items()}
    row = check.check(dataclasses.replace(spec, arguments=arguments), "bf16", "sm_90")
    missed = {gate.name for gate in row.missed}
    if spec.op in ("down", "grad_rows"):
        assert missed == {"narrow stores"}
        return
    assert "ρ" in missed
    assert "share of the operands by 128-bit asynchronous loads or TMA" in missed
    assert row.rho > 2 * check.check(spec, "bf16", "sm_90").rho


def test_too_large_a_tile_is_seen():
    """More shared memory than a multiprocessor has, or registers that spill."""
    spec = next(spec for spec in PRODUCTS if spec.op == "down")
    row = check.check(dataclasses.replace(spec, num_stages=6), "bf16", "sm_90")
    assert "programs per multiprocessor" in {gate.name for gate in row.missed}
    spec = next(spec for spec in PRODUCTS if spec.op == "up")
    row = check.check(dataclasses.replace(spec, num_warps=4), "bf16", "sm_90")
    assert {"spills"} <= {gate.name for gate in row.missed}


def test_specs_are_unique_and_describe_their_kernels():
    assert len({spec.name for spec in SHIPPED}) == len(SHIPPED)
    for spec in SHIPPED:
        assert set(spec.archs) <= set(TARGETS)
        assert set(spec.dtypes) <= set(DTYPES)
        assert not set(spec.kernel.arg_names) ^ (set(spec.arguments) | set(spec.constexprs)), spec.name


def test_a_spec_that_does_not_fit_its_kernel_is_one_error():
    spec = dataclasses.replace(SHIPPED[0], constexprs={})
    with pytest.raises(CompileError, match="the spec and the kernel disagree on"):
        compile_spec(spec, "bf16", "sm_90")
    row = check.check(spec, "bf16", "sm_90")
    assert [gate.name for gate in row.missed] == ["compiles"]
    assert "disagree" in row.error


def test_unknown_letters_are_refused():
    with pytest.raises(ValueError, match="its letters are among"):
        Argument("*T", shape="XY")


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "arch", "programs"),
    [
        (192, 4, 65536, "sm_90", 2),  # ScatterMoE's forward
        (128, 8, 65536, "sm_90", 2),  # Liger's
        (62, 8, 49152, "sm_90", 4),
        (176, 8, 147456, "sm_90", 1),
        (64, 4, 0, "sm_90", 8),
        (64, 4, 166913, "sm_80", 0),
        (64, 4, 65537, "gfx942", 0),
    ],
)
def test_programs_per_multiprocessor(registers, warps, shared, arch, programs):
    facts = Facts(registers=registers, spills=0, loop_spills=0, shared=shared, warps=warps, loop=0)
    assert check.programs_per_multiprocessor(facts, check.MACHINES[arch]) == programs


def test_a_gate_names_what_was_measured():
    spec = PRODUCTS[0]
    bad = Facts(
        registers=255,
        spills=7,
        loop_spills=3,
        shared=1024,
        warps=spec.num_warps,
        loop=1000,
        mma={"HMMA": 8},
        loads={"32": 64},
        narrow_loads=64,
        shared_stores=24,
        conversions=2,
        narrow_stores=16,
        in_flight=0,
        stages=2,
    )
    measured = {gate.name: gate.measured for gate in check.gates_of(spec, "bf16", "sm_90", bad) if not gate.held}
    assert measured == {
        "spills": 7,
        "local memory in the loop": 3,
        "HGMMA in the loop": 0,
        "other matrix instructions": 8,
        "narrow loads in the loop": 64,
        "share of the operands by 128-bit asynchronous loads or TMA": 0,
        "narrow stores": 16,
        "stores to shared memory in the loop": 24,
        "layout conversions in the loop": 2,
        "stages": 2,
        "products in flight at the wait": 0,
        "ρ": float("inf"),
    }
