"""The experts backend ``native``: how it is chosen, and the compiled library against a float64 reference."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moebed.model import experts as seam
from moebed.model import native
from moebed.model.experts import BACKENDS, Experts, resolve_backend
from moebed.model.native import compiled
from moebed.model.routers import Routing
from tests.conftest import tiny_config

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _said_anew(monkeypatch):
    monkeypatch.setattr(seam, "_said", set())


def test_without_a_compiler_grouped_mm_serves_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(native, "load", lambda: "compiling it needs g++")
    assert resolve_backend("native") is BACKENDS["grouped_mm"]
    assert resolve_backend("native") is BACKENDS["grouped_mm"]
    assert capsys.readouterr().err == (
        "experts_backend native is not to be had (compiling it needs g++); grouped_mm serves instead\n"
    )


@pytest.mark.parametrize(
    ("capability", "bf16", "amx", "environment", "expected"),
    [
        ("DEFAULT", False, False, {}, None),
        ("AVX2", False, False, {}, "avx2"),
        ("AVX2", True, True, {}, "avx2"),  # ATEN_CPU_CAPABILITY=avx2 on a larger machine
        ("AVX512", False, False, {}, "avx512"),
        ("AVX512", True, False, {}, "avx512_bf16"),
        ("AVX512", True, True, {}, "amx"),
        ("AVX512", True, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        ("AVX512", True, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx"),
        ("AVX512", True, True, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "avx512"),
        ("AVX512", True, True, {"DNNL_MAX_CPU_ISA": "AVX2"}, "avx2"),
        ("AVX512", True, True, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, None),
        ("AVX512", True, True, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "amx"),
    ],
)
def test_processor_and_environment_limit_the_instruction_set(monkeypatch, capability, bf16, amx, environment, expected):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: amx)
    assert native.processor() == expected


@pytest.mark.parametrize(
    ("hidden", "width", "dtype", "weights", "expected"),
    [
        (64, 32, BF16, BF16, None),
        (64, 32, BF16, torch.float32, None),
        (64, 48, torch.float32, torch.float32, None),
        (64, 32, torch.float32, BF16, "its weights cannot be"),
        (64, 32, torch.float16, torch.float16, "not in float16"),
        (64, 32, BF16, torch.float64, "its weights cannot be"),
        (48, 32, BF16, BF16, "hidden size 48 and width 32 must be multiples of 32"),
        (64, 40, torch.float32, torch.float32, "hidden size 64 and width 40 must be multiples of 16"),
    ],
)
def test_what_it_is_made_for(hidden, width, dtype, weights, expected):
    gate_up, down = torch.empty(2, 2 * width, hidden, dtype=weights), torch.empty(2, hidden, width, dtype=weights)
    found = native.unfit(torch.empty(3, hidden), dtype, gate_up, down)
    assert found is None if expected is None else expected in found


def test_what_does_not_fit_takes_grouped_mm_and_says_so_once(capsys):
    """grouped_mm bit for bit, with or without a compiler; under torch.compile too, in one graph."""
    layer, routing, x = _case(2, 32, 40, 5, 1, torch.float32, "silu")
    expected = BACKENDS["grouped_mm"](layer, x, routing)
    for _ in range(2):
        assert torch.equal(BACKENDS["native"](layer, x, routing), expected)
    line = "experts_backend native does not fit (hidden size 32 and width 40 must be multiples of 16)"
    assert capsys.readouterr().err == f"{line}; grouped_mm serves instead\n"
    seam._said.clear()
    torch.compile(lambda x: BACKENDS["native"](layer, x, routing), fullgraph=True, backend="aot_eager")(x)
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "dtype", "there", "tokens", "expected"),
    [
        ("amx", BF16, None, 64, "native"),
        ("avx512_bf16", BF16, None, 64, "native"),
        ("avx512", torch.float32, None, 64, "native"),
        ("avx2", torch.float32, None, 64, "native"),
        ("avx2", BF16, None, 64, "grouped_mm"),
        ("avx512", torch.float32, None, 31, "grouped_mm"),  # too few rows an expert
        ("avx512", BF16, None, 64, "grouped_mm"),
        ("amx", BF16, "compiling it needs g++", 64, "grouped_mm"),
        (None, torch.float32, "the processor has no AVX2", 64, "grouped_mm"),
    ],
)
def test_auto_takes_it_where_it_was_measured_to_be_the_fastest(
    monkeypatch, capsys, name, dtype, there, tokens, expected
):
    monkeypatch.setattr(native, "instruction_set", lambda: name)
    monkeypatch.setattr(native, "load", lambda: there)
    for backend in ("native", "grouped_mm"):
        monkeypatch.setattr(seam, f"_{backend}", lambda *_, backend=backend: backend)
    layer, routing, x = _case(4, 32, 32, tokens, 2, dtype, "silu")
    assert resolve_backend("auto")(layer, x, routing) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "width", "expected"), [("avx2", 32, "native"), ("avx2", 48, "grouped_mm"), ("amx", 48, "native")]
)
def test_auto_leaves_large_experts_to_grouped_mm_where_they_were_slower(monkeypatch, name, width, expected):
    monkeypatch.setattr(native, "instruction_set", lambda: name)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "LARGEST", {("avx2", torch.float32): 32 * 32})
    for backend in ("native", "grouped_mm"):
        monkeypatch.setattr(seam, f"_{backend}", lambda *_, backend=backend: backend)
    layer, routing, x = _case(4, 32, width, 64, 2, torch.float32, "silu")
    assert resolve_backend("auto")(layer, x, routing) == expected


def test_auto_on_another_device_compiles_nothing(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(seam, "_grouped_mm", lambda *_: "grouped_mm")
    layer, routing, x = _case(4, 32, 32, 64, 2, torch.float32, "silu")
    assert resolve_backend("auto")(layer.to("meta"), x.to("meta"), routing) == "grouped_mm"


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
    wide.num_experts, wide.gating = layer.num_experts, layer.gating
    wide.gate_up_proj = torch.nn.Parameter(layer.gate_up_proj.double())
    wide.down_proj = torch.nn.Parameter(layer.down_proj.double())
    weight = routing.topk_weight.detach().double().requires_grad_()
    return _run(
        "loop", wide, routing._replace(topk_weight=weight), x.detach().double().requires_grad_(), target.double()
    )


def _difference(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))


@pytest.fixture
def own_set():
    """The instruction set that this machine takes."""
    if (reason := native.load()) is not None:
        pytest.skip(reason)


# experts, hidden, width, tokens, experts per token, activation
AWKWARD = [
    (8, 64, 32, 300, 2, "silu"),  # blocks that are not full
    (8, 64, 96, 301, 2, "gelu"),  # a width of one strip and a half
    (6, 32, 160, 64, 6, "gelu_tanh"),
    (1, 64, 64, 1, 1, "silu"),  # a single row, an odd number of them
    (3, 32, 544, 1300, 1, "silu"),  # sums longer than DEPTH units, in both directions
]


def _holds(layer, routing, x, target, dtype):
    """Native is no further from the exact result than grouped_mm, but for rounding; both are returned."""
    expected = _reference(layer, routing, x, target)
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        ours, theirs = (_run(name, layer, routing, x, target) for name in ("native", "grouped_mm"))
    names = ("output", "x", "topk_weight", "gate_up", "down")
    for name, found, other, exact in zip(names, ours, theirs, expected, strict=True):
        assert found.dtype == other.dtype, name
        assert found.shape == exact.shape, name
        if dtype == BF16:
            assert _difference(found, exact) < 0.01, name
            assert _difference(found, exact) < 1.1 * _difference(other, exact), name
        else:  # MKL sums in more, shorter pieces
            assert _difference(found, exact) < 2e-6, name
            if exact.numel() > 1:  # a single number is met exactly by luck
                assert _difference(found, exact) < 2 * _difference(other, exact) + 1e-7, name
    return ours


@pytest.mark.usefixtures("each_set")
class TestEachInstructionSet:
    @pytest.mark.parametrize("sizes", AWKWARD)
    @pytest.mark.parametrize(
        ("dtype", "weights"), [(BF16, BF16), (BF16, torch.float32), (torch.float32, torch.float32)]
    )
    def test_values_and_gradients_are_as_exact_as_those_of_grouped_mm(self, sizes, dtype, weights):
        num_experts, hidden, width, tokens, top_k, act = sizes
        layer, routing, x = _case(num_experts, hidden, width, tokens, top_k, weights, act)
        x = x.detach().to(dtype).requires_grad_()
        ours = _holds(layer, routing, x, torch.randn(tokens, hidden).to(dtype), dtype)
        idle = [e for e in range(num_experts) if e not in routing.topk_index]
        for grad in ours[3:]:
            assert not grad[idle].any()

    def test_sizes_of_half_a_line_in_float32(self):
        layer, routing, x = _case(5, 48, 80, 77, 3, torch.float32, "gelu")
        _holds(layer, routing, x, torch.randn(77, 48), torch.float32)

    @pytest.mark.parametrize("dtype", [BF16, torch.float32])
    def test_an_assignment_of_weight_0_is_none_where_routing_is_ragged(self, dtype):
        layer, routing, x = _case(6, 64, 32, 90, 4, torch.float32, "silu")
        weight = routing.topk_weight.detach().clone()
        weight[torch.rand_like(weight) < 0.6] = 0
        weight[:5] = 0  # tokens without any expert
        x = x.detach().to(dtype).requires_grad_()
        routing = routing._replace(topk_weight=weight.requires_grad_(), ragged=True)
        ours = _holds(layer, routing, x, torch.randn(90, 64).to(dtype), dtype)
        assert not ours[0][:5].any()
        assert not ours[2][weight == 0].any()
        assert ours[2][weight != 0].all()

    @pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
    def test_gates_beyond_the_range_of_exp(self, act):
        layer, routing, x = _case(3, 32, 32, 40, 2, torch.float32, act)
        x = (100 * x.detach()).requires_grad_()
        _holds(layer, routing, x, torch.randn(40, 32), torch.float32)

    @pytest.mark.parametrize("dtype", [BF16, torch.float32])
    def test_any_number_of_threads_gives_the_same_bits(self, dtype):
        layer, routing, x = _case(8, 64, 64, 500, 2, dtype, "silu")
        target, threads, found = torch.randn(500, 64, dtype=dtype), torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(_run("native", layer, routing, x, target))
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("dtype", [BF16, torch.float32])
    def test_what_is_not_a_number_stays_one(self, dtype):
        layer, routing, x = _case(4, 32, 32, 8, 1, dtype, "silu")
        x = x.detach().clone()
        x[3] = float("nan")
        out = BACKENDS["native"](layer, x, routing)
        assert out.isnan().any(dim=1).tolist() == [row == 3 for row in range(8)]


@pytest.mark.usefixtures("own_set")
class TestExtension:
    def test_no_tokens(self):
        for dtype in (BF16, torch.float32):
            layer, routing, x = _case(4, 32, 32, 0, 2, dtype, "silu")
            out, *grads = _run("native", layer, routing, x, torch.zeros(0, 32))
            assert out.shape == (0, 32)
            assert not any(grad.any() for grad in grads)

    def test_compiled_whole_and_checkpointed_it_is_the_same(self):
        layer, routing, x = _case(8, 64, 64, 200, 2, BF16, "silu")
        layer.backend, target = BACKENDS["native"], torch.randn(200, 64, dtype=BF16)
        expected = _run("native", layer, routing, x, target)
        compiled = torch.compile(lambda x: layer(x, routing), fullgraph=True, backend="aot_eager")
        for function in (compiled, lambda x: checkpoint(lambda x: layer(x, routing), x, use_reentrant=False)):
            found = _run("native", layer, routing, x, target, function)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("expert", [-1, 4])
    def test_an_expert_that_is_not_there_is_an_error(self, expert):
        layer, routing, x = _case(4, 32, 32, 3, 1, BF16, "silu")
        with pytest.raises(RuntimeError, match=f"expert {expert} of 4"):
            BACKENDS["native"](layer, x, routing._replace(topk_index=torch.full((3, 1), expert)))

    def test_tensors_that_do_not_fit_one_another_are_an_error(self):
        fitting = {"x": torch.zeros(3, 32), "gate_up": torch.zeros(4, 64, 32), "down": torch.zeros(4, 32, 32)}
        fitting |= {"index": torch.zeros(3, 1, dtype=torch.int64), "weight": torch.zeros(3, 1)}
        wrong = [("x", (3, 64)), ("x", (4, 32)), ("weight", (3, 2)), ("gate_up", (4, 64, 64)), ("index", (3, 1))]
        others = [(name, torch.zeros(shape)) for name, shape in wrong] + [("weight", fitting["weight"].double())]
        for name, tensor in others:
            with pytest.raises(RuntimeError, match=r"expert_mlp: (shapes do not fit|index must be)"):
                native.expert_mlp(**{**fitting, name: tensor}, activation="silu")

    def test_operators_hold_their_contracts(self):
        layer, routing, x = _case(4, 32, 32, 10, 2, BF16, "silu")
        inputs = (
            x.detach(),
            *(p.detach() for p in layer.parameters()),
            routing.topk_index,
            routing.topk_weight.detach(),
            "silu",
            False,
        )
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.moebed.expert_mlp, inputs, test_utils=checks)
        out, before = torch.ops.moebed.expert_mlp(*inputs)
        backward = torch.ops.moebed.expert_mlp_backward
        torch.library.opcheck(backward, (torch.ones_like(out), *inputs[:-2], before, *inputs[-2:]), test_utils=checks)


PROGRAM = """
import sys, torch
from moebed.model import native
from moebed.model.native import compiled
assert native.load() is None, native.load()
print(native.instruction_set())
"""


def _python(program=PROGRAM, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.usefixtures("own_set")
def test_an_environment_that_limits_pytorch_limits_it():
    process = _python(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    out, err = process.communicate(timeout=120)
    assert (out, process.returncode) == ("avx2\n", 0), err


@pytest.mark.slow
@pytest.mark.usefixtures("own_set")
def test_of_processes_and_threads_one_compiles_and_a_killed_one_holds_nobody_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path))
    killed = _python()
    while killed.poll() is None and not list(tmp_path.rglob("*.partial")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    name = native.instruction_set()
    assert len(list((tmp_path / "native").glob("*.partial"))) == 1
    assert not compiled.is_there(name)
    others, found = [_python() for _ in range(2)], []
    work = [threading.Thread(target=lambda: found.append(compiled.library.__wrapped__(name))) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    said = [capfd.readouterr().err]
    for process in others:
        out, err = process.communicate()
        assert (out.strip(), process.returncode) == (name, 0), err
        said.append(err)
    assert sum(one.count("compiling C++ for") for one in said) == 1, said
    assert len(found) == 2
    (kept,) = (tmp_path / "native").iterdir()  # nothing of the one that was killed
    assert [path.name for path in kept.iterdir()] == [compiled.LIBRARY]
