"""Backward passes by hand, against what autograd makes of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from moebed.model import fused


def _plain_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _plain_rotation(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], dim=-1) * sin.to(x.dtype)


def _plain_gate(gate_up, weight, activation):
    gate, up = gate_up.chunk(2, dim=-1)
    return fused.GATINGS[activation](gate, up) * weight.unsqueeze(-1)


def _same(function, plain, inputs, *constants, **tolerance):
    """Value and every gradient, for a random gradient of the output."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ours, expected = function(*inputs, *constants), plain(*inputs, *constants)
    assert ours.dtype == expected.dtype
    assert_close(ours, expected, **tolerance)
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert one.dtype == other.dtype
        assert_close(one, other, **tolerance)


FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize("shape", [(3, 7, 48), (5, 16), (2, 3, 4, 8)])
def test_norm(shape):
    x, weight = 3 * torch.randn(shape), torch.rand(shape[-1]) + 0.5
    _same(fused.rms_norm, _plain_norm, (x, weight), 1e-5, **FLOAT32)
    _same(fused.rms_norm, _plain_norm, (x.bfloat16(), weight.bfloat16()), 1e-5, rtol=3e-2, atol=3e-2)
    # What serves elsewhere than on a CPU.
    _same(lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps), _plain_norm, (x, weight), 1e-5, **FLOAT32)
    assert fused.rms_norm(x.to("meta"), weight.to("meta"), 1e-5).shape == shape


def test_norm_under_autocast_takes_narrow_input_and_wide_weight():
    _same(fused.rms_norm, _plain_norm, (torch.randn(4, 32).bfloat16(), torch.rand(32)), 1e-5, rtol=2e-2, atol=2e-2)


def test_norm_of_a_frozen_weight():
    x, weight = torch.randn(4, 32, requires_grad=True), torch.rand(32)
    fused.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation(dtype):
    angle = torch.outer(torch.arange(9.0), torch.rand(4)).repeat(1, 2)
    x = torch.randn(2, 9, 3, 8, dtype=dtype).transpose(1, 2)  # heads as attention has them
    _same(
        lambda x: fused.rotate(x, angle.cos(), angle.sin()), lambda x: _plain_rotation(x, angle.cos(), angle.sin()), [x]
    )


@pytest.mark.parametrize("activation", fused.GATINGS)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_gate(activation, rows, monkeypatch):
    monkeypatch.setattr(fused, "_ELEMENTS_IN_CACHE", 2**13)  # several parts, the last one short
    gate_up, weight = torch.randn(rows, 96, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)
    _same(fused.gated, _plain_gate, (gate_up, weight), activation)
    _same(fused.gated, _plain_gate, (gate_up.float(), weight.float()), activation, **FLOAT32)


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    (grad,) = torch.autograd.grad(fused.rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
