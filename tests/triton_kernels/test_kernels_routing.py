"""Routing metadata and the combine: the kernels against plain torch, and what makes racing writes impossible."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels_interpreted import (  # noqa: F401
    combine_reference,
    combining,
    configs,
    interpreter,
    routing,
    routing_reference,
    shuffled,
)

CONFIG = configs.INTERPRETED
# Never by the one program, and blocks small enough that each of the four kernels takes several steps.
BY_FOUR = dataclasses.replace(CONFIG, routing_small=0, routing_block=64, routing_experts=32, routing_scan=32)


def _check(index: torch.Tensor, num_experts: int, *by) -> None:
    for config in by or (CONFIG, BY_FOUR):
        _equal(routing.route(index, num_experts, config), index, num_experts)


def _equal(meta, index: torch.Tensor, num_experts: int) -> None:
    assert meta.inside
    expected = routing_reference.route(index, num_experts, CONFIG.rows)
    for name, actual, wanted in zip(meta._fields, meta[:-1], expected, strict=False):
        if name == "tile_start":  # means nothing where there is no tile
            actual, wanted = actual[meta.tile_expert >= 0], wanted[meta.tile_expert >= 0]
        assert torch.equal(actual, wanted), name


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"),
    [(1, 1, 1), (63, 3, 2), (257, 64, 8), (100, 7, 3), pytest.param(2000, 64, 2, marks=pytest.mark.slow), (40, 100, 5)],
)
def test_routing_equals_sort(shuffled, tokens, num_experts, top_k):  # noqa: F811
    _check(torch.rand(tokens, num_experts).topk(top_k).indices, num_experts)


@pytest.mark.parametrize("expert", [0, 5, 7])
def test_routing_of_all_tokens_to_one_expert(interpreter, expert):  # noqa: F811
    _check(torch.full((130, 2), expert), 8)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 300), st.integers(1, 70), st.integers(1, 8), st.integers(0, 2**31),
    st.sampled_from([CONFIG, BY_FOUR]),
)  # fmt: skip
def test_routing_of_any_index(interpreter, tokens, num_experts, top_k, seed, config):  # noqa: F811
    generator = torch.Generator().manual_seed(seed)
    _check(torch.randint(num_experts, (tokens, top_k), generator=generator), num_experts, config)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 8), st.integers(0, 2**31))
def test_tiles_write_every_row_once(interpreter, tokens, num_experts, top_k, seed):  # noqa: F811
    """A row tile stores rows [start, min(start + BM, end of its expert)): these are disjoint and leave no row out."""
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(tokens, top_k, generator=generator).pow(3).mul(num_experts).to(torch.int32)
    meta = routing.route(skewed, num_experts, CONFIG)
    written = torch.zeros(tokens * top_k, dtype=torch.int64)
    for expert, start in zip(meta.tile_expert.tolist(), meta.tile_start.tolist(), strict=True):
        if expert >= 0:
            written[start : min(start + CONFIG.rows, int(meta.offsets[expert + 1]))] += 1
    assert torch.equal(written, torch.ones_like(written))
    assert torch.equal(meta.order[meta.slot.long()], torch.arange(tokens * top_k, dtype=torch.int32))


@pytest.mark.parametrize("outside", [torch.tensor(2**30, dtype=torch.int32), torch.tensor(2**32 + 1)])
def test_an_index_outside_is_left_out(interpreter, outside):  # noqa: F811
    """What guards a GPU between the assertion and its report: no row, no write, and nothing added by the combine."""
    index = torch.tensor([[0, 9], [-1, 2], [3, outside]], dtype=outside.dtype)
    for config in (CONFIG, BY_FOUR):
        meta = routing.route(index, 4, config)
        assert not meta.inside
        assert meta.slot.tolist() == [0, -1, -1, 1, 2, -1]
        assert meta.offsets.tolist() == [0, 1, 1, 2, 3]
    assert meta.slot.tolist() == [0, -1, -1, 1, 2, -1]
    assert meta.offsets.tolist() == [0, 1, 1, 2, 3]
    rows = torch.randn(6, 8)
    out = combining.combine(rows, meta.slot, torch.ones(3, 2), 2, CONFIG)
    assert torch.equal(out, rows[:3])


@pytest.mark.parametrize("config", [CONFIG, BY_FOUR])
def test_an_absent_assignment_has_no_row(shuffled, config):  # noqa: F811
    """Of weight 0, not of one below it, or of the index -1; by one launch and by four."""
    index, weight = torch.tensor([[0, -1], [2, 0], [1, 2]]), torch.tensor([[1.0, 1.0], [0.0, 0.5], [-0.5, 0.5]])
    meta = routing.route(index, 3, config, weight)
    assert meta.inside
    assert meta.slot.tolist() == [0, -1, -1, 1, 2, 3]
    assert meta.offsets.tolist() == [0, 2, 3, 4]
    assert (meta.order[:4].tolist(), meta.token[:4].tolist()) == ([0, 3, 4, 5], [0, 1, 2, 2])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (63, 8, 40), (130, 3, 200)])
def test_combine_equals_plain_torch(shuffled, tokens, top_k, width, weighted):  # noqa: F811
    rows, slot = torch.randn(tokens * top_k, width), torch.randperm(tokens * top_k).to(torch.int32)
    weight = torch.rand(tokens, top_k) if weighted else None
    out = combining.combine(rows, slot, weight, top_k, CONFIG)
    torch.testing.assert_close(out, combine_reference.combine(rows, slot, weight, top_k))
