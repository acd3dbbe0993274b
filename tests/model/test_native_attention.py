"""The attention backend ``native``: where it serves, and the compiled library against a float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moebed.model import native
from moebed.model.attention import Attention, KVCache
from moebed.model.native import attention
from moebed.model.rope import RotaryEmbedding
from tests.conftest import tiny_config

# sequences, positions, query heads, key-value heads, head width
SIZES = [
    (1, 1, 1, 1, 16),  # nothing but oneself to look at
    (2, 37, 4, 2, 32),  # positions that no block, tile or panel divides
    (1, 130, 6, 1, 48),  # all query heads on one key-value head
    (2, 96, 2, 2, 64),
    (1, 300, 2, 2, 128),  # sums longer than DEPTH units
    (1, 49, 1, 1, 256),  # a whole block of the widest heads
]


def _case(sequences, length, heads, key_heads, width):
    sizes = [(sequences, length, count, width) for count in (heads, key_heads, key_heads)]
    return [torch.randn(size).requires_grad_() for size in sizes], torch.randn(sizes[0])


def _run(function, inputs, target):
    out = function(*inputs, 0.7 * inputs[0].shape[-1] ** -0.5)
    return [out, *torch.autograd.grad(out, inputs, target)]


def _sdpa(query, key, value, scale):
    repeat = query.shape[2] // key.shape[2]
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def _turned(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-high, low], dim=-1) * sin.unsqueeze(1)


def _difference(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))


@pytest.mark.usefixtures("each_set")
class TestEachInstructionSet:
    @pytest.mark.parametrize("sizes", SIZES)
    def test_values_and_gradients_are_as_exact_as_those_of_sdpa(self, sizes):
        inputs, target = _case(*sizes)
        ours, theirs = _run(attention.causal_attention, inputs, target), _run(_sdpa, inputs, target)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected = _run(_sdpa, wide, target.double())
        for name, found, other, exact in zip(("out", "query", "key", "value"), ours, theirs, expected, strict=True):
            assert found.shape == exact.shape, name
            assert _difference(found, exact) < 3 * _difference(other, exact) + 1e-7, name
            assert _difference(found, exact) < 2e-6, name

    @pytest.mark.parametrize("sizes", SIZES)
    def test_queries_and_keys_are_turned_on_the_way(self, sizes):
        inputs, target = _case(*sizes)
        angle = torch.outer(torch.arange(float(sizes[1])), torch.rand(sizes[-1] // 2)).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()

        def sdpa(query, key, value, scale):
            turns = cos.to(query.dtype), sin.to(query.dtype)
            return _sdpa(_turned(query, *turns), _turned(key, *turns), value, scale)

        ours = _run(lambda *inputs: attention.causal_attention(*inputs, (cos, sin)), inputs, target)
        theirs = _run(sdpa, inputs, target)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        for found, other, exact in zip(ours, theirs, _run(sdpa, wide, target.double()), strict=True):
            assert found.shape == exact.shape
            assert _difference(found, exact) < 3 * _difference(other, exact) + 1e-7

    def test_large_logits_neither_overflow_nor_vanish(self):
        inputs, target = _case(1, 50, 2, 2, 32)
        query, key, value = (
            (factor * tensor).detach().requires_grad_() for factor, tensor in zip((60, 60, 1), inputs, strict=True)
        )
        ours = _run(attention.causal_attention, [query, key, value], target)
        theirs = _run(_sdpa, [query, key, value], target)
        wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
        expected = _run(_sdpa, wide, target.double())
        for found, other, exact in zip(ours, theirs, expected, strict=True):
            assert torch.isfinite(found).all()
            # Of logits of thousands float32 keeps four digits after the point: nobody comes nearer.
            assert _difference(found, exact) < 3 * _difference(other, exact) + 1e-7

    def test_any_number_of_threads_gives_the_same_bits(self):
        inputs, target = _case(3, 150, 4, 2, 32)
        threads, found = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(_run(attention.causal_attention, inputs, target))
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_what_is_not_a_number_stays_one(self, which):
        inputs, target = _case(1, 60, 1, 1, 16)
        with torch.no_grad():
            inputs[which][0, 53] = float("nan")
        out, *grads = _run(attention.causal_attention, inputs, target)
        assert (grads[0][0, 53:] if which == 2 else grads[2][0, :54]).isnan().all()
        rows = out.isnan().any(dim=-1).flatten()
        assert rows[53:].all() if which else rows[53]
        assert not rows[:48].any()

    def test_no_sequences(self):
        inputs, target = _case(0, 20, 2, 2, 16)
        assert [tensor.shape[0] for tensor in _run(attention.causal_attention, inputs, target)] == [0] * 4


@pytest.fixture
def served(monkeypatch):
    """Calls of the compiled attention; where it cannot be had, the test is skipped."""
    if (reason := native.load()) is not None:
        pytest.skip(reason)
    calls, function = [], attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *inputs: calls.append(inputs) or function(*inputs))
    return calls


def _layer(**settings):
    torch.manual_seed(0)
    layer = Attention(tiny_config(hidden_size=64, num_attention_heads=4, head_dim=16, **settings))
    return layer, torch.randn(2, 21, 64), RotaryEmbedding(tiny_config(head_dim=16))(0, 21, torch.device("cpu"))


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 2}, {"sliding_window": 21}])
def test_it_gives_what_sdpa_gives(settings, served):
    found = []
    for backend in ("native", "sdpa"):
        layer, x, rope = _layer(attention_backend=backend, **settings)
        x.requires_grad_()
        out = layer(x, rope)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert len(served) == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"sliding_window": 20}, {"attn_logit_softcapping": 20.0}, {"attention_backend": "sdpa"}]
)
def test_where_it_does_not_fit_or_is_not_asked_for_another_serves(settings, served):
    layer, x, rope = _layer(**{"attention_backend": "native", **settings})
    layer(x, rope)
    layer, x, rope = _layer(attention_backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, rope)
    layer.double()(x.double(), [each.double() for each in rope])
    assert not served


def test_a_prompt_is_read_by_it_and_single_tokens_are_not(served):
    layer, x, _ = _layer(attention_backend="native")
    whole = layer(x, RotaryEmbedding(tiny_config(head_dim=16))(0, 21, x.device))
    served.clear()
    cache, parts = KVCache(21), []
    for first, stop in ((0, 19), (19, 20), (20, 21)):
        rope = RotaryEmbedding(tiny_config(head_dim=16))(first, stop - first, x.device)
        parts.append(layer(x[:, first:stop], rope, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert len(served) == 1


@pytest.mark.parametrize(("name", "heads", "expected"), [("avx2", 8, True), (None, 8, False), ("avx2", 0, False)])
def test_auto_takes_it_where_it_was_measured_to_be_the_fastest(monkeypatch, name, heads, expected):
    monkeypatch.setattr(native, "instruction_set", lambda: name)
    monkeypatch.setattr(native, "load", lambda: None if name else "the processor has no AVX2")
    assert attention.is_fastest(heads) == expected


def test_compiled_whole_and_checkpointed_it_is_the_same(served):
    layer, x, rope = _layer(attention_backend="native")
    x.requires_grad_()
    target = torch.randn(x.shape)
    expected = torch.autograd.grad(layer(x, rope), x, target)[0]
    whole = torch.compile(lambda x: layer(x, rope), fullgraph=True, backend="aot_eager")
    for function in (whole, lambda x: checkpoint(layer, x, rope, use_reentrant=False)):
        assert torch.allclose(torch.autograd.grad(function(x), x, target)[0], expected, rtol=1e-5, atol=1e-6)


def test_operators_hold_their_contracts(served):
    inputs, target = _case(2, 20, 4, 2, 16)
    inputs = [tensor.detach() for tensor in inputs]
    checks = ("test_schema", "test_faketensor")
    for rope in ((None, None), (torch.randn(20, 16), torch.randn(20, 16))):
        torch.library.opcheck(torch.ops.moebed.causal_attention, (*inputs, *rope, 0.25), test_utils=checks)
        out, log_sums = torch.ops.moebed.causal_attention(*inputs, *rope, 0.25)
        backward = torch.ops.moebed.causal_attention_backward
        torch.library.opcheck(backward, (target, *inputs, *rope, out, log_sums, 0.25), test_utils=checks)
