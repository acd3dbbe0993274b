"""The compiled norm and rotation against float64, and where they serve."""

import pytest
import torch
import torch.nn.functional as F

from moebed.model import fused, losses, native
from moebed.model.native import rowwise


def _difference(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def _norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _turned(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def _with_gradients(function, inputs, target):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, target.to(out.dtype))]


@pytest.fixture
def calls(monkeypatch):
    """Names of the library's functions as they are called; nothing is too small for them."""
    found, call = [], rowwise.call
    monkeypatch.setattr(rowwise, "_LEAST", 1)
    monkeypatch.setattr(rowwise, "call", lambda name, *arguments: found.append(name) or call(name, *arguments))
    return found


@pytest.mark.usefixtures("each_set")
class TestEachInstructionSet:
    @pytest.mark.parametrize("shape", [(1, 16), (2, 65, 48), (130, 256)])
    def test_norm(self, shape, calls):
        x, weight, target = 3 * torch.randn(shape), torch.rand(shape[-1]) + 0.5, torch.randn(shape)
        x[0] *= 1e-3  # of which eps is as much
        ours = _with_gradients(lambda x, weight: fused.rms_norm(x, weight, 1e-5), [x, weight], target)
        exact = _with_gradients(lambda x, weight: _norm(x, weight, 1e-5), [x.double(), weight.double()], target)
        assert calls == ["moebed_rms_norm", "moebed_rms_norm_backward"]
        for found, expected in zip(ours, exact, strict=True):
            assert found.shape == expected.shape
            assert _difference(found, expected) < 1e-6

    @pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
    @pytest.mark.parametrize("sizes", [(1, 1, 1, 32), (2, 37, 3, 64)])
    def test_rotation(self, sizes, dtype, most, calls):
        x, target = (torch.randn(sizes, dtype=dtype).transpose(1, 2) for _ in range(2))  # heads as attention has them
        angle = torch.outer(torch.arange(float(sizes[1])), torch.rand(sizes[3] // 2)).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        ours = _with_gradients(lambda x: fused.rotate(x, cos, sin), [x], target)
        exact = _with_gradients(lambda x: _turned(x, cos.double(), sin.double()), [x.double()], target)
        assert calls == ["moebed_rotate"] * 2
        for found, expected in zip(ours, exact, strict=True):
            assert found.shape == expected.shape
            assert found.dtype == dtype
            assert _difference(found, expected) < most

    @pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
    @pytest.mark.parametrize("shape", [(1, 16), (70, 48), (5, 4096)])
    def test_cross_entropy(self, shape, dtype, most, calls):
        logits, target = 9 * torch.randn(shape, dtype=dtype), torch.randn(1, shape[0])
        labels = torch.randint(shape[1], (1, shape[0]))
        labels[0, 3::4] = losses.IGNORE_INDEX
        ours = _with_gradients(lambda x: losses.token_losses(x.unsqueeze(0), labels), [logits], target)
        assert calls == ["moebed_log_sums", "moebed_cross_entropy_backward"]
        wide = [logits.double()]
        exact = _with_gradients(lambda x: F.cross_entropy(x, labels[0], reduction="none").unsqueeze(0), wide, target)
        for found, expected, bound in zip(ours, exact, (1e-6, most), strict=True):
            assert _difference(found, expected) < bound
        assert not ours[1][3::4].any()

    def test_logits_beyond_the_range_of_exp(self, calls):
        logits = torch.tensor([[1e3, -1e3] + [0.0] * 14, [-1e3] * 16])
        labels = torch.tensor([[1, 0]])
        found = losses.token_losses(logits.unsqueeze(0), labels)
        expected = torch.tensor([[2e3, torch.tensor(16.0).log()]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32 numbers of 1000 lie 6e-5 apart
        assert calls

    def test_any_number_of_threads_gives_the_same_bits(self, calls):
        x, weight, target = torch.randn(300, 64), torch.rand(64), torch.randn(300, 64)
        threads, found = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(_with_gradients(lambda x, weight: fused.rms_norm(x, weight, 1e-5), [x, weight], target))
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_what_is_not_a_number_stays_one(self, calls):
        x = torch.randn(5, 16)
        x[2, 3] = float("nan")
        assert fused.rms_norm(x, torch.ones(16), 1e-5).isnan().any(dim=1).tolist() == [i == 2 for i in range(5)]
        logits = torch.randn(5, 16, requires_grad=True)
        with torch.no_grad():
            logits[2, 3] = float("nan")
        nats = losses.token_losses(logits.unsqueeze(0), torch.zeros(1, 5, dtype=torch.long))
        assert nats.isnan().flatten().tolist() == [i == 2 for i in range(5)]
        assert torch.autograd.grad(nats.sum(), logits)[0].isnan().any(dim=1).tolist() == [i == 2 for i in range(5)]
        assert len(calls) == 3


def test_small_tensors_other_types_and_odd_sizes_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    large, weight = torch.empty(2048, 32), torch.empty(32)
    assert rowwise.fits(large, 16, weight)
    assert not rowwise.fits(large[:2047], 16, weight)
    assert not rowwise.fits(large, 16, weight.bfloat16())
    assert not rowwise.fits(large, 64, weight)
    assert not rowwise.fits(large.to("meta"), 16, weight)
    monkeypatch.setattr(native, "load", lambda: "compiling it needs g++")
    assert not rowwise.fits(large, 16, weight)
