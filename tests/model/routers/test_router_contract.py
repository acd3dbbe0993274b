"""What holds for every router: backends, gradients, evaluation, recomputation, compilation, and in which words."""

import dataclasses

import pytest
import torch

from moebed.errors import ConfigError
from moebed.model.attention import KVCache
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.experts import Experts, _native_unfit
from moebed.model.flops import count_parameters, flops_per_token
from moebed.model.generate import generate
from moebed.model.losses import load_balancing_loss, router_stats
from moebed.model.routers import ROUTERS, SoftmaxTopK, TokenContext, register
from tests.model.routers.router_cases import ALL, BY_DOMAIN, COMPILED, config_of, domains_of, router_of

CARELESS = ("balanced", "hash", "oracle_hash", "random")  # learn nothing in the router
WITHOUT_PARAMETERS = ("expert_norm", "grap", "locmoe_plus", "kmeans")


def _decoder(name: str, **changes) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config_of(name, **changes)).train()
    for router in decoder.routers:
        router.begin_step(0)
    return decoder


def _loss(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    out = decoder(ids, domain=domains_of(ids))
    asked = [value.mean() for routing in out.routings for value in (routing.losses or {}).values()]
    return out.logits.square().mean() + sum(asked)


IDS = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ALL)
def test_backends_agree_in_value_and_gradient(name):
    """Every parameter that learns has a gradient, the same with the plain loop and with the grouped product."""
    found = []
    for backend in ("loop", "grouped_mm"):
        decoder = _decoder(name, experts_backend=backend)
        loss = _loss(decoder, IDS)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in decoder.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for key, grad in found[1][1].items():
        assert grad is not None, key
        assert grad.abs().sum() > 0, key
        torch.testing.assert_close(grad, found[0][1][key], rtol=1e-3, atol=1e-5)
    in_router = [key for key in found[0][1] if ".router." in key]
    assert bool(in_router) == (name not in (*CARELESS, *WITHOUT_PARAMETERS))


@pytest.mark.parametrize("name", ALL)
def test_recomputation_changes_nothing(name):
    grads = []
    for recompute in (False, True):
        decoder = _decoder(name)
        decoder.activation_checkpointing = recompute
        _loss(decoder, IDS).backward()
        grads.append([parameter.grad for parameter in decoder.parameters() if parameter.grad is not None])
        assert all(not router.adaptive or router.numbers() for router in decoder.routers)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in ALL if name not in (*BY_DOMAIN, "balanced")])
def test_cached_decoding_equals_one_pass(name):
    decoder = _decoder(name).eval()
    whole = decoder(IDS).logits
    caches = [KVCache(21) for _ in decoder.layers]
    parts = [decoder(IDS[:, :7], caches).logits]
    parts += [decoder(IDS[:, position : position + 1], caches).logits for position in range(7, 21)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert generate(decoder, IDS[:, :5], 3, temperature=0).shape == (2, 8)


@pytest.mark.parametrize("name", COMPILED)
def test_a_layer_is_one_graph(name):
    moe, x = _decoder(name).layers[0].mlp, torch.randn(42, 32)
    context = TokenContext.of_batch(IDS, domains_of(IDS)).changed(torch.flatten)
    expected, _ = moe(x, context)
    torch._dynamo.reset()
    out, routing = torch.compile(moe, fullgraph=True, backend="eager", dynamic=False)(x, context)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert routing.losses is None or set(routing.losses) == {"relu_l1"}


@pytest.mark.parametrize("name", [name for name in ALL if name not in CARELESS])
def test_balancing_reaches_what_decides(name):
    """The gradient of the load-balancing loss: the router's parameters, or the experts' where they decide."""
    decoder = _decoder(name)
    stats = router_stats(decoder(IDS, domain=domains_of(IDS)).routings[0], torch.ones(IDS.numel(), dtype=torch.bool))
    idle = (
        (decoder(IDS, domain=domains_of(IDS)).routings[0].router_probs.sum(-1) == 0).float().mean()
    )  # relu: tokens without any expert
    assert (stats.mean_probs.sum() + idle).item() == pytest.approx(1.0, abs=1e-4)
    assert idle == 0 or name == "relu"
    load_balancing_loss(stats.mean_probs, stats.counts).backward()
    by_experts = name in ("expert_norm", "competesmoe", "competesmoe_v2")
    decides = ".experts." if by_experts else ".pre_ffn_norm." if name in WITHOUT_PARAMETERS else ".router."
    reached = [key for key, p in decoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any(key.startswith("layers.0") and decides in key for key in reached)


@pytest.mark.parametrize(
    "name",
    [
        "relu",
        "quantile",
        "threshold",  # each of the two has statistics of its own
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("expert_choice", "kmeans")),
    ],
)
def test_a_training_step_with_router_losses_and_statistics_is_one_graph(name):
    from moebed.training.module import MoEModule

    module = MoEModule(config_of(name, router_aux_loss_scope="sequence")).train()
    module.router_steps.begin(0)
    expected = module.losses.terms(IDS, IDS)
    torch._dynamo.reset()
    found = torch.compile(module.losses.terms, fullgraph=True, backend="eager", dynamic=False)(IDS, IDS)
    torch.testing.assert_close(found.nats, expected.nats)
    torch.testing.assert_close(found.router_losses, expected.router_losses)
    for one, other in zip(found.statistics, expected.statistics, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(found.sequence_losses), list(expected.sequence_losses))
    assert name != "relu" or expected.router_losses[0]["relu_l1"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_in_training(name):
    """With the gradients of the pass that is not compiled."""
    decoder = _decoder(name)
    expected = _loss(decoder, IDS)
    expected.backward()
    wanted = {key: p.grad for key, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager", dynamic=False)(decoder, IDS)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    compiled.backward()
    found = {key: p.grad for key, p in decoder.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.norm()), msg=key)


@pytest.mark.parametrize("backend", ["grouped_mm", pytest.param("loop", marks=pytest.mark.slow)])
def test_a_compiled_step_has_the_gradients_of_one_that_is_not(backend):
    """Of every part: a compiler that loses one says nothing, and the loss is right."""
    decoder = _decoder("softmax_topk", experts_backend=backend)
    _loss(decoder, IDS).backward()
    wanted = {key: p.grad for key, p in decoder.named_parameters()}
    decoder.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    torch.compile(_loss, fullgraph=backend != "loop", backend="aot_eager", dynamic=False)(decoder, IDS).backward()
    for key, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-3, atol=1e-5 * float(wanted[key].norm()))


@pytest.mark.parametrize("name", ALL)
def test_decisions_are_float32_and_in_descending_weight_under_autocast(name):
    decoder = _decoder(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = decoder(IDS, domain=domains_of(IDS))
    out.logits.float().square().mean().backward()
    for routing in out.routings:
        for value in (
            routing.router_logits,
            routing.router_probs,
            routing.topk_weight,
            *(routing.losses or {}).values(),
        ):
            assert value.dtype == torch.float32
            assert bool(value.isfinite().all())
        assert bool((routing.topk_weight.diff(dim=1) <= 0).all())
        assert bool((routing.router_probs.sum(-1) < 1 + 1e-5).all())


@pytest.mark.parametrize("name", ALL)
def test_a_masked_expert_is_not_chosen(name):
    """What an ablation asks of every router: the decision that follows from logits with one of them at -inf."""
    decoder = _decoder(name).eval()
    routing = decoder(IDS, domain=domains_of(IDS)).routings[0]
    masked = decoder.routers[0].choose(routing.router_logits.index_fill(1, torch.tensor(2), -torch.inf))
    assert not bool(((masked.topk_index == 2) & masked.assigned).any())
    assert bool(masked.topk_weight.isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_flops_are_those_of_the_model(name):
    """Against a build on the meta device, and a count of every matrix product of a forward pass, within 1 %."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 64
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "router_options": {"d_low": 16, "competition_rate": 0.25}}
    config = config_of(name, **sizes, experts_backend="loop", attention_backend="math", num_experts=8)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config).parameters()) == count_parameters(config)[0]
    decoder = Decoder(config).eval()
    for router in decoder.routers:  # make those without a fixed K choose 2 of the 8, as they would come to
        if name == "relu":
            router.choose = lambda logits, choose=router.choose: choose(logits - logits.topk(3).values[:, 2:])
        elif name in ("threshold", "expert_choice"):
            router.served = lambda scores: scores > scores.topk(3).values[:, 2:]

    ids = torch.randint(0, 96, (1, tokens))

    def counted() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(ids, domain=domains_of(ids))
        return counter.get_total_flops()

    # Attention computes all S keys of a token where causality needs half of them.
    unmasked = tokens * 4 * (tokens / 2) * config.hidden_size * config.num_hidden_layers
    assert counted() - unmasked == pytest.approx(tokens * flops_per_token(config, tokens), rel=0.01)
    if name.startswith("competesmoe"):
        decoder.train()
        mean = 0.0
        for competes, share in ((True, 0.25), (False, 0.75)):
            for router in decoder.routers:
                router.competes = competes
            mean += share * counted()
        assert mean - unmasked == pytest.approx(tokens * flops_per_token(config, tokens, training=True), rel=0.01)


def test_relu_computes_the_active_experts_alone():
    from moebed.model.experts import BACKENDS
    from moebed.model.grouped import sort_by_expert
    from moebed.model.routers import Routing

    decoder = _decoder("relu", num_experts=8)
    experts, x = decoder.layers[0].mlp.experts, torch.randn(90, 32)
    weight, index = (torch.rand(90, 8) - 0.6).relu().sort(-1, descending=True)
    weight.requires_grad_()
    dispatch = sort_by_expert(index, weight, 8, align=1, ragged=True)
    assert dispatch.offsets[-1] == (weight > 0).sum()
    dense = torch.zeros(90, 8).scatter(1, index, weight)
    outputs = torch.stack([experts.finish(e, x, experts.activate(e, x)) for e in range(8)], dim=1)
    expected = (outputs * dense.unsqueeze(-1)).sum(1)
    for backend in ("loop", "grouped_mm"):
        out = BACKENDS[backend](experts, x, Routing(weight, weight, index, weight, ragged=True))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(out.square().sum(), weight, retain_graph=True)
        (right,) = torch.autograd.grad(expected.square().sum(), weight, retain_graph=True)
        active = weight > 0  # where a weight is 0, ReLU passes no gradient on
        torch.testing.assert_close(grad[active], right[active], rtol=1e-3, atol=1e-3)


def test_each_is_what_every_expert_makes_of_a_token():
    decoder = _decoder("softmax_topk")
    experts, x = decoder.layers[0].mlp.experts, torch.randn(30, 32)
    outputs = experts.each(x, torch.arange(4).expand(30, 4))
    for e in range(4):
        torch.testing.assert_close(outputs[:, e], experts.finish(e, x, experts.activate(e, x)), rtol=1e-4, atol=1e-5)


def test_experts_run_once_where_the_router_ran_them():
    decoder = _decoder("expert_norm")
    experts, calls = decoder.layers[0].mlp.experts, []
    backend = experts.backend
    experts.backend = lambda *arguments: calls.append(len(arguments[1])) or backend(*arguments)
    decoder(IDS, domain=domains_of(IDS))
    assert calls == [4 * IDS.numel()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "softmax_topkk"}, "router is 'softmax_topkk'; choose one of softmax_topk,"),
        ({"router": "softmax_topkk"}, "(did you mean 'softmax_topk'?)"),
        ({"router": "autonomy"}, "router autonomy needs router_options.d_low"),
        ({"router": "factorised_gate"}, "about hidden_size / 3 was best, 8 here, to a multiple of 8"),
        ({"router": "autonomy", "hidden_size": 256}, "about hidden_size / 3 was best, 88 here"),
        ({"router_options": {"d_lo": 3}}, "unknown key 'd_lo' in router_options; did you mean 'd_low'?"),
        (
            {"router": "competesmoe", "router_options": {"competition_rate": 1.5}},
            "router_options.competition_rate is 1.5; it must be at most 1",
        ),
        ({"router": "autonomy", "router_options": {"d_low": 0}}, "router_options.d_low is 0; it must be at least 1"),
        ({"router": "hash", "router_options": {"seed": "high"}}, "router_options.seed is high; it must be at least 0"),
        ({"router": "relu", "num_experts_per_tok": 5}, "num_experts_per_tok is 5 but layer 0 has 4 experts"),
        (
            {"router": "autonomy", "router_options": {"d_low": 4}, "experts_backend": "triton"},
            "experts_backend triton has no kernel for these experts (those of router autonomy",
        ),
    ],
)
def test_refuses_in_one_line(changes, words):
    from tests.conftest import tiny_config

    with pytest.raises(ConfigError, match=r"^model config: ") as caught:
        tiny_config(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_the_config_survives_plain_data(name):
    config = config_of(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()["router_options"]) == {
        field.name for field in dataclasses.fields(ROUTERS[name].Options)
    }
    assert config.norm_topk_prob == (name not in ("autonomy", "grap", "locmoe_plus", "sparsemixer"))


class Biased(Experts):
    """Experts with a bias before the activation."""

    @classmethod
    def shapes(cls, config, layer):
        width = 2 * layer.moe_intermediate_size
        return {**super().shapes(config, layer), "bias": (layer.num_experts, width, 1)}

    def gate_and_up(self, rows, product):
        ones = rows.new_ones(len(rows), 1)
        return super().gate_and_up(rows, product) + product(ones, self.local(self.bias))


def test_a_router_may_build_its_layers_experts():
    """They are built, trained by every backend that they go with, and counted."""

    @register("biased")
    class WithBiasedExperts(SoftmaxTopK):
        experts_class = Biased

    try:
        found = []
        for backend in ("loop", "grouped_mm"):
            decoder = _decoder("biased", experts_backend=backend)
            assert count_parameters(decoder.config)[0] == sum(p.numel() for p in decoder.parameters())
            loss = _loss(decoder, IDS)
            loss.backward()
            found.append([loss.detach(), *(block.mlp.experts.bias.grad for block in decoder.blocks)])
            assert all(grad.abs().sum() > 0 for grad in found[-1][1:])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
        experts = decoder.blocks[0].mlp.experts
        assert _native_unfit(experts, torch.randn(64, 32)) == "those of router biased have a gate of their own"
        with pytest.raises(ConfigError, match=r"triton has no kernel for these experts \(those of router biased"):
            config_of("biased", experts_backend="triton")
    finally:
        del ROUTERS["biased"]


def test_compilation_is_refused_where_steps_differ():
    from moebed.training.module import MoEModule

    with pytest.raises(ConfigError, match="router competesmoe decides anew in each step"):
        MoEModule(config_of("competesmoe"), compile=True)


@pytest.mark.parametrize("name", ALL)
def test_a_router_says_whether_it_sees_what_all_logits_share(name):
    router = router_of(name).eval()
    logits = torch.randn(64, router.num_experts, generator=torch.Generator().manual_seed(1))

    def weights(shift: float) -> torch.Tensor:
        routing = router.choose(logits + shift)
        return torch.zeros_like(logits).scatter_add(1, routing.topk_index, routing.topk_weight)

    same = torch.allclose(weights(0.0), weights(1.0), atol=1e-5)
    assert same == router.shift_invariant
