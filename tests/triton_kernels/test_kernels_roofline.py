"""The roofline's formulas beside the figures that KERNELS.md prints, and our own bytes beside the peers'."""

import dataclasses
import re

import pytest

pytest.importorskip("triton")

from tests.conftest import SHARED
from triton_kernels.gates import roofline
from triton_kernels.shipped import SHIPPED

# a, b, c, d of KERNELS.md's table.
COEFFICIENTS = {
    "ideal": ((2, 0, 0, 1), (3, 0, 2, 2)),
    "Liger": ((2, 2, 4, 1), (5, 2, 10, 3)),
    "ScatterMoE": ((2, 2, 6, 1), (4, 8, 11, 3)),
    "argsort, index, grouped_mm, index_add": ((4, 6, 6, 1), (3, 9, 11, 2)),
}
# ms at T = 8192 as KERNELS.md prints them: products only, Liger, ScatterMoE, unfused.
PRINTED = {
    "Mixtral 8x7B": ((5.84, 5.90, 6.32, 6.50), (11.67, 12.59, 13.46, 12.63)),
    "DeepSeekMoE-16B": ((0.86, 0.93, 1.05, 1.26), (1.72, 2.17, 2.54, 2.26)),
    "OLMoE": ((0.83, 0.92, 1.04, 1.31), (1.67, 2.02, 2.47, 2.30)),
}
DIRECTIONS = ("forward", "backward")


@pytest.mark.parametrize("design", COEFFICIENTS)
def test_passes_add_up_to_the_published_coefficients(design):
    for direction, expected in zip(DIRECTIONS, COEFFICIENTS[design], strict=True):
        assert roofline.coefficients(roofline.DESIGNS[design][direction]) == pytest.approx(expected)


@pytest.mark.parametrize("shape", roofline.SHAPES, ids=lambda shape: shape.name)
def test_bounds_are_the_printed_milliseconds(shape):
    for direction, printed in zip(DIRECTIONS, PRINTED[shape.name], strict=True):
        designs = [roofline.DESIGNS[design][direction] for design in COEFFICIENTS]
        found = [round(roofline.milliseconds(passes, shape), 2) for passes in designs]
        assert found == list(printed)


@pytest.mark.shared("KERNELS.md")
def test_printed_figures_are_those_of_the_file():
    line = next(line for line in (SHARED / "KERNELS.md").read_text().splitlines() if line.startswith("ms at T = 8192"))
    groups = re.findall(r"(?:\d*\.\d+/){3}\d*\.\d+", line)
    expected = [
        "/".join(f"{value:.2f}".lstrip("0") for value in PRINTED[shape.name][i])
        for i in (0, 1)
        for shape in roofline.SHAPES
    ]
    assert groups == expected


@pytest.mark.parametrize("shape", roofline.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_our_launches_move_less_than_the_peers(shape, arch):
    ours = roofline.launches(SHIPPED, arch, "bf16")
    assert sum(each.flops for each in ours["forward"]) == 6
    assert sum(each.flops for each in ours["backward"]) == 12
    for direction in DIRECTIONS:
        moved = roofline.total_bytes(ours[direction], shape)
        assert moved < roofline.total_bytes(roofline.DESIGNS["ScatterMoE"][direction], shape)
        assert moved > roofline.total_bytes(roofline.DESIGNS["ideal"][direction], shape)
    backward = roofline.DESIGNS["Liger"]["backward"]
    assert roofline.total_bytes(ours["backward"], shape) < 0.9 * roofline.total_bytes(backward, shape)
    forward = roofline.DESIGNS["Liger"]["forward"]
    assert roofline.total_bytes(ours["forward"], shape) <= roofline.total_bytes(forward, shape)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_coefficients_of_our_launches(arch):
    """Training forward as Liger's; 2 less without gradients; backward below it in each coefficient but c.

    c is 2 above Liger's, whose product ends with the activation's backward: a pass of its own writes and reads its
    rows once more, and took less time on an H200.
    """
    ours = roofline.launches(SHIPPED, arch, "bf16")
    assert roofline.coefficients(ours["forward"]) == pytest.approx((2, 2, 4, 1))
    assert roofline.coefficients(ours["backward"]) == pytest.approx((4, 2, 12, 2))
    rows = [row for row in roofline.compare(SHIPPED, arch) if row["design"] == "ours, no gradients"]
    assert [row["direction"] for row in rows] == ["forward"] * len(roofline.SHAPES)
    for row in rows:
        copied = 2 * (arch == "sm_90" and row["shape"] == "Mixtral 8x7B")
        assert row["coefficients"] == pytest.approx((2, 2 + copied, 2, 1))


def test_sorted_rows_move_more_bytes_and_multiply_as_often():
    """A copy forward; backward one of dY and one of x again. Products then read R rows, where they read T."""
    ours = roofline.launches(SHIPPED, "sm_90", "bf16", width=14336)
    assert [sum(each.flops for each in ours[direction]) for direction in DIRECTIONS] == [6, 12]
    assert roofline.coefficients(ours["forward"]) == pytest.approx((2, 4, 4, 1))
    assert roofline.coefficients(ours["backward"]) == pytest.approx((3, 7, 12, 2))
    assert roofline.launches(SHIPPED, "sm_90", "bf16", width=1408) == roofline.launches(SHIPPED, "sm_90", "bf16")
    assert roofline.launches(SHIPPED, "sm_100", "bf16", width=14336) == roofline.launches(SHIPPED, "sm_100", "bf16")


def test_bytes_follow_the_arguments_of_the_kernels():
    """One more pass over a tensor in a spec shows in the figure."""
    shape = roofline.SHAPES[0]
    spec = next(spec for spec in roofline.launched(SHIPPED, "sm_90", "bf16") if spec.op == "down")
    name, argument = next((n, a) for n, a in spec.arguments.items() if a.shape == "RH")
    twice = dataclasses.replace(spec, arguments={**spec.arguments, name: dataclasses.replace(argument, passes=2.0)})
    more = roofline.pass_of(twice, "bf16").bytes(shape) - roofline.pass_of(spec, "bf16").bytes(shape)
    assert more == 2 * shape.rows * shape.hidden
    assert roofline.pass_of(spec, "fp32").bytes(shape) == 2 * roofline.pass_of(spec, "bf16").bytes(shape)


def test_a_pass_takes_the_longer_of_its_two_bounds():
    shape = roofline.Shape("tiny", 8, 16, 2, 1, tokens=4)
    each = roofline.Pass(6, (roofline.Move("TH", 2),))
    assert each.bytes(shape) == 2 * 2 * 4 * 8
    assert each.seconds(shape, flops=1.0, bandwidth=1e9) == 6 * 4 * 8 * 16
    assert each.seconds(shape, flops=1e9, bandwidth=1.0) == 128


def test_tile_waste():
    assert roofline.tile_waste([128, 0, 256], 128) == 0
    assert roofline.tile_waste([1, 0, 127], 128) == 1.0
    assert roofline.tile_waste([0, 0], 64) == 0


@pytest.mark.parametrize("shape", roofline.SHAPES, ids=lambda shape: shape.name)
def test_padding_is_what_half_a_step_an_expert_comes_to(shape):
    for spec in roofline.launched(SHIPPED, "sm_90", "bf16"):
        if spec.is_product:
            drawn, bound = roofline.wasted_share(spec, shape)
            assert drawn == pytest.approx(bound, rel=0.05)
            assert bound < 0.1


def test_smaller_steps_waste_less():
    spec = next(spec for spec in SHIPPED if spec.is_product)
    half = dataclasses.replace(spec, row_step=spec.tile[0] // 2)
    shape = roofline.SHAPES[1]
    assert roofline.wasted_share(half, shape)[0] == pytest.approx(roofline.wasted_share(spec, shape)[0] / 2, rel=0.05)


@pytest.mark.parametrize(
    ("loads", "most"),
    [(range(1, 64), 1.0), (range(64, 257), 1.0), (range(257, 512, 16), 1.34), (range(513, 4096, 64), 1.25)],
    ids=["decode", "up to 256", "up to 512", "more"],
)
@pytest.mark.parametrize("shape", roofline.SHAPES, ids=lambda shape: shape.name)
def test_what_tiles_of_128_rows_cost_at_any_load(shape, loads, most):
    """Up to 256 rows an expert, reading the matrices takes longer than the padded product."""
    specs = [spec for spec in roofline.launched(SHIPPED, "sm_90", "bf16") if spec.is_product]
    for load in loads:
        at = dataclasses.replace(shape, tokens=max(1, load * shape.experts // shape.top_k))
        assert max(roofline.padded_share(spec, at) for spec in specs) <= most, load
