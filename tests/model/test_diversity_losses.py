"""The two diversity losses: formulas by hand, gradients, and what must not change them."""

import pytest
import torch
from torch import nn

from moebed.model.decoder import Decoder, MoE
from moebed.model.experts import Experts
from moebed.model.losses import IGNORE_INDEX, output_similarity, weight_similarity
from moebed.training.module import MoEModule
from moebed.training.step_losses import StepTerms
from tests.conftest import tiny_config

ON = {"output_diversity_loss_coef": 0.1, "weight_diversity_loss_coef": 0.1}


def _mlp(**changes) -> MoE:
    config = tiny_config(**changes)
    mlp = MoE(config, config.layer(0))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mlp


def _module(**changes) -> MoEModule:
    torch.manual_seed(0)
    changes = {"vocab_size": 60, "router_aux_loss_coef": 0.0, **changes}
    module = MoEModule(tiny_config(**changes))
    return module


def _batch(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 60, (2, tokens), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:].clone()


def _both(terms: StepTerms) -> torch.Tensor:
    """The output losses of all layers, then the weight losses."""
    names = ("output_diversity", "weight_diversity")
    return torch.stack([losses[name] for name in names for losses in terms.router_losses])


def test_output_similarity_by_hand():
    """Two parallel and one orthogonal output: of six ordered pairs two have cosine 1; then opposites; then zeros."""
    east, north, none = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), torch.zeros(2)
    outputs = torch.stack(
        [torch.stack(rows) for rows in ((east, east * 5, north), (east, -east, north), (none, east, east), (none,) * 3)]
    ).requires_grad_()
    found = output_similarity(outputs)
    torch.testing.assert_close(found.detach(), torch.tensor([2 / 6, -2 / 6, 2 / 6, 0.0]))
    found.sum().backward()
    assert outputs.grad.isfinite().all()


def test_output_similarity_is_the_mean_over_pairs():
    outputs = torch.randn(7, 5, 16)
    cosine = torch.cosine_similarity(outputs.unsqueeze(1), outputs.unsqueeze(2), dim=-1)  # (T, K, K)
    torch.testing.assert_close(output_similarity(outputs), cosine[:, ~torch.eye(5, dtype=torch.bool)].mean(dim=1))


def test_weight_similarity_by_hand():
    """The mean neurons of gate are at 60 degrees, of up at right angles, of down opposite: (1/4 + 0 + 1) / 3."""
    mlp = _mlp(hidden_size=4, num_attention_heads=2, num_experts=2, num_experts_per_tok=1)
    experts = mlp.experts
    angles = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.75**0.5, 0, 0]])
    spread = torch.randn(2, 48, 4)
    spread = spread - spread.mean(dim=1, keepdim=True)  # does not move the mean
    with torch.no_grad():
        experts.matrix("gate").copy_(angles.unsqueeze(1) + spread)
        experts.matrix("up").copy_(torch.eye(4)[:2].unsqueeze(1) * 3 + spread)
        experts.matrix("down").copy_((torch.tensor([[1.0], [-2.0]]) * torch.eye(4)[2]).unsqueeze(2) + spread.mT)
    found = weight_similarity(list(mlp.experts.mean_neurons().values()))
    assert found.item() == pytest.approx((0.25 + 0 + 1) / 3, abs=1e-5)


def test_weight_similarity_is_what_the_probe_measures():
    from probes.measures.similarity import cosine_matrix

    mlp, off_diagonal = _mlp(), ~torch.eye(4, dtype=torch.bool)
    squares = []
    for name, neurons in (("gate", 1), ("up", 1), ("down", 2)):
        cosine = torch.as_tensor(cosine_matrix(mlp.experts.matrix(name).detach().mean(dim=neurons)))
        squares.append(cosine[off_diagonal].square().mean())
    torch.testing.assert_close(
        weight_similarity(list(mlp.experts.mean_neurons().values())).detach(), torch.stack(squares).mean().float()
    )


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_each_expert_by_itself(backend):
    """What `each` returns is the experts' own output, and its weighted sum is what the layer computes."""
    mlp, x = _mlp(experts_backend=backend), torch.randn(30, 32)
    experts, routing = mlp.experts, mlp.router(x, mlp.experts)
    each = experts.each(x, routing.topk_index)
    alone = torch.stack([experts.finish(e, x, experts.activate(e, x)) for e in range(4)], dim=1)  # (T, E, H)
    chosen = alone.gather(1, routing.topk_index.unsqueeze(-1).expand(-1, -1, 32))
    torch.testing.assert_close(each, chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((each * routing.topk_weight.unsqueeze(-1)).sum(1), experts(x, routing))


def test_both_losses_flow_into_the_experts_and_fall():
    module = _module(**ON)
    optimizer = torch.optim.Adam(module.decoder.parameters(), 1e-2)
    seen = []
    for _ in range(20):
        found = _both(module.losses.terms(*_batch()))
        optimizer.zero_grad()
        found.sum().backward()
        mlp = module.decoder.blocks[-1].mlp
        assert mlp.experts.gate_up_proj.grad.abs().sum() > 0
        assert mlp.experts.down_proj.grad.abs().sum() > 0
        optimizer.step()
        seen.append(found.detach())
    assert len(seen[0]) == 4  # two losses in two layers
    assert (seen[-1][:2] < seen[0][:2] - 0.1).all()
    assert (seen[-1][2:] < 0.5 * seen[0][2:]).all()


def test_the_total_is_the_weighted_sum_and_what_is_logged_is_not_weighted():
    module = _module(**ON)
    terms = module.losses.terms(*_batch())
    total = module.losses.balancing_losses(terms) + module.losses.router_losses(terms)
    logged, _ = module.step_log.read(1)
    output, weight = logged["train/output_diversity_loss"], logged["train/weight_diversity_loss"]
    assert total.item() == pytest.approx(0.1 * output + 0.1 * weight, rel=1e-5)
    assert weight > 0


def test_off_costs_nothing(monkeypatch):
    """Neither is computed, nor logged, where its coefficient is 0; nor in evaluation where it is not."""
    monkeypatch.setattr(Experts, "each", lambda *_: pytest.fail("outputs were taken apart"))
    monkeypatch.setattr("moebed.model.decoder.weight_similarity", lambda *_: pytest.fail("weights were looked at"))
    module = _module()
    terms = module.losses.terms(*_batch())
    module.losses.balancing_losses(terms)
    module.losses.router_losses(terms)
    assert terms.router_losses == [{}, {}]
    logged, _ = module.step_log.read(1)
    assert "train/load_balancing_loss" in logged
    assert not any("diversity" in name for name in logged)
    with torch.no_grad():
        assert _module(**ON).eval().losses.terms(*_batch()).router_losses == [{}, {}]


def test_the_language_model_loss_does_not_change():
    plain, watched = _module().losses.terms(*_batch()), _module(**ON).losses.terms(*_batch())
    torch.testing.assert_close(plain.nats, watched.nats, rtol=1e-5, atol=1e-4)


def test_padding_is_left_out():
    ids, labels = _batch()
    labels[:, 20:] = IGNORE_INDEX
    short = _module(**ON).losses.terms(ids[:, :20], labels[:, :20])
    torch.testing.assert_close(_both(_module(**ON).losses.terms(ids, labels)), _both(short))


@pytest.mark.parametrize("changes", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 1}])
def test_one_expert_has_no_pair(changes):
    terms = _module(**ON, **changes).losses.terms(*_batch())
    found = _both(terms).tolist()
    assert found[:2] == [0, 0]
    assert (found[2:] == [0, 0]) == (changes.get("num_experts") == 1)
    _both(terms).sum().backward()


def _gradients(module: MoEModule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    terms = module.losses.terms(*_batch())
    found = _both(terms)
    (found.sum() + terms.nats.mean()).backward()
    return found.detach(), [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("how", ["loop", "checkpointing"])
def test_the_same_however_it_is_computed(how):
    changes = {**ON, "num_hidden_layers": 1}
    one, other = _module(**changes), _module(**changes, experts_backend="loop" if how == "loop" else "auto")
    other.decoder.activation_checkpointing = how == "checkpointing"
    found, grads = _gradients(one)
    again, others = _gradients(other)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(others, grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


def test_compiles_without_graph_break():
    mlp, x = _module(**ON).decoder.blocks[0].mlp, torch.randn(40, 32)

    def losses(x):
        out, routing = mlp(x)
        return out, *routing.losses.values()

    compiled = torch.compile(losses, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for forward in (losses, compiled):
        mlp.zero_grad()
        found = forward(x)
        sum(value.sum() for value in found).backward()
        results.append([*found, *(parameter.grad for parameter in mlp.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_shared_experts_are_added_once():
    config = tiny_config(num_shared_experts=1, **ON)
    decoder, ids = Decoder(config), _batch()[0]
    torch.testing.assert_close(decoder(ids).logits, decoder.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_is_close():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = _both(_module(**ON).losses.terms(*_batch()))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, _both(_module(**ON).losses.terms(*_batch())), rtol=0.05, atol=0.01)
