"""HyperMoE (2402.12656) against its formulas, token by token, and the controls that are adapters."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moebed.errors import ConfigError
from moebed.model import hyper_experts
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder, MoE
from moebed.model.hyper_config import HyperExperts
from moebed.model.hyper_experts import HyperAdapters, distinct_rows
from moebed.model.losses import token_losses
from moebed.model.routing import Routing
from moebed.training.module import MoEModule
from tests.conftest import tiny_config
from tests.plan.test_plan_formulas import Live

SMALL = {"adapter_size": 8, "expert_embedding_size": 6, "layer_embedding_size": 3, "generator_size": 10}
IDS = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(3))


def config_of(adapters: str = "unchosen", **changes) -> ModelConfig:
    return tiny_config(hyper_experts={**SMALL, "adapters": adapters}, **changes)


def layer_of(**changes) -> HyperAdapters:
    """A layer's adapters, in float64 and with parameters of a size at which everything matters."""
    decoder = Decoder(config_of(**changes)).double()
    layer = decoder.layers[1].mlp.hyper_experts
    with torch.no_grad():
        for parameter in (*layer.parameters(), *layer.generator.parameters()):
            parameter.normal_(0.0, 0.5)
    return layer


def routed(tokens: int, num_experts: int, top_k: int, ragged: bool = False) -> Routing:
    """Random choices of random weights; where ragged, some of weight 0."""
    weight, index = torch.rand(tokens, num_experts).topk(top_k, dim=1)
    weight = weight * (torch.rand(tokens, top_k) < 0.5) if ragged else weight
    return Routing(torch.zeros(tokens, num_experts), torch.zeros(tokens, num_experts), index, weight, ragged=ragged)


def parameters_of(layer: HyperAdapters) -> dict[str, torch.Tensor]:
    return dict(layer.named_parameters()) | {f"shared.{name}": p for name, p in layer.generator.named_parameters()}


def by_token(layer: HyperAdapters, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The formulas, with the weights of every token made for it alone."""
    parts = parameters_of(layer)

    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows @ parts[f"{name}.weight"].T + parts[f"{name}.bias"]

    outputs = []
    for row, index, stands in zip(x, routing.topk_index, routing.assigned, strict=True):
        left = [e for e in range(layer.num_experts) if e not in index[stands].tolist()]
        s = parts["expert_embedding"][left].sum(dim=0)
        p = linear("outer", F.relu(linear("inner", s)))
        z = F.relu(linear("shared.trunk", torch.cat([p, parts["layer_embedding"]])))
        hidden = x.shape[1]
        down, up = linear("shared.down", z).view(-1, hidden), linear("shared.up", z).view(hidden, -1)
        inner = F.relu(torch.einsum("ah,h->a", down, row) + linear("shared.down_bias", z))
        outputs.append(torch.einsum("ha,a->h", up, inner) + linear("shared.up_bias", z))
    return torch.stack(outputs)


def gradients(out: torch.Tensor, layer: HyperAdapters, x: torch.Tensor) -> list[torch.Tensor]:
    wanted = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((out * wanted).sum(), [x, *parameters_of(layer).values()]))


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "set_bytes"),
    [
        (40, 4, 2, None),
        (40, 4, 1, None),
        (3, 8, 3, None),
        (40, 4, 4, None),
        (60, 70, 2, None),
        (60, 8, 3, 3),
        (60, 8, 3, 1),
    ],
)
def test_4_1_grouped_by_set_is_the_formula_for_each_token(tokens, num_experts, top_k, set_bytes, monkeypatch):
    """Outputs and gradients in float64; with few sets, as many as tokens, all experts chosen, some sets at a time."""
    layer = layer_of(num_experts=num_experts, num_experts_per_tok=top_k)
    if set_bytes is not None:
        monkeypatch.setattr(hyper_experts, "SET_BYTES", set_bytes * 8 * layer.adapter_parameters)
    x = torch.randn(tokens, 32, dtype=torch.float64, requires_grad=True)
    routing = routed(tokens, num_experts, top_k)
    found, wanted = layer(x, routing), by_token(layer, x, routing)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients(found, layer, x), gradients(wanted, layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_4_1_where_tokens_have_different_numbers_of_experts():
    layer = layer_of(router="relu")
    x = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
    routing = routed(50, 4, 3, ragged=True)
    assert {int(n) for n in routing.assigned.sum(dim=1)} > {0, 1, 2}
    torch.testing.assert_close(layer(x, routing), by_token(layer, x, routing), rtol=1e-10, atol=1e-10)


def test_4_1_padded_segments_change_nothing(monkeypatch):
    """In bfloat16 on a CPU segments are padded; here in float64, so that it shows."""
    layer = layer_of()
    x, routing = torch.randn(70, 32, dtype=torch.float64, requires_grad=True), routed(70, 4, 2)
    wanted = layer(x, routing)
    monkeypatch.setattr(hyper_experts, "alignment", lambda *_: 8)
    found = layer(x, routing)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(gradients(found, layer, x), gradients(wanted, layer, x), strict=True):
        torch.testing.assert_close(one, other)


def test_4_2_the_order_of_the_choices_does_not_matter():
    layer, x, routing = layer_of(), torch.randn(40, 32, dtype=torch.float64), routed(40, 4, 3)
    turned = routing._replace(topk_index=routing.topk_index.flip(1), topk_weight=routing.topk_weight.flip(1))
    assert torch.equal(layer(x, turned), layer(x, routing))


@pytest.mark.parametrize(("adapters", "top_k"), [("unchosen", 2), ("constant", 2), ("free", 1)])
def test_4_3_at_the_start_the_loss_is_that_of_the_model_without(adapters, top_k):
    """One seed gives both the same weights wherever they have the same; adapters add nearly nothing."""
    changes = {"num_experts_per_tok": top_k, "hidden_size": 64, "initializer_range": 0.02}
    losses = []
    for hyper in (None, {"adapters": adapters}):
        torch.manual_seed(4)
        decoder = Decoder(tiny_config(hyper_experts=hyper, **changes))
        losses.append(token_losses(decoder(IDS).logits, IDS.roll(-1, 1)).mean().item())
    assert abs(losses[1] - losses[0]) < 1e-3
    assert (losses[0] == losses[1]) == (adapters == "free")  # whose second matrix begins as 0
    generated = decoder.adapter_generator
    if generated is not None:
        size, width = 128, 64
        for name, fan in (("down", 64), ("up", width), ("down_bias", 1), ("up_bias", 1)):
            head, bound = generated.get_submodule(name), 1e-3 * math.sqrt(3 / (size * fan))
            assert head.bias.abs().max() == 0
            assert 0.9 * bound < head.weight.abs().max() <= bound
        tables = torch.cat([block.mlp.hyper_experts.expert_embedding for block in decoder.blocks])
        assert tables.std().item() == pytest.approx(1.0, abs=0.1)


def test_4_4_conditioning_on_the_chosen_is_the_same_model():
    """s = Σ_all e − Σ_chosen e and A₁ is affine: −A₁, with a bias of b + A₁ Σ_all e, makes the same of the chosen."""
    layer, x, routing = layer_of(), torch.randn(40, 32, dtype=torch.float64), routed(40, 4, 2)
    wanted = layer(x, routing)
    with torch.no_grad():
        layer.inner.bias += layer.inner.weight @ layer.expert_embedding.sum(dim=0)
        layer.inner.weight.neg_()
    sets, which = layer._sets(routing)
    z = layer.condition(~sets)  # takes the chosen for those that were not
    by_set = torch.stack([F.one_hot(i, 4).sum(dim=0).bool() for i in routing.topk_index])
    assert torch.equal(sets[which], by_set)
    swapped = layer._in_parts(x, z[which], torch.arange(41, dtype=torch.int32))  # a segment for each token
    torch.testing.assert_close(swapped, wanted, rtol=1e-10, atol=1e-10)


def test_4_5_the_constant_control_is_the_same_for_all_sets():
    layer, x = layer_of(adapters="constant"), torch.randn(1, 32, dtype=torch.float64).expand(40, -1)
    out = layer(x, routed(40, 4, 2))
    torch.testing.assert_close(out, out[:1].expand_as(out))
    nothing_chosen = routed(40, 4, 2)._replace(topk_weight=torch.zeros(40, 2), ragged=True)
    torch.testing.assert_close(out, by_token(layer, x, nothing_chosen))  # s is the sum of all
    other = layer_of()
    found = other(x, routed(40, 4, 2)).round(decimals=6)  # rows of a product are rounded each in its own way
    assert len(found.unique(dim=0)) == math.comb(4, 2)


@pytest.mark.parametrize(("adapters", "top_k"), [("unchosen", 2), ("constant", 2), ("free", 1)])
def test_4_6_no_gradient_reaches_the_router(adapters, top_k):
    decoder = Decoder(config_of(adapters, num_experts_per_tok=top_k))
    moe, x = decoder.layers[0].mlp, torch.randn(30, 32)
    with torch.no_grad():
        for parameter in moe.hyper_experts.parameters():
            parameter.normal_()
    routing = moe.router(x, moe.experts)
    assert routing.topk_weight.requires_grad
    moe.hyper_experts(x, routing).square().sum().backward()
    assert all(parameter.grad is None for parameter in moe.router.parameters())
    assert all(parameter.grad is not None for parameter in moe.hyper_experts.parameters())


def test_4_8_layers_differ_only_by_table_map_and_embedding():
    decoder = Decoder(config_of())
    first, second = (block.mlp.hyper_experts for block in decoder.blocks)
    assert {name.split(".")[0] for name, _ in first.named_parameters()} == {
        "expert_embedding", "layer_embedding", "inner", "outer"}  # fmt: skip
    assert first.generator is second.generator is decoder.adapter_generator
    x, routing = torch.randn(20, 32), routed(20, 4, 2)
    with torch.no_grad():
        for parameter in decoder.adapter_generator.parameters():
            parameter.normal_()
    assert not torch.allclose(first(x, routing), second(x, routing))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, routing), second(x, routing))
    names = [name for name in decoder.stored() if "generator" in name]
    assert names == [f"adapter_generator.{name}" for name, _ in decoder.adapter_generator.named_parameters()]


def test_4_9_with_one_expert_a_token_there_are_as_many_adapters_as_experts():
    layer = layer_of(num_experts_per_tok=1)
    made = []
    layer.generator.register_forward_hook(lambda module, inputs, adapters: made.append(adapters.down))
    routing = routed(200, 4, 1)
    out = layer(torch.ones(200, 32, dtype=torch.float64), routing)
    assert len(made) == 1
    assert len(made[0].unique(dim=0)) == 4
    for expert in range(4):
        rows = out[routing.topk_index[:, 0] == expert]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    assert len(layer._sets(routed(200, 4, 1))[0]) == 4


# The controls ---------------------------------------------------------------------------------------------------------


def test_free_adapters_are_one_for_each_expert():
    """The control for what sharing a generator brings: at K = 1, the same function, with E adapters of its own."""
    generated = layer_of(num_experts_per_tok=1)
    free = Decoder(config_of("free", num_experts_per_tok=1)).double().layers[0].mlp.hyper_experts
    alone = ~torch.eye(4, dtype=torch.bool)
    with torch.no_grad():
        for name, part in generated.generator(generated.condition(~alone))._asdict().items():
            getattr(free, name).copy_(part.flatten(0, 1))
    x, routing = torch.randn(50, 32, dtype=torch.float64), routed(50, 4, 1)
    torch.testing.assert_close(free(x, routing), generated(x, routing))
    assert sum(p.numel() for p in free.parameters()) == 4 * (2 * 8 * 32 + 8 + 32)


def test_how_far_one_step_reaches_at_the_published_sizes():
    """An adapter's weight is a sum over z of a head's weights, each of which Adam moves by the learning rate."""
    torch.manual_seed(1)
    decoder = Decoder(tiny_config(num_experts=8, num_experts_per_tok=1, num_hidden_layers=4, hyper_experts={}))
    for layer in (block.mlp.hyper_experts for block in decoder.blocks):
        z = layer.condition(torch.eye(8, dtype=torch.bool))
        alike = torch.cosine_similarity(z.unsqueeze(0), z.unsqueeze(1), dim=-1)[~torch.eye(8, dtype=torch.bool)]
        print(f"sum of z {z.sum(dim=1).mean():.1f}, cosine of two sets' z {alike.mean():.2f}")
        assert 10 < z.sum(dim=1).mean() < 30
        assert 0.7 < alike.mean() < 0.95


# Memory, graphs, types ------------------------------------------------------------------------------------------------


def _peak(layer: HyperAdapters, x: torch.Tensor, routing: Routing) -> int:
    with Live() as live:
        layer(x, routing).square().sum().backward()
    return live.most


def test_memory_does_not_grow_with_the_number_of_sets(monkeypatch):
    """Bytes alive at most, counted: E 64, K 2 have 2016 sets, here 1500 in 3000 tokens and more."""
    layer = Decoder(config_of(num_experts=64, num_experts_per_tok=2)).layers[0].mlp.hyper_experts
    pairs = torch.tensor(list(itertools.combinations(range(64), 2)))[:1500].repeat(2, 1)
    weight = torch.ones(len(pairs), 2)
    routing = Routing(torch.zeros(3000, 64), torch.zeros(3000, 64), pairs, weight)
    x = torch.randn(3000, 32, requires_grad=True)
    one_set = 4 * layer.adapter_parameters
    everything = 1500 * one_set
    whole = _peak(layer, x, routing)
    assert whole > 2 * everything  # the weights and their gradients
    budget = 100 * one_set
    monkeypatch.setattr(hyper_experts, "SET_BYTES", budget)
    made = []
    layer.generator.register_forward_hook(lambda module, inputs, adapters: made.append(len(adapters.down)))
    bounded = _peak(layer, x, routing)
    assert made == 30 * [100]  # in both passes
    of_tokens = 4 * 3000 * (64 + 8 * 32)
    assert bounded < 4 * budget + of_tokens
    assert bounded < whole / 2


@pytest.mark.parametrize("first", [0, 58, 123])
def test_equal_rows_come_together(first):
    """Wherever they differ: 130 experts take three words of 62 bits."""
    rows = (torch.rand(130) < 0.5).repeat(300, 1)
    rows[:, first : first + 7] = torch.rand(300, 7) < 0.5
    found, which = distinct_rows(rows, 200)
    assert torch.equal(found[which], rows)
    distinct = len(rows.unique(dim=0))
    assert len(which.unique()) == distinct == int(which.max()) + 1
    assert not found[distinct:].any()


@pytest.mark.parametrize(("adapters", "top_k"), [("unchosen", 2), ("constant", 2), ("free", 1)])
def test_a_training_step_is_one_graph(adapters, top_k):
    module = MoEModule(config_of(adapters, num_experts_per_tok=top_k)).train()
    expected = module.losses.terms(IDS, IDS)
    torch._dynamo.reset()
    found = torch.compile(module.losses.terms, fullgraph=True, backend="eager", dynamic=False)(IDS, IDS)
    torch.testing.assert_close(found.nats, expected.nats)


def test_what_is_not_one_graph_is_refused(monkeypatch):
    monkeypatch.setattr(hyper_experts, "SET_BYTES", 8)
    with pytest.raises(ConfigError, match="turn compile off"):
        MoEModule(config_of(), compile=True)
    MoEModule(config_of("constant"), compile=True)
    with pytest.raises(ConfigError, match="turn compile off"):
        MoEModule(config_of(num_experts=30, router="relu"), compile=True)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize(("adapters", "top_k"), [("unchosen", 2), ("constant", 2), ("free", 1)])
def test_in_bfloat16_it_is_what_it_is_in_float32(precision, adapters, top_k):
    decoder = Decoder(config_of(adapters, num_experts_per_tok=top_k))
    moe = decoder.layers[0].mlp
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "adapter_generator" in name or "hyper_experts" in name:
                parameter.normal_(0, 0.2)
    x, routing = torch.randn(300, 32), routed(300, 4, top_k)
    wanted = moe.hyper_experts(x, routing)
    if precision == "bfloat16":
        decoder.bfloat16()
        found = moe.hyper_experts(x.bfloat16(), routing)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = moe.hyper_experts(x, routing)
            assert isinstance(moe.hyper_experts, hyper_experts.FreeAdapters) or (
                moe.hyper_experts.condition(torch.zeros(1, 4, dtype=torch.bool)).dtype == torch.float32
            )
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()
    found.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.hyper_experts.parameters())


def test_recomputation_gives_the_same_gradients():
    found = []
    for recompute in (False, True):
        torch.manual_seed(2)
        decoder = Decoder(config_of(), recompute)
        decoder(IDS).logits.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in decoder.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


def test_the_layer_adds_it_beside_its_experts():
    config = config_of(num_shared_experts=1)
    decoder = Decoder(config)
    moe, x = decoder.layers[0].mlp, torch.randn(30, 32)
    assert isinstance(moe, MoE)
    out, routing = moe(x)
    wanted = moe.experts(x, routing) + moe.shared_output(x) + moe.hyper_experts(x, routing)
    torch.testing.assert_close(out, wanted)
    assert HyperExperts.of({"adapters": "constant"}) == HyperExperts("constant")
