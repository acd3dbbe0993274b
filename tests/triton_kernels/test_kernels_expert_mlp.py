"""``expert_mlp`` in the interpreter: values and all gradients against float64, one token at a time."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels_interpreted import (  # noqa: F401
    checks,
    combining,
    configs,
    errors,
    fallback,
    grad_weight,
    interpreter,
    kernels,
    launching,
    make_case,
    op,
    pieces,
    precision,
    reference,
    routing,
    run,
    shuffled,
    triton_interpreter,
)
from torch.utils.checkpoint import checkpoint

# Rounding to the type once per stored tensor; float32 differs from float64 by the order of its sums as well.
# The interpreter truncates where bfloat16 should round, which doubles that error.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def _agree(case, function=None):
    worst = TOLERANCE[case.x.dtype]
    for name, error in zip(("out", "x", "gate_up", "down", "topk_weight"), errors(case, function), strict=True):
        assert error < worst, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"),
    [
        *((1, 1, 1), (1, 8, 8), (63, 4, 1), (63, 3, 2), (100, 8, 2), (100, 16, 8), (257, 5, 3)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((257, 2, 2), (257, 64, 6))),
    ],
)
def test_values_and_gradients(shuffled, tokens, num_experts, top_k):  # noqa: F811
    _agree(make_case(tokens, num_experts, top_k))
    assert shuffled  # the fixture saw the grids: it did order the programs


@pytest.mark.parametrize(
    ("width", "inter", "activation"),
    [
        pytest.param(*sizes, activation, marks=() if number % 3 == at else pytest.mark.slow)
        for number, sizes in enumerate([(8, 8), (40, 72), (136, 24), (64, 200)])
        for at, activation in enumerate(["silu", "gelu", "gelu_tanh"])
    ],
)
def test_awkward_sizes(shuffled, width, inter, activation):  # noqa: F811
    _agree(make_case(50, 3, 2, width, inter, activation))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        *(("silu", torch.bfloat16), ("gelu", torch.float16), ("gelu_tanh", torch.bfloat16)),
        *(
            pytest.param(activation, dtype, marks=pytest.mark.slow)
            for activation, dtype in (("silu", torch.float16), ("gelu", torch.bfloat16), ("gelu_tanh", torch.float16))
        ),
    ],
)
def test_two_byte_types(shuffled, dtype, activation):  # noqa: F811
    _agree(make_case(70, 4, 2, 40, 24, activation, dtype))


@pytest.mark.parametrize(
    "name",
    [
        "hopper",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("hopper sorted", "ampere", "cdna", "wide", "blackwell")
        ),
    ],
)
def test_the_tiles_that_ship_for_gpus(shuffled, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr(op, "choose", lambda *device: configs.BY_NAME[name])
    _agree(make_case(150, 3, 2, 72, 136))


def test_empty_experts_get_zeros(shuffled):  # noqa: F811
    case = make_case(100, 9, 2, index=torch.tensor([[1, 6]]).repeat(100, 1))
    _agree(case)
    _, _, gate_up, down, _ = run(case)
    empty = [0, 2, 3, 4, 5, 7, 8]
    assert not gate_up[empty].any()
    assert not down[empty].any()


@pytest.mark.parametrize("expert", [0, 7])
def test_all_tokens_on_one_expert(shuffled, expert):  # noqa: F811
    _agree(make_case(130, 8, 1, index=torch.full((130, 1), expert)))


def test_an_expert_twice_for_one_token(shuffled):  # noqa: F811
    _agree(make_case(20, 4, 3, index=torch.tensor([[2, 0, 2]]).repeat(20, 1)))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 150), st.integers(1, 8), st.integers(1, 4), st.integers(1, 10), st.integers(1, 10),
    st.sampled_from(["silu", "gelu", "gelu_tanh"]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(shuffled, tokens, num_experts, top_k, width, inter, activation, seed):  # noqa: F811
    torch.manual_seed(seed)
    index = torch.randint(num_experts, (tokens, top_k))
    _agree(make_case(tokens, num_experts, top_k, 8 * width, 8 * inter, activation, index=index))


def test_two_runs_agree_in_every_bit(interpreter, shuffled):  # noqa: F811
    """In two different orders of the programs as well."""
    case = make_case(100, 8, 2, 40, 72)
    first = run(case)
    shuffled.clear()
    assert all(torch.equal(a, b) for a, b in zip(first, run(case), strict=True))


def test_the_poison_and_the_fences_are_there(interpreter):  # noqa: F811
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int32).min() > 2**30
    case = make_case(3, 2, 1)
    assert torch.as_strided(case.x.detach(), (4,), (1,), case.x.storage_offset() - 4).isnan().all()


def test_a_reach_out_of_a_tensor_is_seen(interpreter):  # noqa: F811
    """The watch over loads and stores: one row too far in either."""
    rows, slot = torch.zeros(4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(triton_interpreter.InterpreterError, match="out of the tensors"):
        combining.combine(rows, slot, None, 1, configs.INTERPRETED)
    counts, totals = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(triton_interpreter.InterpreterError, match="out of the tensors"):
        routing.scan_kernel[(3,)](counts, totals, 3, SCAN=16)


@pytest.mark.parametrize("name", ["interpreted", pytest.param("hopper", marks=pytest.mark.slow), "hopper sorted"])
def test_an_index_outside_reaches_nothing(shuffled, monkeypatch, name):  # noqa: F811
    """What guards a GPU, where the error comes later: such a choice adds nothing, and its weight's gradient is 0."""
    monkeypatch.setattr(op, "choose", lambda *device: configs.BY_NAME[name])
    case = make_case(70, 4, 2)
    outside = torch.rand(70, 2) < 0.3
    outside[0] = True  # a token without any expert
    wild = torch.tensor([-1, 4, 5, 2**31 - 1, -(2**31)])[torch.randint(5, (70, 2))]
    monkeypatch.setattr(op, "check_inside", lambda *checked: None)
    actual = run(case._replace(topk_index=torch.where(outside, wild, case.topk_index)))
    silent = case._replace(topk_weight=case.topk_weight.detach().masked_fill(outside, 0).requires_grad_())
    expected = reference(silent)
    expected[4] = expected[4].masked_fill(outside, 0)
    assert not actual[0][0].any()
    assert not actual[4][outside].any()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["interpreted", pytest.param("hopper", marks=pytest.mark.slow), "hopper sorted"])
def test_ragged_assignments_pass_no_product(shuffled, monkeypatch, name):  # noqa: F811
    """Weight 0 or index -1: no row, no gradient of the weight, and what such an index says does not matter."""
    monkeypatch.setattr(op, "choose", lambda *device: configs.BY_NAME[name])
    rows, route = [], op.route
    monkeypatch.setattr(op, "route", lambda *args: rows.append(route(*args)) or rows[-1])
    case = make_case(70, 4, 3)
    absent, idle = torch.rand(70, 3) < 0.2, torch.rand(70, 3) < 0.3
    idle[0], absent[5], idle[40] = True, True, True  # tokens without any expert
    weight = case.topk_weight.detach().masked_fill(idle, 0).requires_grad_()
    index = case.topk_index.masked_fill(idle, 1000).masked_fill(absent, -1)
    actual = run(
        case._replace(topk_index=index, topk_weight=weight), functools.partial(kernels.expert_mlp, ragged=True)
    )
    none = absent | idle
    silent = case._replace(topk_weight=case.topk_weight.detach().masked_fill(none, 0).requires_grad_())
    expected = reference(silent)
    expected[4] = expected[4].masked_fill(none, 0)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert int(rows[0].offsets[-1]) == int((~none).sum())
    assert int(rows[0].tile_count) < len(rows[0].tile_expert)
    plain = run(
        case._replace(topk_index=index, topk_weight=weight),
        functools.partial(kernels.reference.expert_mlp, ragged=True),
    )
    for a, b in zip(plain, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_an_index_of_minus_one_is_refused_unless_ragged(interpreter):  # noqa: F811
    case = make_case(8, 4, 2)
    with pytest.raises(ValueError, match=r"topk_index spans -1 to 3, outside the 4 experts$"):
        kernels.expert_mlp(*case._replace(topk_index=torch.tensor([[-1, 3]]).repeat(8, 1)))
    with pytest.raises(ValueError, match=r"spans -2 to 3, outside the 4 experts \(-1 for no expert\)"):
        kernels.expert_mlp(*case._replace(topk_index=torch.tensor([[-2, 3]]).repeat(8, 1)), ragged=True)


def test_indices_of_any_integer_type(interpreter):  # noqa: F811
    """More experts than int8 can name, too: an index is compared in 64 bits."""
    many = make_case(6, 300, 2, 8, 8, index=torch.randint(100, (6, 2)))
    expected = kernels.expert_mlp(*many)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        narrow = many._replace(topk_index=many.topk_index.to(dtype))
        assert torch.equal(kernels.expert_mlp(*narrow), expected), dtype
        assert torch.allclose(kernels.reference.expert_mlp(*narrow), expected, atol=1e-5), dtype


@pytest.mark.parametrize(
    ("skew", "most"),
    [(2.0, 5), (20.0, 9), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.0, 9), (20.0, 2)))],
)
def test_the_rows_of_crowded_experts_are_cut(shuffled, monkeypatch, skew, most):  # noqa: F811
    """Pieces of 64 rows and more, as many as the loads ask for; gradients as ever."""
    cuts, cut = [], grad_weight.cut
    monkeypatch.setattr(grad_weight, "cut", lambda *args: cuts.append(cut(*args)) or cuts[-1])
    monkeypatch.setattr(pieces, "most_pieces", lambda *args: most)
    index = (torch.rand(300, 2).pow(1 + skew) * 5).long()
    index[0] = 4  # so that the last expert has rows
    _agree(make_case(300, 6, 2, index=index))
    sizes = torch.bincount(index.flatten(), minlength=6)
    assert len(cuts) == 2
    for made in cuts:
        units = made.unit_expert[made.unit_expert >= 0]
        wanted = torch.repeat_interleave(torch.arange(6), (-(-sizes // made.rows)).clamp_min(1))
        assert torch.equal(units, wanted.int())
        assert (made.first_slot >= 0).tolist() == (sizes > made.rows).tolist()


def test_gradients_that_nobody_asked_for(interpreter):  # noqa: F811
    case = make_case(40, 3, 2)
    whole = run(case)
    for wanted in ((0,), (1,), (2,), (3,), (0, 3), (1, 2)):
        for i, tensor in enumerate(case.floating):
            tensor.requires_grad_(i in wanted)
        out = kernels.expert_mlp(*case)
        target = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
        grads = torch.autograd.grad((out * target).sum(), [case.floating[i] for i in wanted])
        assert all(torch.equal(g, whole[1 + i]) for g, i in zip(grads, wanted, strict=True)), wanted


def test_inference_saves_nothing(interpreter):  # noqa: F811
    case = make_case(40, 3, 2)
    expected = run(case)[0]
    with torch.no_grad():
        assert torch.equal(kernels.expert_mlp(*case), expected)
    x, gate_up, down, index, weight, activation = (t.detach() if torch.is_tensor(t) else t for t in case)
    assert op.forward_op(x, gate_up, down, index, weight, activation, False, False)[1].numel() == 0


def test_views_are_copied_first(interpreter):  # noqa: F811
    case = make_case(40, 3, 2)
    wide = torch.randn(40, 64)
    odd = torch.randn(40 * 32 + 1)[1:].view(40, 32)  # begins 4 bytes past a 16-byte boundary
    for x in (wide[:, ::2], torch.randn(32, 40).t(), odd):
        down = case.down.detach().transpose(1, 2).contiguous().transpose(1, 2)
        index = torch.stack([case.topk_index] * 2, -1)[..., 0]
        _agree(case._replace(x=x.requires_grad_(), down=down.requires_grad_(), topk_index=index))


def test_the_gradient_may_be_expanded(interpreter):  # noqa: F811
    case = make_case(40, 3, 2)
    (grad,) = torch.autograd.grad(kernels.expert_mlp(*case).sum(), [case.x])
    (expected,) = torch.autograd.grad(kernels.reference.expert_mlp(*case).sum(), [case.x])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_autocast_casts_and_returns_its_dtype(interpreter):  # noqa: F811
    case = make_case(40, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.expert_mlp(*case).dtype == torch.bfloat16
        relative = errors(case)
    assert max(relative) < TOLERANCE[torch.bfloat16]


def test_compiles_without_graph_break(interpreter):  # noqa: F811
    case = make_case(70, 4, 2)
    torch.compiler.reset()
    compiled = torch.compile(kernels.expert_mlp, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(case, compiled), run(case), strict=True))


def test_the_ops_keep_their_contract(interpreter):  # noqa: F811
    """Schema, fake kernels against real ones, and autograd registered where it belongs."""
    x, gate_up, down, index, weight, activation = make_case(20, 3, 2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, gate_up, down, index, weight, activation, True, False)
    torch.library.opcheck(op.forward_op, arguments, test_utils=tests)
    _, pre, buffer = op.forward_op(*arguments)
    tensors = [t.detach() for t in (torch.randn(x.shape), x, gate_up, down, index, weight, pre, buffer)]
    for needs in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(op.backward_op, (*tensors, activation, needs, False), test_utils=tests)


def test_a_persistent_launch_leaves_the_callers_allocator(interpreter, monkeypatch):  # noqa: F811
    """On a GPU, descriptors need memory from an allocator that belongs to the context, in any thread."""
    import triton
    from triton.runtime import _allocation

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((grid, arguments, _allocation._allocator.get()))

    def callers(size, alignment, stream):
        return None

    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    triton.set_allocator(callers)
    launching.launch_persistent(Kernel(), torch.device("cuda"), 1000, "x", num_warps=8)
    launching.launch_persistent(Kernel(), torch.device("cuda"), 5, "x", num_warps=8)
    assert [(grid, arguments) for grid, arguments, _ in seen] == [((132,), ("x",)), ((5,), ("x",))]
    assert all(allocator is launching._scratch for *_, allocator in seen)
    assert _allocation._allocator.get() is callers


def test_activation_checkpointing(interpreter):  # noqa: F811
    case = make_case(40, 3, 2)
    again = run(case, lambda *args: checkpoint(kernels.expert_mlp, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(again, run(case), strict=True))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"width": 12}, "multiples of 8"),
        ({"inter": 20}, "multiples of 8"),
        ({"dtype": torch.float64}, "float64"),
        ({"tokens": 0}, "no token"),
    ],
)
def test_what_the_kernels_cannot_take_goes_to_the_reference(interpreter, changes, why):  # noqa: F811
    case = make_case(**{"tokens": 30, "num_experts": 4, "top_k": 2, **changes})
    assert why in checks.why_not(case.x, case.gate_up, 2)
    fallback.say.cache_clear()
    with pytest.warns(UserWarning, match=why):
        results = run(case)
    for actual, expected in zip(results, reference(case), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"x must be \(T, H\)"),
        ("x", lambda t: t[:, :-8], "do not fit"),
        ("x", lambda t: t.half(), "cast them to one"),
        ("x", lambda t: t.to("meta"), "is on cpu but x is on meta"),
        ("gate_up", lambda t: t[:, :-1], "do not fit"),
        ("gate_up", lambda t: t[:0], "E = 0"),
        ("down", lambda t: t[:1], "do not fit"),
        ("down", lambda t: t.transpose(1, 2), "do not fit"),
        ("down", lambda t: t.to("meta"), "down is on meta but x is on cpu"),
        ("topk_index", lambda t: t + 3, "outside the 4 experts"),
        ("topk_index", lambda t: t - 4, "outside the 4 experts"),
        ("topk_index", lambda t: t + 2**32, "outside the 4 experts"),
        ("topk_index", lambda t: t.float(), "must hold integers"),
        ("topk_index", lambda t: t[:-1], r"not both \(T, K\)"),
        ("topk_weight", lambda t: t[:, :1], r"not both \(T, K\)"),
        ("topk_weight", lambda t: t.int(), "must be floating point"),
        ("activation", lambda name: "relu", "unknown activation"),
    ],
)
def test_bad_input_is_one_clear_line(interpreter, name, change, message):  # noqa: F811
    case = make_case(30, 4, 2)
    with pytest.raises(ValueError, match=message) as caught:
        kernels.expert_mlp(*case._replace(**{name: change(getattr(case, name))}))
    assert "\n" not in str(caught.value)


def test_an_old_gpu_or_no_triton_goes_to_the_reference(interpreter, monkeypatch):  # noqa: F811
    case = make_case(30, 4, 2)
    monkeypatch.setattr(checks, "capability_of", lambda device: (7, 5))

    class OnCuda:
        device, dtype, shape = torch.device("cuda", 0), torch.float16, (30, 32)

        def __len__(self):
            return 30

    assert "7.5" in checks.why_not(OnCuda(), case.gate_up, 2)
    monkeypatch.setattr(checks, "has_triton", lambda: False)
    fallback.say.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed"):
        _agree(case)


def test_the_switch(interpreter, monkeypatch):  # noqa: F811
    case, odd = make_case(30, 4, 2), make_case(30, 4, 2, width=12)
    fallback.say.cache_clear()
    monkeypatch.setenv(fallback.SWITCH, "forbid")
    with pytest.warns(UserWarning, match="EXPERT_MLP_KERNELS=forbid"):
        assert torch.equal(kernels.expert_mlp(*case), kernels.reference.expert_mlp(*case))
    monkeypatch.setenv(fallback.SWITCH, "require")
    with pytest.raises(ValueError, match="EXPERT_MLP_KERNELS=require, but H = 12"):
        kernels.expert_mlp(*odd)
    assert kernels.expert_mlp(*make_case(0, 4, 2)).shape == (0, 32)  # nothing to compute is nothing to refuse
    _agree(case)
    monkeypatch.setenv(fallback.SWITCH, "perhaps")
    with pytest.raises(ValueError, match="EXPERT_MLP_KERNELS=perhaps: choose one of auto, require, forbid"):
        kernels.expert_mlp(*case)


def test_an_interpreter_that_cannot_is_refused_in_words(interpreter, monkeypatch):  # noqa: F811
    """Triton 3.6 beside NumPy 2.4 and later, which no longer take a scalar out of an array of one element."""
    case = make_case(30, 4, 2)
    monkeypatch.setattr(precision, "version", lambda: (3, 6))
    monkeypatch.setattr(precision.np, "__version__", "2.5.1")
    fallback.say.cache_clear()
    with pytest.warns(UserWarning, match="cannot interpret with NumPy 2.5.1: install Triton 3.7 or newer"):
        _agree(case)
    monkeypatch.setattr(precision.np, "__version__", "2.3.5")
    assert checks.why_not(case.x, case.gate_up, 2) is None
