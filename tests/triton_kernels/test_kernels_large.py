"""Offsets past 2^31 elements: every product at the far end of tensors that are that large, and almost all untouched.

The memory of a tensor that nobody wrote to is not there yet, so that tensors of 4 GiB cost a few pages each. One tile
of rows lies at the end of each tensor, and the last program of a launch runs alone. The same rows in tensors of their
own size, where offsets are small, must give the same bits.

T tokens, R rows, E experts, H hidden, F expert intermediate, G = 2F.
"""

import pytest
import torch
from kernels_interpreted import (  # noqa: F401
    combining,
    configs,
    gather,
    grad_activation,
    grad_hidden,
    grad_weight,
    interpreter,
    launching,
    op,
    parts,
    routing,
    triton_interpreter,
    up,
)

H = F = 64
MANY = 2**31 // (F * H) + 2  # experts: (E, H, F) passes 2^31 elements
LONG = 2**31 // H + 256  # tokens and rows: (T, H) and (R, F) do


@pytest.fixture
def last_program(interpreter, monkeypatch):  # noqa: F811
    """Launches run the last program of their grid alone, and memory without a value is left untouched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        [torch.empty(12 * 2**30, dtype=torch.int8) for _ in range(5)]
    except RuntimeError:
        pytest.skip("needs 60 GiB of addresses, though not of memory: this system gives none that it does not have")
    monkeypatch.setattr(triton_interpreter.GridExecutor, "_restore_args_dev", lambda *copied: None)
    builder, pretended = triton_interpreter.InterpreterBuilder, []

    def set_grid_dim(self, *sizes):
        self.grid_dim = (*pretended[-1], 1, 1)[:3]

    def set_grid_idx(self, *place):
        self.grid_idx = tuple(size - 1 for size in self.grid_dim)

    class Last:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            pretended.append(grid)
            return self.kernel[(1,)]

    def launch(kernel, grid, *arguments, **options):
        launching.launch(Last(kernel), grid, *arguments, **options)

    def launch_persistent(kernel, device, most, *arguments, **options):
        launch(kernel, (most,), *arguments, **options)

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(grad_weight, "cut", lambda *sizes: None)
    for module in (combining, gather, grad_weight, parts, up, grad_hidden, grad_activation):
        monkeypatch.setattr(module, "launch", launch)
        if hasattr(module, "launch_persistent"):
            monkeypatch.setattr(module, "launch_persistent", launch_persistent)


def _order(tokens, rows, num_experts, height):
    """Metadata in which the last tile is the last `height` rows, of the last tokens and the last expert."""
    tiles, numbers = rows // height, {"dtype": torch.int32}
    order, token, slot = (torch.empty(rows, **numbers) for _ in range(3))
    order[-height:] = torch.arange(height)  # the weights are the small ones of both
    token[-height:] = torch.arange(tokens - height, tokens).flip(0)
    slot[-height:] = torch.arange(rows - height, rows).flip(0)
    offsets, start, expert = (torch.empty(n, **numbers) for n in (num_experts + 1, tiles, tiles))
    offsets[-2], offsets[-1], start[-1], expert[-1] = rows - height, rows, rows - height, num_experts - 1
    count, inside = torch.tensor([tiles], **numbers), torch.ones(1, **numbers)
    return routing.Metadata(order, token, slot, offsets, expert, start, count, inside)


def _with_end(end, *shape):
    """A tensor of this shape whose last part is end."""
    whole = torch.empty(*shape, dtype=end.dtype)
    whole[len(whole) - len(end) :] = end
    return whole


def _all_products(small, tokens, rows, num_experts, config):
    """The end of what each product writes, for operands whose ends are those of small; one after another in memory."""
    x, gate_up, down, grad, pre, hidden, weight = small
    height, rows_of_activation = config.rows, min(config.rows, config.activation_rows)
    meta = _order(tokens, rows, num_experts, height)
    x, grad = _with_end(x, tokens, H), _with_end(grad, tokens, H)
    gate_up, down = _with_end(gate_up, num_experts, 2 * F, H), _with_end(down, num_experts, H, F)
    pre, hidden = _with_end(pre, rows, 2 * F), _with_end(hidden, rows, F)

    def activation_and_rows():
        """With what the rows become; of d(weight) the first, which are those of the last rows."""
        rows = hidden.clone()
        grad_pre, grad_weight = grad_activation.grad_activation(rows, pre, weight, meta, "silu", config)
        return grad_pre, rows, grad_weight[:height]

    products = {
        "gather": lambda: (gather.gather(x, meta, config),),
        "up": lambda: up.up(x, gate_up, meta, "silu", True, config),
        "down": lambda: (op.down_product(hidden, down, meta, config),),
        "grad_hidden": lambda: (grad_hidden.grad_hidden(grad, down, meta, config),),
        "grad_activation": lambda: activation_and_rows(),
        "grad_rows": lambda: (op.grad_rows(pre, gate_up, meta, config),),
        "grad_up": lambda: (op.grad_up(pre, x, meta, config),),
        "grad_down": lambda: (op.grad_down(grad, hidden, meta, config),),
        "combine": lambda: (combining.combine(hidden, meta.slot, None, 1, config),),
    }
    ends = {"grad_up": 1, "grad_down": 1, "combine": config.combine_tokens, "grad_activation": rows_of_activation}
    ends["gather"] = config.gather_rows
    return {name: [t[-ends.get(name, height) :].clone() for t in product()] for name, product in products.items()}


@pytest.mark.parametrize("name", [pytest.param("interpreted", marks=pytest.mark.slow), "hopper"])
def test_offsets_past_two_to_the_31(last_program, name):
    config = configs.BY_NAME[name]
    torch.manual_seed(0)
    height = config.rows
    sizes = [(height, H), (1, 2 * F, H), (1, H, F), (height, H), (height, 2 * F), (height, F)]
    small = [torch.randn(size, dtype=torch.float16) for size in sizes] + [torch.rand(height, 1)]
    far = _all_products(small, LONG // height * height, LONG // height * height, MANY, config)
    near = _all_products(small, height, height, 1, config)
    for product, tensors in near.items():
        for a, b in zip(far[product], tensors, strict=True):
            assert b.isfinite().all(), product
            assert b.any(), product
            assert torch.equal(a, b), product
