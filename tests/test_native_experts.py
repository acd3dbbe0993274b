"""The experts backend ``native``: how it is chosen, and the compiled extension against a float64 reference."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moebed import experts as seam
from moebed import native
from moebed.experts import BACKENDS, Experts, resolve_backend
from moebed.routers import Routing
from tests.conftest import tiny_config

BF16 = torch.bfloat16


def test_without_a_compiler_grouped_mm_serves(monkeypatch, caplog):
    monkeypatch.setattr(native, "load", lambda: "compiling it needs ninja")
    seam._say_once.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="moebed.experts"):
        assert resolve_backend("native") == "grouped_mm"
        assert resolve_backend("native") == "grouped_mm"
    assert [r.levelname for r in caplog.records] == ["DEBUG"]
    assert "compiling it needs ninja" in caplog.text


def test_missing_tools_and_processors_are_named(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(native.shutil, "which", lambda tool: None)
    assert native.load.__wrapped__() == "compiling it needs g++ and ninja"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert native.load.__wrapped__() == "this processor has no AVX512-BF16"


@pytest.mark.parametrize(
    ("hidden", "width", "dtype", "weights", "expected"),
    [
        (64, 32, BF16, BF16, True),
        (64, 32, BF16, torch.float32, True),
        (64, 32, torch.float32, torch.float32, False),
        (64, 32, BF16, torch.float64, False),
        (48, 32, BF16, BF16, False),
        (64, 48, BF16, BF16, False),
    ],
)
def test_what_it_is_made_for(hidden, width, dtype, weights, expected):
    gate_up, down = torch.empty(2, 2 * width, hidden, dtype=weights), torch.empty(2, hidden, width, dtype=weights)
    assert native.fits(torch.empty(3, hidden), dtype, gate_up, down) is expected


def test_other_types_take_grouped_mm():
    """In float32 the backend is grouped_mm bit for bit, with or without a compiler."""
    layer, routing, x = _case(2, 32, 32, 5, 1, torch.float32, "silu")
    expected = BACKENDS["grouped_mm"](layer, x, routing)
    assert torch.equal(BACKENDS["native"](layer, x, routing), expected)


def _case(num_experts, hidden, width, tokens, top_k, dtype, act):
    """Experts, routing and tokens; a third of the experts gets no row where there are enough of them."""
    config = tiny_config(
        hidden_size=hidden,
        num_attention_heads=2,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        hidden_act=act,
    )
    layer = Experts(config, config.layer(0)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    alive = max(top_k, num_experts - num_experts // 3)
    index = torch.rand(tokens, alive).topk(top_k).indices
    weight = torch.rand(tokens, top_k).requires_grad_()
    empty = torch.empty(tokens, num_experts)
    return layer, Routing(empty, empty, index, weight), torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)


def _run(backend, layer, routing, x, target, function=None):
    call = function or (lambda x: BACKENDS[backend](layer, x, routing))
    out = call(x)
    return [out, *torch.autograd.grad(out, [x, routing.topk_weight, *layer.parameters()], target.to(out.dtype))]


def _reference(layer, routing, x, target):
    wide = Experts(tiny_config(num_experts=1, num_experts_per_tok=1), tiny_config().layer(0)).double()
    wide.num_experts, wide.activation = layer.num_experts, layer.activation
    wide.gate_up_proj = torch.nn.Parameter(layer.gate_up_proj.double())
    wide.down_proj = torch.nn.Parameter(layer.down_proj.double())
    weight = routing.topk_weight.detach().double().requires_grad_()
    return _run(
        "loop", wide, routing._replace(topk_weight=weight), x.detach().double().requires_grad_(), target.double()
    )


def _difference(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))


@pytest.fixture(scope="module")
def extension():
    reason = native.load()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.usefixtures("extension")
class TestExtension:
    """Compiling takes about half a minute, once for all; the runs take seconds."""

    @pytest.mark.parametrize(
        ("num_experts", "hidden", "width", "tokens", "top_k", "weights", "act"),
        [
            (8, 64, 32, 300, 2, BF16, "silu"),  # blocks that are not full
            (8, 64, 96, 301, 2, torch.float32, "silu"),  # float32 matrices, a width of one strip and a half
            (6, 96, 64, 97, 3, BF16, "gelu"),
            (6, 32, 160, 64, 6, torch.float32, "gelu_tanh"),
            (1, 64, 64, 1, 1, BF16, "silu"),  # a single row, an odd number of them
            (3, 32, 544, 1300, 1, BF16, "silu"),  # sums longer than DEPTH pairs, in both directions
        ],
    )
    def test_it_is_closer_to_the_exact_result_than_grouped_mm(
        self, num_experts, hidden, width, tokens, top_k, weights, act
    ):
        layer, routing, x = _case(num_experts, hidden, width, tokens, top_k, weights, act)
        x = x.detach().to(BF16).requires_grad_()
        target = torch.randn(tokens, hidden, dtype=BF16)
        expected = _reference(layer, routing, x, target)
        with torch.autocast("cpu", BF16):
            native_, grouped = (_run(name, layer, routing, x, target) for name in ("native", "grouped_mm"))
        names = ("output", "x", "topk_weight", "gate_up", "down")
        for name, ours, theirs, exact in zip(names, native_, grouped, expected, strict=True):
            assert ours.dtype == theirs.dtype, name
            assert ours.shape == exact.shape, name
            assert _difference(ours, exact) < 0.01, name
            assert _difference(ours, exact) < 1.1 * _difference(theirs, exact), name
        for parameter, grad in zip(layer.parameters(), native_[3:], strict=True):
            idle = [e for e in range(num_experts) if e not in routing.topk_index]
            assert parameter.shape == grad.shape
            assert not grad[idle].any()

    def test_no_tokens(self):
        layer, routing, x = _case(4, 32, 32, 0, 2, BF16, "silu")
        out, *grads = _run("native", layer, routing, x, torch.zeros(0, 32))
        assert out.shape == (0, 32)
        assert not any(grad.any() for grad in grads)

    def test_any_number_of_threads_gives_the_same_bits(self):
        layer, routing, x = _case(8, 64, 64, 500, 2, BF16, "silu")
        target, threads, found = torch.randn(500, 64, dtype=BF16), torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(_run("native", layer, routing, x, target))
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_compiled_whole_and_checkpointed_it_is_the_same(self):
        layer, routing, x = _case(8, 64, 64, 200, 2, BF16, "silu")
        layer.backend, target = BACKENDS["native"], torch.randn(200, 64, dtype=BF16)
        expected = _run("native", layer, routing, x, target)
        compiled = torch.compile(lambda x: layer(x, routing), fullgraph=True, backend="aot_eager")
        for function in (compiled, lambda x: checkpoint(lambda x: layer(x, routing), x, use_reentrant=False)):
            found = _run("native", layer, routing, x, target, function)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_an_expert_that_is_not_there_is_an_error(self):
        layer, routing, x = _case(4, 32, 32, 3, 1, BF16, "silu")
        with pytest.raises(RuntimeError, match="expert 4 of 4"):
            BACKENDS["native"](layer, x, routing._replace(topk_index=torch.full((3, 1), 4)))

    def test_operators_hold_their_contracts(self):
        layer, routing, x = _case(4, 32, 32, 10, 2, BF16, "silu")
        inputs = (
            x.detach(),
            *(p.detach() for p in layer.parameters()),
            routing.topk_index,
            routing.topk_weight.detach(),
        )
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.moebed_native.expert_mlp, (*inputs, "silu"), test_utils=checks)
        out, before = torch.ops.moebed_native.expert_mlp(*inputs, "silu")
        backward = torch.ops.moebed_native.expert_mlp_backward
        torch.library.opcheck(backward, (torch.ones_like(out), *inputs, before, "silu"), test_utils=checks)
