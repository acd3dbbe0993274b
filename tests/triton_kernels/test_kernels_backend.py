"""The ``triton`` experts backend at moebed's seam, interpreted: it agrees with ``loop``, and trains as it does."""

import copy
import sys
import types

import pytest
import torch
from kernels_interpreted import interpreter, op, shuffled  # noqa: F401
from torch.nn.functional import cross_entropy

from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.experts import BACKENDS, Experts, resolve_backend
from moebed.model.routers import Routing
from tests.conftest import tiny_config


def _experts(**changes) -> Experts:
    config = tiny_config(experts_backend="triton", **changes)
    experts = Experts(config, config.layer(0))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def _routing(tokens: int, num_experts: int, top_k: int) -> Routing:
    empty = torch.empty(tokens, num_experts)
    index = torch.rand(tokens, num_experts).topk(top_k).indices
    return Routing(empty, empty, index, torch.rand(tokens, top_k, requires_grad=True))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_triton_equals_loop(shuffled, act):  # noqa: F811
    experts, routing = _experts(num_experts=5, hidden_act=act), _routing(90, 5, 2)
    x, target = torch.randn(90, 32, requires_grad=True), torch.randn(90, 32)
    inputs = [x, routing.topk_weight, *experts.parameters()]
    results = []
    for backend in ("triton", "loop"):
        out = BACKENDS[backend](experts, x, routing)
        results.append([out, *torch.autograd.grad((out * target).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_ragged_routing_equals_loop(shuffled, monkeypatch):  # noqa: F811
    """Weights of 0 are no assignments, as routers with a number of experts of each token's own say; no gradient."""
    experts, routing = _experts(num_experts=5), _routing(60, 5, 3)
    weight = routing.topk_weight.detach().masked_fill(torch.rand(60, 3) < 0.4, 0).requires_grad_()
    routing = routing._replace(topk_weight=weight, ragged=True)
    rows, route = [], op.route
    monkeypatch.setattr(op, "route", lambda *args: rows.append(route(*args)) or rows[-1])
    x, target = torch.randn(60, 32, requires_grad=True), torch.randn(60, 32)
    inputs = [x, weight, *experts.parameters()]
    results = []
    for backend in ("triton", "loop"):
        out = BACKENDS[backend](experts, x, routing)
        results.append([out, *torch.autograd.grad((out * target).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert int(rows[0].offsets[-1]) == int((weight != 0).sum()) < 180


def test_the_module_compiles_in_one_graph(interpreter):  # noqa: F811
    experts, routing, x = _experts(), _routing(70, 4, 2), torch.randn(70, 32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, r: experts(x, r), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, routing), experts(x, routing))


def test_a_training_run_tracks_loop(interpreter):  # noqa: F811
    """A decoder from the same start, five steps by each backend: the losses part by rounding alone, and fall."""
    start = Decoder(tiny_config(experts_backend="loop", num_hidden_layers=1, initializer_range=0.05))
    ids = torch.randint(0, 96, (2, 33))
    losses, ends = {}, {}
    for backend in ("loop", "triton"):
        decoder = copy.deepcopy(start)
        for module in decoder.modules():
            if isinstance(module, Experts):
                module.backend = BACKENDS[backend]
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
        losses[backend] = []
        for _ in range(5):
            loss = cross_entropy(decoder(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(float(loss.detach()))
        ends[backend] = torch.cat([parameter.detach().flatten() for parameter in decoder.parameters()])
    assert losses["triton"] == pytest.approx(losses["loop"], rel=1e-4)
    assert not torch.equal(ends["triton"], ends["loop"])  # two computations, not one under two names
    assert losses["triton"][-1] < 0.8 * losses["triton"][0]


def test_a_cpu_without_the_interpreter_is_refused_in_one_line():
    experts, routing = _experts(), _routing(8, 4, 2)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1") as caught:
        experts(torch.randn(8, 32), routing)
    assert "\n" not in str(caught.value)


def test_another_distribution_of_the_name_is_noticed(monkeypatch):
    other = types.ModuleType("triton_kernels")
    other.__file__ = "site-packages/triton_kernels/__init__.py"
    monkeypatch.setitem(sys.modules, "triton_kernels", other)
    with pytest.raises(ConfigError, match=r"site-packages/triton_kernels.* is another distribution"):
        resolve_backend("triton")
