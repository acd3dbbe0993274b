"""The compiled products of rows with matrices against float64, and where they serve."""

import pytest
import torch

from moebed.model import fused, native
from moebed.model.attention import Attention
from moebed.model.native import linear, rowwise
from moebed.model.rope import RotaryEmbedding
from tests.conftest import tiny_config

# rows, inputs, outputs of each matrix
SIZES = [
    ((1, 1), 16, [16]),
    ((2, 65), 48, [80, 16, 16]),  # rows that no block or tile divides, strips that are not full
    ((3, 99), 272, [144]),  # sums longer than DEPTH units, in the second pass of which nothing divides
    ((200,), 528, [64, 64]),
]


def _difference(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def _case(rows, inputs, outputs):
    x = torch.randn(*rows, inputs)
    weights = [torch.randn(count, inputs) * inputs**-0.5 for count in outputs]
    return x, weights, [torch.randn(*rows, count) for count in outputs]


def _run(x, weights, targets):
    """Results and all gradients, by ``fused.linears``."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
    found = fused.linears(leaves[0], leaves[1:])
    return [*found, *torch.autograd.grad(found, leaves, targets)]


@pytest.fixture
def calls(monkeypatch):
    """Calls of the library, which takes all sizes and every instruction set."""
    found, call = [], rowwise.call
    monkeypatch.setattr(rowwise, "_LEAST", 1)
    monkeypatch.setattr(linear, "FASTEST", frozenset(("avx2", "avx512", "avx512_bf16", "amx")))
    monkeypatch.setattr(rowwise, "call", lambda name, *arguments: found.append(name) or call(name, *arguments))
    return found


@pytest.mark.usefixtures("each_set")
class TestEachInstructionSet:
    @pytest.mark.parametrize("sizes", SIZES)
    def test_values_and_gradients(self, sizes, calls):
        x, weights, targets = _case(*sizes)
        ours = _run(x, weights, targets)
        assert calls == ["moebed_linear"] * 2 * len(weights)
        exact = _run(x.double(), [weight.double() for weight in weights], [target.double() for target in targets])
        for found, expected in zip(ours, exact, strict=True):
            assert found.shape == expected.shape
            assert _difference(found, expected) < 1e-6

    def test_any_number_of_threads_gives_the_same_bits(self, calls):
        x, weights, targets = _case((2, 151), 272, [80, 48])
        threads, found = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                results = _run(x, weights, targets)
                found.append(results[:3])  # the gradients of weights are PyTorch's own products
        finally:
            torch.set_num_threads(threads)
        assert calls
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_no_rows(self, calls):
        x, weights, targets = _case((0,), 16, [16])
        rowwise._LEAST = 0
        assert [tensor.shape for tensor in _run(x, weights, targets)] == [(0, 16), (0, 16), (16, 16)]

    def test_what_needs_no_gradient_gets_none(self, calls):
        x, (frozen, weight), _ = _case((4,), 16, [16, 32])
        weight.requires_grad_()
        sum(out.sum() for out in fused.linears(x, [frozen, weight])).backward()
        assert (x.grad, frozen.grad) == (None, None)
        assert weight.grad is not None
        assert calls == ["moebed_linear"] * 2


@pytest.mark.parametrize(
    ("name", "rows", "inputs", "outputs", "dtype", "expected"),
    [
        ("avx2", 4096, 16, 16, torch.float32, True),
        ("avx2", 4095, 16, 16, torch.float32, False),  # small
        ("avx2", 128, 1024, 1024, torch.float32, True),
        ("avx2", 128, 1024, 1040, torch.float32, False),  # packed anew for few rows
        ("avx2", 4096, 24, 16, torch.float32, False),
        ("avx2", 4096, 16, 24, torch.float32, False),
        ("avx2", 4096, 16, 16, torch.bfloat16, False),
        ("avx512", 4096, 16, 16, torch.float32, False),
    ],
)
def test_it_serves_where_it_was_measured_to_be_faster(monkeypatch, name, rows, inputs, outputs, dtype, expected):
    monkeypatch.setattr(native, "instruction_set", lambda: name)
    monkeypatch.setattr(native, "load", lambda: None)
    x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
    assert linear.fits(x, weight) == expected
    assert linear.fits(x, torch.empty(16, inputs, dtype=dtype), weight) == expected
    assert not linear.fits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear.fits(x, weight)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_takes_it_and_gives_what_it_gave(bias, calls, monkeypatch):
    if (reason := native.load()) is not None:
        pytest.skip(reason)
    config = tiny_config(hidden_size=64, num_attention_heads=4, head_dim=16, attention_bias=bias)
    layer, x, rope = Attention(config), torch.randn(2, 21, 64), RotaryEmbedding(config)(0, 21, torch.device("cpu"))
    found = []
    for fits in (linear.fits, lambda *_: False):
        monkeypatch.setattr(linear, "fits", fits)
        x = x.detach().requires_grad_()
        out = layer(x, rope)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert calls.count("moebed_linear") == (2 if bias else 8)  # the last product has no bias
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
