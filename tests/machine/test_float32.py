"""float32 that is promised is float32: under autocast, where products may be rounded, and where a module is cast."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moebed.machine import float32
from moebed.machine.float32 import exact_products, float32_linear
from moebed.model.decoder import Decoder
from moebed.model.losses import load_balancing_loss, output_similarity, router_stats, token_losses, weight_similarity
from moebed.model.routers import TokenContext
from moebed.model.routers.norms import norms
from moebed.training.metrics import TextLoss
from moebed.training.optim import gradient_norm, scale_gradients
from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.registry import PROBES
from probes.running.driver import needs_of, run_probes
from tests.conftest import tiny_config
from tests.model.routers.router_cases import ALL, GivenOutputs, config_of, domains_of, router_of

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


@pytest.fixture(autouse=True)
def _settings():
    """What a process may be set to is as before after each test."""
    matmul, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.set_default_dtype(dtype)


def test_the_norm_of_gradients_is_float32():
    parameters = [torch.nn.Parameter(torch.zeros(50, 40, dtype=torch.bfloat16)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(50, 40).bfloat16()
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float32
    assert norm == pytest.approx(float(torch.cat([p.grad.double().flatten() for p in parameters]).norm()), rel=1e-6)
    scale_gradients(parameters, 1 / norm)
    assert parameters[0].grad.dtype == torch.bfloat16
    assert gradient_norm(parameters) == pytest.approx(1, rel=1e-3)


class Products(TorchDispatchMode):
    """Notes how float32 products were allowed to be computed; those of numbers that bfloat16 holds lose nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operands = [value for value in args if isinstance(value, torch.Tensor)]
        is_product = func.overloadpacket in PRODUCTS and operands[-1].dtype == torch.float32
        if is_product and not all(bool((value == value.bfloat16()).all()) for value in operands):
            self.seen.append(_settings_now())
        return func(*args, **(kwargs or {}))


def _routing(name, x, **cast):
    router = router_of(name).to(**cast)
    experts = GivenOutputs(torch.randn(len(x), 4, 32, generator=torch.Generator().manual_seed(1)).to(x.dtype))
    ids = torch.arange(len(x)).view(2, -1)
    return router(x, experts, TokenContext.of_batch(ids, domains_of(ids)).changed(torch.flatten))


@pytest.mark.parametrize("how", ["autocast", "bf16-true"])
@pytest.mark.parametrize("name", ALL)
def test_what_routers_decide_by_is_float32(name, how):
    torch.manual_seed(0)
    x = torch.randn(24, 32)
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routing = _routing(name, x)
            stats = router_stats(routing, torch.ones(24, dtype=torch.bool))
            loss = load_balancing_loss(stats.mean_probs, stats.counts)
    else:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning's plugin does while a module of its computes
        routing = _routing(name, x.bfloat16(), dtype=torch.bfloat16)
        stats = router_stats(routing, torch.ones(24, dtype=torch.bool))
        loss = load_balancing_loss(stats.mean_probs, stats.counts)
    parts = [routing.router_logits, routing.router_probs, routing.topk_weight, *(routing.losses or {}).values()]
    parts += [stats.counts, stats.mean_probs, stats.z_loss, *stats.losses.values(), *stats.sums.values(), loss]
    assert {part.dtype for part in parts} == {torch.float32}


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk", "relu", "random", "factorised_gate", "noisy_topk"])
def test_a_gate_is_not_rounded_whatever_the_process_allows(name):
    """ "medium" makes products bfloat16 on CPUs that have them; the decision and its gradient are the same bits."""
    found = []
    for allowed in ("highest", "medium", "high"):
        torch.set_float32_matmul_precision(allowed)
        torch.manual_seed(0)
        x = torch.randn(64, 32, requires_grad=True)
        with Products() as products:
            routing = _routing(name, x)
            routing.router_probs.square().sum().backward()
        assert products.seen
        assert set(products.seen) == {("ieee", "ieee")}
        assert torch.get_float32_matmul_precision() == allowed
        found.append((routing.router_logits.detach(), x.grad))
    for logits, gradient in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_a_compiled_gate_is_not_rounded_either():
    torch.set_float32_matmul_precision("medium")
    x, weight = torch.randn(64, 512, requires_grad=True), torch.randn(8, 512, requires_grad=True)
    graph = torch.compile(float32_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    found = graph(x, weight)
    exact = x.detach().double() @ weight.detach().double().t()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)
    found.square().sum().backward()
    torch.testing.assert_close(weight.grad.double(), 2 * exact.t() @ x.detach().double(), rtol=1e-4, atol=1e-2)


def test_balancing_under_autocast_is_that_without():
    """In bfloat16 the mean over many tokens loses what few of them add: 3 % of the gradient at two thousand tokens."""
    logits = (2 * torch.randn(4096, 8)).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            routing = router_of("softmax_topk", num_experts=8).choose(logits)
            stats = router_stats(routing, torch.ones(4096, dtype=torch.bool))
            loss = load_balancing_loss(stats.mean_probs, stats.counts)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_every_other_loss_is_float32_under_autocast():
    outputs, neurons = torch.randn(12, 2, 32).bfloat16(), [torch.randn(4, 32) for _ in range(3)]
    logits, labels = torch.randn(2, 6, 96).bfloat16(), torch.randint(0, 96, (2, 6))
    torch.set_float32_matmul_precision("medium")
    without = weight_similarity(neurons)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weight_similarity(neurons), without)
        found = [output_similarity(outputs), token_losses(logits, labels), without]
    assert {value.dtype for value in found} == {torch.float32}


@pytest.mark.parametrize("name", ["softmax_topk", "autonomy"])
def test_mean_neurons_of_the_diversity_loss_are_not_rounded(name):
    experts = Decoder(config_of(name)).layers[0].mlp.experts
    without = experts.mean_neurons()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(mean, without[name]) for name, mean in experts.mean_neurons().items())


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("meta").half()]
)
@pytest.mark.parametrize("name", [name for name in ALL if list(router_of(name).buffers())])
def test_what_a_router_adds_up_stays_float32_where_the_model_is_cast(name, cast):
    router = router_of(name)
    before = {key: value.clone() for key, value in router.named_buffers()}
    router = cast(router)
    for key, value in router.named_buffers():
        assert value.dtype == torch.float32
        assert value.is_meta or torch.equal(value, before[key])
    assert all(value.dtype != torch.float32 for value in router.parameters())


def test_a_bias_goes_on_growing_in_a_model_of_bfloat16():
    """In bfloat16 it would stop at .5, where .001 is less than the last digit."""
    from moebed.model.routers import Load

    router = router_of("sigmoid_topk").to(torch.bfloat16)
    load = Load(torch.tensor([0.0, 2, 2, 2]), torch.tensor(1.0))
    for _ in range(700):
        router.end_step(load)
    assert router.expert_bias[0].item() == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_text_loss_sums_in_float64_where_a_module_is_cast(cast):
    holder = torch.nn.ModuleList([TextLoss(2)])
    metric = cast(holder)[0]
    ids = torch.tensor([0, 1])
    metric.update(torch.tensor([3.0, 5.0]), torch.tensor([2, 2]), torch.tensor([4, 4]), ids)
    assert metric.nats.dtype == torch.float64
    assert metric.compute()["loss"].item() == 2.0


def test_no_probe_lets_products_be_rounded():
    """Every probe there is, on text and weights of a live model, where the process allows the least."""
    torch.set_float32_matmul_precision("medium")
    ids = torch.randint(0, 96, (3, 24))
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 1, 0]), ("books", "code"))
    decoder = Decoder(tiny_config(num_hidden_layers=2, num_shared_experts=1, num_experts=6))
    probes = [kind() for kind in PROBES.values()]
    with Products() as products:
        found = run_probes(walk(decoder, text, needs_of(probes)), probes)
    assert set(found) == set(PROBES)
    assert len(products.seen) > 20
    assert set(products.seen) == {("ieee", "ieee")}
    assert torch.get_float32_matmul_precision() == "medium"


def _settings_now():
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def _odd_integers(rows, columns, least, seed):
    """Odd numbers of either sign from ``least`` on, 128 of them: from 1 bfloat16 holds them all, from 257 none."""
    generator = torch.Generator().manual_seed(seed)
    size, sign = (torch.randint(most, (rows, columns), generator=generator) for most in (128, 2))
    return ((least + 2 * size) * (2 * sign - 1)).float()


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("is_bf16", [True, False])
def test_exact_products_lose_nothing(allowed, has_units, is_bf16, monkeypatch):
    """To the last bit: every sum of these products is a whole number that float32 holds, in whatever order it is made.

    So it is with what bfloat16 holds where that is used, and with all else where it is not.
    """
    monkeypatch.setattr(float32, "multiplies_bf16_faster", lambda: has_units)
    torch.set_float32_matmul_precision(allowed)
    least = 1 if is_bf16 else 257
    for size in (1, 4, 33, 256):
        a, b = _odd_integers(size, 64, least, 0), _odd_integers(64, size, least, 1)  # 64 · 511² is below 2**24
        assert (a == a.bfloat16()).tolist() == [[is_bf16] * 64] * size
        with exact_products(is_bf16=is_bf16):
            assert _settings_now() == ("bf16" if is_bf16 and has_units else "ieee", "tf32" if is_bf16 else "ieee")
            found = a @ b
        assert torch.equal(found.double(), a.double() @ b.double())


@pytest.mark.parametrize("allowed", [None, "highest", "high", "medium"])
@pytest.mark.parametrize("is_bf16", [True, False])
def test_exact_products_leave_the_settings_as_they_were(allowed, is_bf16):
    if allowed is not None:
        torch.set_float32_matmul_precision(allowed)
    before = _settings_now()
    with exact_products(is_bf16=is_bf16):
        inside = _settings_now()
        with exact_products(is_bf16=not is_bf16):
            pass
        assert _settings_now() == inside
    assert _settings_now() == before
    with pytest.raises(KeyError), exact_products(is_bf16=is_bf16):
        raise KeyError
    assert _settings_now() == before
    if allowed == "high":
        assert before == ("tf32", "tf32")


def test_the_kernels_read_a_switch_that_never_raises():
    pytest.importorskip("triton")
    from triton_kernels.precision import constants

    torch.set_float32_matmul_precision("highest")  # whatever a command before asked for
    assert constants(torch.float32)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("high")
    assert constants(torch.float32)["PRECISION"] == "tf32"
    with exact_products():  # reading allow_tf32 raises here
        assert constants(torch.float32)["PRECISION"] == "ieee"


def test_a_norm_of_nothing_has_no_gradient():
    values = torch.zeros(3, 4, requires_grad=True)
    (norms(values) * 100.0).sum().backward()
    assert torch.equal(values.grad, torch.zeros(3, 4))
