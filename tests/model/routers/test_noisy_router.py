"""Noisy top-K gating: its noise, its load, and losses of a batch (Shazeer 2017; LLaMA-MoE 2406.16554)."""

import pytest
import torch

from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters
from moebed.model.losses import IGNORE_INDEX, router_stats, squared_variation
from moebed.model.routers import RouterSteps, Routing
from moebed.training.batch_sums import BatchSums
from moebed.training.module import MoEModule
from tests.model.routers.router_cases import config_of, router_of

IDS = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(3))


def _router(**changes):
    return router_of("noisy_topk", **changes)


def test_1_8_5_squared_variation_is_0_at_uniform_and_e_at_one_hot():
    for experts in (2, 4, 7):
        assert squared_variation(torch.full((experts,), 3.0)) == 0
        one_hot = torch.zeros(experts).index_fill(0, torch.tensor(1), 5.0)
        assert squared_variation(one_hot).item() == pytest.approx(experts, rel=1e-6)
    values = torch.tensor([1.0, 2, 6])
    assert squared_variation(values).item() == pytest.approx(7 / 9)  # unbiased variance 7, mean 3
    assert squared_variation(torch.zeros(3)) == 0
    assert squared_variation(torch.tensor([4.0])) == 0
    assert squared_variation(values.bfloat16()).dtype == torch.float32


def test_logits_are_those_of_two_layers_without_biases_or_of_one():
    router, x = _router().eval(), torch.randn(9, 32)
    wanted = (x @ router.input_proj.T).tanh() @ router.output_proj.T
    torch.testing.assert_close(router(x, None).router_logits, wanted)
    assert router.gate() is None
    linear = _router(router_options={"gate_layers": 1}).eval()
    torch.testing.assert_close(linear(x, None).router_logits, x @ linear.weight.T)
    assert linear.gate() is linear.weight


def test_it_begins_with_noise_far_above_its_logits():
    for layers, names in ((2, {"input_proj", "output_proj", "noise_proj"}), (1, {"weight", "noise_proj"})):
        decoder = Decoder(config_of("noisy_topk", initializer_range=0.02, router_options={"gate_layers": layers}))
        router = decoder.routers[0].train()
        assert set(dict(router.named_parameters())) == names
        assert router.noise_proj.abs().sum() == 0
        if layers == 1:
            assert router.weight.abs().sum() == 0
        else:
            assert 0.01 < router.input_proj.std() < 0.03
        x = torch.randn(4000, 32)
        noisy, clean = router(x, None).router_logits, router.eval()(x, None).router_logits
        assert (noisy - clean).std().item() == pytest.approx(0.7031, rel=0.03)  # softplus(0) + .01
        assert clean.abs().max() < 0.1
        torch.testing.assert_close(router.initial("noise_proj", router.noise_proj), torch.zeros(4, 32))


def test_noise_has_the_deviation_that_is_learned_and_its_least():
    router, x = _router(router_options={"noise_epsilon": 0.25}).train(), torch.randn(50, 32)
    for learned in (0.0, -100.0):  # softplus of which is ln 2, and 0
        torch.nn.init.constant_(router.noise_proj, learned)
        inputs = x.abs()
        deviation = torch.nn.functional.softplus(inputs @ router.noise_proj.T) + 0.25
        expected = router.logits(inputs) + router.noise(50) * deviation
        torch.testing.assert_close(router(inputs, None).router_logits, expected)


def test_noise_is_normal_and_another_one_for_every_token_expert_layer_step_and_micro_batch():
    router = _router(num_experts=8)
    router.begin_step(3)
    first = router.noise(20000)
    assert first.mean().abs() < 0.01
    assert first.std().item() == pytest.approx(1, abs=0.01)
    assert (first.abs() < 1.96).float().mean().item() == pytest.approx(0.95, abs=0.003)
    others = [first.roll(1, 0), first.roll(1, 1)]
    router.begin_step(4)
    others.append(router.noise(20000))
    router.micro_batch = 1
    router.begin_step(3)
    others.append(router.noise(20000))
    router.micro_batch, router.layer = 0, 1
    router.begin_step(3)
    others.append(router.noise(20000))
    for other in others:
        assert (first * other).mean().abs() < 0.01  # no correlation
    router.layer = 0
    router.begin_step(3)
    assert torch.equal(router.noise(20000), first)


def test_ranks_draw_what_one_process_draws_for_their_tokens():
    router = _router()
    steps = RouterSteps([router])
    steps.begin(5)
    whole = router.noise(60)
    for rank in range(3):
        steps = RouterSteps([router])
        steps.begin(5, rank)
        assert torch.equal(router.noise(20), whole[20 * rank : 20 * rank + 20])
    steps.begin(5, 0)
    assert router.micro_batch == 1
    assert not torch.equal(router.noise(60), whole)
    steps.begin(6, 0)
    assert router.micro_batch == 0


def test_1_8_5_evaluation_draws_no_noise_and_asks_for_nothing():
    router, x = _router().eval(), torch.randn(50, 32)
    found = [router(x, None)]
    router.begin_step(9)
    found.append(router(x, None))
    assert torch.equal(found[0].router_logits, found[1].router_logits)
    torch.testing.assert_close(found[0].router_logits, router.logits(x))
    assert found[0].sums is None
    assert router.train()(x, None).sums.keys() == {"importance", "load"}


def test_importance_is_the_sum_of_the_weights():
    router, x = _router(), torch.randn(50, 32)
    routing = router(x, None)
    stats = router_stats(routing, torch.ones(50, dtype=torch.bool))
    wanted = torch.zeros(4)
    for weights, chosen in zip(routing.topk_weight, routing.topk_index, strict=True):
        wanted[chosen] += weights
    torch.testing.assert_close(stats.sums["importance"], wanted)
    assert stats.sums["importance"].sum().item() == pytest.approx(50, rel=1e-5)


def test_1_8_5_load_is_the_chance_of_being_chosen_if_the_own_noise_were_drawn_anew():
    """Against 20,000 draws for each expert, the others' noise left as it is; not of the noise alone, as v1 has it."""
    router, x = _router(num_experts=5), torch.randn(6, 32)
    routing = router(x, None)
    clean = router.logits(x)
    std = torch.nn.functional.softplus(x @ router.noise_proj.T) + 0.01
    draws = torch.randn(20000, 6, generator=torch.Generator().manual_seed(1))
    for expert in range(5):
        noisy = routing.router_logits.expand(20000, 6, 5).clone()
        noisy[:, :, expert] = clean[:, expert] + draws * std[:, expert]
        chosen = (noisy.topk(2, dim=-1).indices == expert).any(dim=-1).float().mean(dim=0)
        torch.testing.assert_close(routing.sums["load"][:, expert], chosen, rtol=0, atol=0.015)


def test_1_8_5_the_gradient_of_the_load_reaches_the_noise_and_the_gate():
    for layers in (1, 2):
        router = _router(router_options={"gate_layers": layers})
        stats = router_stats(router(torch.randn(50, 32), None), torch.ones(50, dtype=torch.bool))
        router.batch_losses(stats.sums)["load"].backward()
        for name, parameter in router.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


def test_where_every_expert_is_chosen_the_load_is_constant():
    router = _router(num_experts_per_tok=4)
    stats = router_stats(router(torch.randn(50, 32), None), torch.ones(50, dtype=torch.bool))
    assert stats.sums["load"].tolist() == [50.0] * 4
    assert router.batch_losses(stats.sums)["load"] == 0
    assert not stats.sums["load"].requires_grad


def test_with_one_expert_a_token_the_load_alone_teaches_the_gate():
    """The weight is 1, so that neither the model's loss nor the importance has a gradient (1.4, trap a)."""
    router = _router(num_experts_per_tok=1)
    stats = router_stats(router(torch.randn(50, 32), None), torch.ones(50, dtype=torch.bool))
    losses = router.batch_losses(stats.sums)
    (none,) = torch.autograd.grad(losses["importance"], router.output_proj, retain_graph=True)
    (some,) = torch.autograd.grad(losses["load"], router.output_proj)
    assert none.abs().max() < 1e-6
    assert some.abs().max() > 1e-3


def test_padding_is_left_out_of_the_sums():
    router, x = _router(), torch.randn(40, 32)
    mask = torch.arange(40) < 30
    padded, short = router_stats(router(x, None), mask), router_stats(router(x[:30], None), mask[:30])
    for name in ("importance", "load"):
        torch.testing.assert_close(padded.sums[name], short.sums[name])


def _module(**changes):
    torch.manual_seed(0)
    return MoEModule(config_of("noisy_topk", **changes)).train()


def _noted(module):
    """What was noted since it was asked last, by name."""
    found, _ = module.step_log.read(1)
    module.step_log.clear()
    return found


def test_1_8_5_the_losses_are_added_over_the_layers_and_logged_apart():
    module = _module(router_options={"importance_loss_coef": 2.0, "load_loss_coef": 3.0})
    terms = module.losses.terms(IDS, IDS)
    layers = [{name: squared_variation(v).item() for name, v in sums.items()} for sums in terms.router_sums]
    assert len(layers) == 2
    wanted = sum(2 * layer["importance"] + 3 * layer["load"] for layer in layers)
    assert module.losses.batch_losses(terms).item() == pytest.approx(wanted, rel=1e-5)
    assert module.losses.router_losses(terms) == 0
    noted = _noted(module)
    for name in ("importance", "load"):  # means over the layers
        assert noted[f"train/{name}_loss"] == pytest.approx(sum(layer[name] for layer in layers) / 2, rel=1e-5)
    other = _module(router_options={"importance_loss_coef": 0.0, "load_loss_coef": 0.0})
    again = other.losses.terms(IDS, IDS)
    assert torch.equal(again.nats, terms.nats)
    assert other.losses.batch_losses(again) == 0


def test_routers_without_such_losses_add_none():
    torch.manual_seed(0)
    module = MoEModule(config_of("softmax_topk", router_aux_loss_scope="global")).train()
    terms = module.losses.terms(IDS, IDS)
    assert terms.router_sums == [{}, {}]
    assert module.losses.batch_losses(terms) == 0


def test_global_sums_go_over_the_accumulated_micro_batches():
    module = _module(router_aux_loss_scope="global")
    batches = IDS, IDS.flip(1)
    found = []
    for micro, ids in enumerate(batches):
        module.router_steps.begin(0)
        assert module.decoder.routers[0].micro_batch == micro
        terms = module.losses.terms(ids, ids)
        found.append(terms.router_sums)
        module.losses.batch_losses(terms)
        noted = _noted(module)
    both = [one["load"] + other["load"] for one, other in zip(*found, strict=True)]
    assert noted["train/load_loss"] == pytest.approx(sum(squared_variation(v).item() for v in both) / 2, rel=1e-5)
    module.losses.end_step()
    module.losses.batch_losses(terms)
    alone = sum(squared_variation(layer["load"]).item() for layer in found[1]) / 2
    assert _noted(module)["train/load_loss"] == pytest.approx(alone, rel=1e-5)


def test_earlier_micro_batches_have_no_gradient():
    sums = BatchSums()
    first, second = (torch.rand(4, requires_grad=True) for _ in range(2))
    sums.of_all([{"load": first}])
    (found,) = sums.of_all([{"load": second}])
    squared_variation(found["load"]).backward()
    assert first.grad is None
    assert second.grad.abs().sum() > 0


def test_sums_that_are_known_give_the_gradient_of_one_large_batch():
    parts = [torch.rand(4, requires_grad=True) for _ in range(3)]
    squared_variation(sum(parts)).backward()
    wanted, sums = parts[0].grad.clone(), BatchSums()
    sums.know([[{"load": part}] for part in parts])
    for part in parts:
        part.grad = None
        (found,) = sums.of_all([{"load": part}])
        (squared_variation(found["load"]) / len(parts)).backward()  # gradients of micro-batches are averaged
        torch.testing.assert_close(part.grad, wanted)
    sums.forget()
    assert torch.equal(sums.of_all([{"load": parts[0]}])[0]["load"], parts[0])


def test_a_compiled_pass_is_not_compiled_anew_for_each_step():
    module = _module()
    steps = RouterSteps(module.decoder.routers)
    torch._dynamo.reset()
    compiled = torch.compile(module.losses.terms, fullgraph=True, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            steps.begin(step)
            found, wanted = compiled(IDS, IDS), module.losses.terms(IDS, IDS)
            torch.testing.assert_close(found.router_sums, wanted.router_sums, rtol=1e-5, atol=1e-5)


def test_what_training_alone_uses_is_not_active_in_evaluation():
    config = config_of("noisy_topk")
    assert count_parameters(config, training=True)[1] - count_parameters(config)[1] == 2 * 4 * 32


def test_labels_that_are_no_text_are_no_tokens_of_the_batch():
    module = _module()
    labels = IDS.clone()
    labels[:, 15:] = IGNORE_INDEX
    sums = module.losses.terms(IDS, labels).router_sums[0]["importance"]
    assert sums.sum().item() == pytest.approx(30, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_layers": 3}, "gate_layers is 3; it must be at most 2"),
        ({"load_loss_coef": -1.0}, "load_loss_coef is -1.0; it must be at least 0"),
    ],
)
def test_refuses_in_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        config_of("noisy_topk", router_options=options)


def test_no_sums_is_what_a_routing_begins_with():
    nothing = torch.zeros(2, 4)
    routing = Routing(nothing, nothing, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert router_stats(routing, torch.ones(2, dtype=torch.bool)).sums == {}
