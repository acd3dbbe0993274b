"""What a call launches, allocates and compiles, counted without a device: the driver is a stub, nothing is compiled.

Each launch is seen by Triton's own hook before it would compile, with the key of its cache: two launches with one key
are one compilation. T tokens, K experts per token, E experts, H hidden, F expert intermediate.
"""

import dataclasses
import warnings
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from triton_kernels import configs, launching
from triton_kernels.mlp import fallback, op, reference

H, F = 256, 128


class Driver:
    """As much of an H100's driver as a launch asks for before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Operators(TorchDispatchMode):
    """Counts what PyTorch is asked to do, but for views."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Launches as (kernel, key of Triton's cache), in their order."""
    seen = []

    def note(*, key, fn, **rest):
        seen.append((fn.name.split(".")[-1], key))
        return True  # go no further

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(op, "choose", lambda *device: configs.HOPPER)
    monkeypatch.setattr(op, "check_inside", lambda inside, *rest: torch._assert_async(torch.ones(())))
    yield seen
    triton.runtime.driver._active = before


def _tensors(tokens, num_experts, top_k, dtype=torch.int64):
    half = {"dtype": torch.bfloat16}
    matrices = torch.zeros(num_experts, 2 * F, H, **half), torch.zeros(num_experts, H, F, **half)
    index = torch.zeros(tokens, top_k, dtype=dtype)
    return torch.zeros(tokens, H, **half), *matrices, index, torch.rand(tokens, top_k)


def _forward(tensors, save=True):
    with Operators() as operators:
        out, *kept = op.forward_op._init_fn(*tensors, "silu", save, False)
    return out, kept, operators.seen


def _backward(out, tensors, kept):
    with Operators() as operators:
        op.backward_op._init_fn(out, *tensors, *kept, "silu", [True] * 4, False)
    return operators.seen


def _allocations(seen):
    return sum(count for name, count in seen.items() if "empty" in name)


def test_launches_and_allocations_of_a_small_call(launched):
    """A decoding step: four launches, the assertion, and five tensors; nothing else is asked of PyTorch."""
    tensors = _tensors(16, 8, 2)
    out, kept, seen = _forward(tensors)
    kernels = [name for name, _ in launched]
    assert kernels == ["route_small_kernel", "up_persistent_kernel", "down_persistent_kernel", "combine_kernel"]
    assert _allocations(seen) == 5
    assert {name for name in seen if "empty" not in name} == {"_assert_async", "ones"}
    launched.clear()
    seen = _backward(out, tensors, kept)
    kernels = ["grad_hidden_persistent_kernel", "grad_activation_kernel", "grad_weight_kernel", "grad_weight_kernel"]
    assert [name for name, _ in launched] == [*kernels, "grad_rows_persistent_kernel", "combine_kernel"]
    assert _allocations(seen) == 6
    assert {name for name in seen if "empty" not in name} == {"zeros_like"}


def test_launches_and_allocations_of_a_large_call(launched):
    """Four launches route; crowded experts' rows are cut where few tiles make a matrix, here for both gradients."""
    tensors = _tensors(8192, 8, 2)
    out, kept, seen = _forward(tensors)
    routed = ["count_kernel", "scan_kernel", "tiles_kernel", "place_kernel"]
    assert [name for name, _ in launched][:4] == routed
    assert len(launched) == 7
    assert _allocations(seen) == 6
    launched.clear()
    seen = _backward(out, tensors, kept)
    assert Counter(name for name, _ in launched) == {
        "grad_hidden_persistent_kernel": 1, "grad_activation_kernel": 1, "pieces_kernel": 2, "grad_weight_kernel": 2,
        "add_kernel": 2, "grad_rows_persistent_kernel": 1, "combine_kernel": 1,
    }  # fmt: skip
    assert _allocations(seen) == 6 + 4


def _all_sizes():
    yield from ((64, experts, min(2, experts)) for experts in (1, 4, 8, 16, 24, 60, 64, 128))
    yield from ((tokens, 8, 2) for tokens in (1, 7, 64, 100, 1000, 4096))
    yield from ((64, 8, top_k) for top_k in (1, 2, 3, 4, 6, 8))


def test_no_number_of_experts_choices_or_tokens_compiles_anew(launched):
    """Every kernel once for all of them, but for the forms of dW (two shapes, cut or not) and of the combine (weighted
    or not)."""
    for sizes in _all_sizes():
        tensors = _tensors(*sizes)
        out, kept, _ = _forward(tensors)
        _backward(out, tensors, kept)
    compiled = Counter(name for name, _ in set(launched))
    assert compiled.total() == 19
    assert {name: count for name, count in compiled.items() if count != 1} == {
        "grad_weight_kernel": 4, "add_kernel": 2, "combine_kernel": 2,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_indices_of_any_type_are_read_as_they_are(launched, dtype):
    _, _, seen = _forward(_tensors(16, 8, 2, dtype), save=False)
    assert not {name for name in seen if "empty" not in name} - {"_assert_async", "ones"}
    assert len(launched) == 4


class Refusing:
    """A kernel that some compiler refuses."""

    __name__ = "down_kernel"

    def __init__(self, error):
        self.error, self.tries = error, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.tries += 1
        raise self.error


def test_a_refusal_names_the_kernel_in_one_line():
    with pytest.raises(launching.LaunchError, match="down_kernel: ValueError: no such layout") as caught:
        launching.launch(Refusing(ValueError("no such layout\nand a hundred lines")), (1,))
    assert "\n" not in str(caught.value)
    with pytest.raises(launching.LaunchError, match="are more than"):
        launching.launch(Refusing(None), (2**16, 2**15))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("an assertion")])
def test_what_is_wrong_on_the_device_is_no_refusal(error):
    """Another way of computing would not mend it."""
    with pytest.raises(type(error)):
        launching.launch(Refusing(error), (1,))


@pytest.fixture
def refused(launched, monkeypatch):
    """The op on a device whose compiler refuses the down product, with nothing refused before."""
    monkeypatch.setattr(fallback, "_refused", set())
    fallback.say.cache_clear()
    return launched


def _case():
    torch.manual_seed(0)
    floating = [torch.randn(20, 32), torch.randn(4, 48, 32), torch.randn(4, 32, 24), torch.rand(20, 2)]
    x, gate_up, down, weight = (t.double().requires_grad_() for t in floating)
    return (x, gate_up, down, torch.randint(4, (20, 2)), weight), (x, gate_up, down, weight)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("where", ["down_product", "grad_rows"])
def test_a_refusal_falls_back_once_and_aloud(refused, monkeypatch, where, activation):
    """Forward and backward, in float64 as autograd of the reference has it; the second call does not try again."""
    tries = []

    def refuse(*arguments):
        tries.append(where)
        raise launching.LaunchError("down_kernel: CompilationError: no")

    monkeypatch.setattr(op, where, refuse)
    arguments, floating = _case()
    target = torch.randn(20, 32, dtype=torch.float64)
    expected = reference.expert_mlp(*arguments, activation)
    wanted = torch.autograd.grad((expected * target).sum(), floating)
    if where == "grad_rows":  # the forward pass was not refused, and what it would have computed is the reference's
        monkeypatch.setattr(op, "combine", lambda *rest: expected.detach().clone())

    def step():
        out = op.forward_op(*arguments, activation, True, False)[0]
        return out, torch.autograd.grad((out * target).sum(), floating)

    with pytest.warns(UserWarning, match=r"down_kernel: CompilationError: no.*EXPERT_MLP_KERNELS=require"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, grads = step()
    assert tries == [where]
    torch.testing.assert_close(out, expected)
    for actual, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, want)


def test_the_switch_requires_the_kernels(refused, monkeypatch):
    def refuse(*arguments):
        raise launching.LaunchError("up_kernel: no")

    monkeypatch.setattr(op, "up_product", refuse)
    monkeypatch.setenv(fallback.SWITCH, "require")
    with pytest.raises(launching.LaunchError, match="up_kernel: no"):
        op.forward_op(*_case()[0], "silu", True, False)


def test_launches_happen_on_the_device_of_the_tensors(monkeypatch):
    """Tensors on cuda:1 while cuda:0 is current: the guard is entered before the first launch and left after the last.

    PyTorch's own guard sets the device; here a stub stands for it.
    """
    calls = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            calls.append(f"enter {self.device}")

        def __exit__(self, *error):
            calls.append("leave")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    with launching.on_device(torch.device("cuda", 1)):
        calls.append("launch")
    assert calls == ["enter cuda:1", "launch", "leave"]
    assert isinstance(launching.on_device(torch.device("cpu")), nullcontext)


def test_both_ops_launch_within_the_guard(launched, monkeypatch):
    inside, devices = [], []

    class Guard:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *error):
            inside.pop()

    def guard(device):
        devices.append(device)
        return Guard()

    def note(*, fn, **rest):
        assert inside, f"{fn.name} is launched outside the guard"
        return True

    monkeypatch.setattr(op, "on_device", guard)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    tensors = _tensors(16, 8, 2)
    out, kept, _ = _forward(tensors)
    _backward(out, tensors, kept)
    assert devices == [tensors[0].device] * 2


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "ampere"), ((8, 6), "ampere"), ((8, 7), "ampere"), ((8, 9), "ampere"), ((9, 0), "hopper"),
        ((10, 0), "blackwell"), ((10, 3), "blackwell"), ((12, 0), "ampere"), ((12, 1), "ampere"), (None, "cdna"),
    ],
)  # fmt: skip
def test_tiles_by_capability(capability, name):
    assert configs.choose(capability, 2, False, 1408).name == name
    assert configs.choose(capability, 4, False, 14336).name == "wide"
    assert {configs.choose(capability, size, True, 14336).name for size in (2, 4)} == {"interpreted"}
    wide = configs.choose(capability, 2, False, 14336)
    assert wide.name == ("hopper sorted" if name == "hopper" else name)
    assert wide.rows == configs.BY_NAME[name].rows  # what is saved has one size
    assert configs.choose(capability, 2, False, configs.SORTED_FROM) == wide
    assert configs.choose(capability, 2, False, configs.SORTED_FROM - 1).name == name


def test_blocks_that_cover_a_size_and_the_power_of_two_that_does():
    assert [configs.cdiv(size, 4) for size in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [configs.power_of_two(size) for size in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("name", ["up", "grad_hidden"])
def test_sorted_rows_need_kernels_that_read_them(name):
    with pytest.raises(ValueError, match="hopper sorted: only persistent kernels read rows that are sorted"):
        dataclasses.replace(configs.HOPPER_SORTED, **{name: getattr(configs.AMPERE, name)})


def test_wide_experts_have_their_rows_sorted_once_forward_and_twice_backward(launched, monkeypatch):
    """Tokens forward, then the output's gradient and the tokens again, which no one keeps between the two."""
    monkeypatch.setattr(op, "choose", lambda *device: configs.HOPPER_SORTED)
    tensors = _tensors(16, 8, 2)
    out, kept, seen = _forward(tensors)
    assert [name for name, _ in launched][:3] == ["route_small_kernel", "gather_kernel", "up_persistent_kernel"]
    assert _allocations(seen) == 6
    launched.clear()
    assert _allocations(_backward(out, tensors, kept)) == 8
    names = [name for name, _ in launched]
    assert [names[i + 1] for i, name in enumerate(names) if name == "gather_kernel"] == [
        "grad_hidden_persistent_kernel", "grad_weight_kernel",
    ]  # fmt: skip
