"""Experts backends: the grouped one against the plain loop, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebed.errors import ConfigError
from moebed.model import experts as backends
from moebed.model.experts import BACKENDS, Experts
from moebed.model.grouped import grouped_mm, row_multiple, sort_by_expert, with_even_rows
from moebed.model.routers import Routing
from tests.conftest import tiny_config


def _experts(num_experts: int, **changes) -> Experts:
    config = tiny_config(num_experts=num_experts, num_experts_per_tok=1, **changes)
    experts = Experts(config, config.layer(0))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def _routing(index: torch.Tensor, num_experts: int) -> Routing:
    weight = torch.rand(index.shape).sort(dim=-1, descending=True).values.requires_grad_()
    empty = torch.empty(len(index), num_experts)
    return Routing(empty, empty, index, weight)


def _distinct(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    return torch.rand(num_tokens, num_experts).topk(top_k).indices


def _run(backend: str, experts: Experts, x: torch.Tensor, routing: Routing, target: torch.Tensor):
    inputs = [x, routing.topk_weight, *experts.parameters()]
    out = BACKENDS[backend](experts, x, routing)
    return out, torch.autograd.grad((out * target).sum(), inputs)


def _agree(experts: Experts, index: torch.Tensor, dtype=torch.float64):
    experts = experts.to(dtype)
    x = torch.randn(len(index), 32, dtype=dtype, requires_grad=True)
    routing = _routing(index, experts.num_experts)
    target = torch.randn(len(index), 32, dtype=dtype)
    out, grads = _run("grouped_mm", experts, x, routing, target)
    reference, reference_grads = _run("loop", experts, x, routing, target)
    # The weights stay float32 in both, as the router's are.
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, reference_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_equals_loop(act, bias):
    experts = _experts(8, hidden_act=act, experts_bias=bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=1.0)  # so that some of clamped_swiglu's are clamped
    _agree(experts, _distinct(100, 8, 2))


def test_experts_without_a_kernel_go_to_what_can_compute_them(capfd):
    """Said or refused by the name of the setting when they are made."""
    for changes, words in (
        ({"experts_bias": True}, "experts_bias gives them biases"),
        ({"hidden_act": "clamped_swiglu"}, "hidden_act is clamped_swiglu"),
    ):
        with pytest.raises(ConfigError, match=f"triton has no kernel for these experts .{words}"):
            tiny_config(experts_backend="triton", **changes)
        backends._said.clear()
        assert _experts(8, experts_backend="native", **changes).backend is BACKENDS["grouped_mm"]
        assert f"native is not to be had ({words}); grouped_mm serves instead" in capfd.readouterr().err
        auto, index = _experts(8, **changes), _distinct(1000, 8, 2)
        with torch.no_grad():
            found = auto(torch.randn(1000, 32), _routing(index, 8))
        assert found.shape == (1000, 32)
    with pytest.raises(ConfigError, match="autonomy's experts have no biases"):
        tiny_config(router="autonomy", router_options={"d_low": 4}, experts_bias=True)


def test_an_expert_by_itself_is_what_the_backends_make_of_it():
    """As probes run it: activations first, then the rest."""
    experts, x = _experts(4, hidden_act="clamped_swiglu", experts_bias=True), torch.randn(30, 32)
    index = torch.full((30, 1), 2)
    found = experts.finish(2, x, experts.activate(2, x))
    torch.testing.assert_close(found, experts.each(x, index)[:, 0], rtol=1e-5, atol=1e-5)


def test_empty_experts():
    index = torch.tensor([1, 6]).repeat(50, 1)
    _agree(_experts(8), index)


def test_all_tokens_on_one_expert():
    _agree(_experts(8), torch.full((130, 1), 5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.data())
def test_grouped_equals_loop_for_any_shape(num_tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    _agree(_experts(num_experts), _distinct(num_tokens, num_experts, top_k))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 150), st.integers(1, 20), st.sampled_from([1, 8, 64]), st.data())
def test_dispatch_is_a_permutation(num_tokens, num_experts, align, data):
    top_k = data.draw(st.integers(1, num_experts))
    index, weight = _distinct(num_tokens, num_experts, top_k), torch.rand(num_tokens, top_k) + 0.5
    dispatch = sort_by_expert(index, weight, num_experts, align)
    slots = dispatch.token_slot.flatten()
    assert slots.unique().numel() == num_tokens * top_k
    assert torch.equal(dispatch.slot_token[slots], torch.arange(num_tokens).repeat_interleave(top_k))
    assert torch.equal(dispatch.slot_weight[slots], weight.flatten())
    assert dispatch.slot_weight.count_nonzero() == num_tokens * top_k
    expert_of_slot = torch.searchsorted(dispatch.offsets[1:].long().contiguous(), slots, right=True)
    assert torch.equal(expert_of_slot, index.flatten())
    assert bool((dispatch.offsets % align == 0).all())


def test_rows_after_the_last_segment_are_zero():
    x, weight = torch.full((128, 8), float("nan")), torch.randn(2, 4, 8)
    x[:64] = 1.0
    out = grouped_mm(x, weight, torch.tensor([0, 64, 64], dtype=torch.int32))
    assert torch.equal(out[64:], torch.zeros(64, 4))
    assert out[:64].isfinite().all()


@pytest.mark.parametrize(("width", "inner"), [(85, 43), (88, 43), (85, 48), (88, 48)])
def test_rows_of_any_width_are_what_the_products_of_a_gpu_take(width, inner):
    """PyTorch checks shapes without a device as it does on a GPU: rows must be a multiple of 16 bytes."""
    x = torch.empty(64, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(3, inner, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    if width % 8:
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=offsets[1:])
    for ragged in (False, True):
        out = grouped_mm(x, weight, offsets, ragged)
        assert out.shape == (64, inner)
        out.backward(torch.empty(64, inner, dtype=torch.bfloat16, device="meta"))
        assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize(("device", "itemsize", "multiple"), [("cpu", 2, 1), ("cuda", 2, 8), ("cuda", 4, 4)])
def test_rows_are_padded_by_zeros_that_add_nothing(device, itemsize, multiple):
    assert row_multiple(device, itemsize) == multiple
    x, weight = torch.randn(64, 85), torch.randn(2, 43, 85)
    offsets = torch.tensor([0, 32, 64], dtype=torch.int32)
    even_x, even_weight = with_even_rows(x, weight, multiple)
    assert even_x.shape[1] % multiple == even_weight.shape[1] % multiple == even_weight.shape[2] % multiple == 0
    found = grouped_mm(even_x, even_weight, offsets)
    torch.testing.assert_close(found[:, :43], grouped_mm(x, weight, offsets))
    assert not found[:, 43:].any()
    assert with_even_rows(x[:, :80], weight[:, :40, :80], multiple)[0].shape[1] == 80


def test_bf16_autocast_is_close_to_float32():
    experts, index = _experts(8), _distinct(200, 8, 2)
    x, routing = torch.randn(200, 32), _routing(index, 8)
    expected = experts.backend(experts, x, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts.backend(experts, x, routing)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 0.02


def test_compiles_without_graph_break():
    experts = _experts(4)
    x, routing = torch.randn(70, 32), _routing(_distinct(70, 4, 2), 4)
    compiled = torch.compile(lambda x, r: experts(x, r), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, routing), experts(x, routing))
