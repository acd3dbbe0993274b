"""The kernels on a GPU: real bfloat16, the large tiles, sizes past 2^31, and what only a device can show.

Run with ``pytest -m gpu tests/triton_kernels`` on a machine with one. T tokens, K experts per token, E experts,
H hidden, F expert intermediate.
"""

import functools
import subprocess
import sys

import pytest
import torch

from triton_kernels import expert_mlp
from triton_kernels.mlp import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device: torch sees none"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Awkward on purpose: K-loops with a rest, tiles cut off on both sides, more experts than tokens.
SIZES = [
    (1, 1, 1, 8, 8),
    (63, 8, 2, 136, 72),
    (257, 64, 6, 2056, 1416),
    (1000, 8, 2, 1024, 512),
    (4096, 16, 4, 512, 264),
]


def _case(tokens, num_experts, top_k, width, inter, dtype, index=None):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    if index is None:
        index = torch.rand(tokens, num_experts, generator=generator, device="cuda").topk(top_k).indices
    floating = [
        normal(tokens, width).to(dtype),
        (normal(num_experts, 2 * inter, width) * width**-0.5).to(dtype),
        (normal(num_experts, width, inter) * inter**-0.5).to(dtype),
        torch.rand(index.shape, generator=generator, device="cuda"),
    ]
    return [t.requires_grad_() for t in floating], index


def _run(function, floating, index, activation):
    x, gate_up, down, weight = floating
    out = function(x, gate_up, down, index, weight, activation)
    target = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=torch.float64).mul(out.numel()).sin()
    return [out.detach(), *torch.autograd.grad((out * target.view(out.shape).to(out.dtype)).sum(), floating)]


def _agree(floating, index, activation="silu"):
    wide = [t.detach().double().requires_grad_() for t in floating]
    expected = _run(reference.expert_mlp, wide, index, activation)
    for name, a, b in zip(
        ("out", "x", "gate_up", "down", "weight"), _run(expert_mlp, floating, index, activation), expected, strict=True
    ):
        error = ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()
        assert error < TOLERANCE[floating[0].dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("sizes", SIZES)
def test_gpu_values_and_gradients(sizes, activation, dtype):
    _agree(*_case(*sizes, dtype), activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_imbalance(dtype):
    for index in (torch.full((700, 1), 5), torch.tensor([[1, 6]]).repeat(700, 1)):
        _agree(*_case(700, 8, 1, 256, 264, dtype, index=index.cuda()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_crowded_experts_are_cut(dtype):
    """Rows enough, and matrices small enough, that pieces are summed side by side."""
    index = torch.zeros(20_000, 1, dtype=torch.int64, device="cuda")
    index[::50] = 3
    _agree(*_case(20_000, 6, 1, 256, 136, dtype, index=index))


def test_gpu_ragged_assignments_are_left_out():
    floating, index = _case(500, 8, 4, 256, 136, torch.bfloat16)
    weight = floating[3].detach()
    floating[3] = weight.masked_fill(weight < 0.4, 0).requires_grad_()
    ragged = functools.partial(expert_mlp, ragged=True)
    expected = _run(expert_mlp, floating, index, "silu")
    expected[4] = expected[4].masked_fill(floating[3] == 0, 0)
    for a, b in zip(_run(ragged, floating, index, "silu"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_gpu_indices_of_any_integer_type(dtype):
    floating, index = _case(300, 8, 2, 256, 136, torch.bfloat16)
    out = expert_mlp(*floating[:3], index.to(dtype), floating[3])
    assert torch.equal(out, expert_mlp(*floating[:3], index, floating[3]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_tensors_on_another_device_than_the_current_one():
    floating, index = _case(300, 8, 2, 256, 136, torch.bfloat16)
    expected = _run(expert_mlp, floating, index, "silu")
    there = [t.detach().to("cuda:1").requires_grad_() for t in floating]
    assert torch.cuda.current_device() == 0
    out = expert_mlp(*there[:3], index.to("cuda:1"), there[3])
    assert torch.equal(out.cpu(), expected[0].cpu())
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in there)


def test_gpu_two_runs_agree_in_every_bit():
    floating, index = _case(3000, 16, 4, 512, 768, torch.bfloat16)
    first = _run(expert_mlp, floating, index, "silu")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, _run(expert_mlp, floating, index, "silu"), strict=True))


def test_gpu_uninitialised_memory_is_never_read():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated without a value with NaN
    try:
        _agree(*_case(333, 9, 3, 264, 136, torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(before)


def test_gpu_compiles_in_one_graph():
    floating, index = _case(300, 8, 2, 256, 128, torch.bfloat16)
    compiled = torch.compile(expert_mlp, fullgraph=True)
    expected = _run(expert_mlp, floating, index, "silu")
    assert all(torch.equal(a, b) for a, b in zip(_run(compiled, floating, index, "silu"), expected, strict=True))


def test_gpu_autocast_gives_bfloat16():
    floating, index = _case(300, 8, 2, 256, 128, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert expert_mlp(*floating[:3], index, floating[3]).dtype == torch.bfloat16


def test_gpu_needs_no_answer_from_the_device():
    """No launch waits for the device: the sizes of all tensors follow from T, K and E alone."""
    floating, index = _case(300, 8, 2, 256, 128, torch.bfloat16)
    _run(expert_mlp, floating, index, "silu")
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert_mlp(*floating[:3], index, floating[3]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gpu_rows_past_two_to_the_31_elements():
    """T·K·H of 2.4e9: the last token's rows lie past what 32 bits address."""
    tokens, top_k, width = 150_000, 8, 2048
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(8, 16, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    down = torch.randn(8, width, 8, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(8, device="cuda").repeat(tokens, 1)
    weight = torch.rand(tokens, top_k, device="cuda")
    with torch.no_grad():
        out = expert_mlp(x, gate_up, down, index, weight)
        tail = slice(tokens - 64, tokens)
        few = expert_mlp(x[tail], gate_up, down, index[tail], weight[tail])
    torch.testing.assert_close(out[tail], few)


def test_gpu_an_index_outside_asserts_and_reads_nothing_else():
    """A device-side assertion ends the process's CUDA context, so it is looked at from outside."""
    code = (
        "import torch; from triton_kernels import expert_mlp; d = dict(device='cuda', dtype=torch.bfloat16);"
        "expert_mlp(torch.ones(64, 64, **d), torch.ones(4, 128, 64, **d), torch.ones(4, 64, 64, **d),"
        " torch.full((64, 2), 4, device='cuda'), torch.ones(64, 2, device='cuda')); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
    assert "illegal memory access" not in done.stderr


def test_gpu_memory_saved_for_backward_is_the_pre_activations():
    tokens, top_k, width, inter = 4096, 4, 512, 768
    floating, index = _case(tokens, 16, top_k, width, inter, torch.bfloat16)
    expert_mlp(*floating[:3], index, floating[3])  # compiled, and its caches filled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = expert_mlp(*floating[:3], index, floating[3])
    held = torch.cuda.memory_allocated() - before - out.numel() * 2
    pre = tokens * top_k * 2 * inter * 2
    assert pre <= held < 1.05 * pre
