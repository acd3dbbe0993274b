"""Losses on gate embeddings and on experts' answers to them: by hand, in a model, and what must not change them."""

import pytest
import torch
from torch import nn

from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.orthogonality import (
    coupling_loss,
    gram_distance,
    negative_variance,
    perturbed,
    projections,
    responses,
    squared_cosines,
)
from moebed.model.routers import cautions
from moebed.model.routers.controls import uniform_numbers
from moebed.training.module import MoEModule
from tests.conftest import tiny_config

NAMES = ("output_orthogonality", "probability_variance", "router_orthogonality", "router_coupling")
ON = {f"{name}_loss_coef": 0.1 for name in NAMES}
IDS = torch.randint(0, 60, (2, 41), generator=torch.Generator().manual_seed(1))


def _module(**changes) -> MoEModule:
    torch.manual_seed(0)
    return MoEModule(tiny_config(vocab_size=60, **{"router_aux_loss_coef": 0.0, **changes})).train()


def _terms(module: MoEModule, step: int = 0):
    module.router_steps.begin(step)
    return module.losses.terms(IDS[:, :-1], IDS[:, 1:])


def _losses(module: MoEModule, step: int = 0) -> dict[str, torch.Tensor]:
    return _terms(module, step).router_losses[0]


# Expert-router coupling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.5), (0.5, 1.0)])
def test_coupling_by_hand(alpha, expected):
    """M = [[2, 1], [3, 2]]: expert 0 answers 3 to the other's embedding and 2 to its own; transposed, as it comes."""
    response = torch.tensor([[2.0, 1.0], [3.0, 2.0]]).T
    assert coupling_loss(response, alpha).item() == pytest.approx(expected)


def test_coupling_is_its_sum_written_out():
    """Of experts that answer to their own embeddings unevenly: both sums over j go by the own answer of i."""
    m, alpha = 3 * torch.rand(5, 5), 0.8  # M_ij: expert j to embedding i
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    over_others = sum((m[i, j] - alpha * m[i, i]).clamp(min=0) for i, j in pairs)
    over_own = sum((m[j, i] - alpha * m[i, i]).clamp(min=0) for i, j in pairs)
    assert abs(over_others - over_own) > 0.1
    torch.testing.assert_close(coupling_loss(m.T, alpha), (over_others + over_own) / 25)


def test_two_neurons_that_are_the_embedding_answer_to_it_alone():
    """r_i = e_i, and both neurons of expert i are e_i: M = √2 · I, and no loss."""
    matrices = torch.eye(4).unsqueeze(1).expand(-1, 2, -1)
    response = responses(torch.eye(4), matrices)
    torch.testing.assert_close(response, 2**0.5 * torch.eye(4))
    torch.testing.assert_close(responses(torch.eye(4), -matrices), response)  # no activation is between
    assert coupling_loss(response, 1.0) == 0


def test_no_expert_answers_to_another_s_embedding():
    """r_i = e_i, W^i = e_i e_iᵀ: M is the identity."""
    gate = torch.eye(3, 5)
    matrices = torch.stack([torch.outer(torch.eye(4)[i], row) for i, row in enumerate(gate)])
    response = responses(gate, matrices)
    torch.testing.assert_close(response, torch.eye(3))
    assert coupling_loss(response, 1.0) == 0
    assert coupling_loss(response.roll(1, 0), 1.0) > 0.5  # each answers to the next one's
    gate, matrices = torch.randn(3, 5), torch.randn(3, 4, 5)
    expected = torch.stack([torch.stack([(w @ r).norm() for r in gate]) for w in matrices])
    torch.testing.assert_close(responses(gate, matrices), expected)


def test_perturbed_embeddings_stay_nearest_to_themselves():
    gate = torch.randn(6, 32)
    ends = [perturbed(gate, torch.full_like(gate, value)) for value in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(ends[1], gate)
    apart = (gate.unsqueeze(0) - gate.unsqueeze(1)).norm(dim=-1) + torch.eye(6) * 1e9
    reach = apart.min(1).values / (2 * gate.norm(dim=1))
    torch.testing.assert_close(ends[2], gate * (1 + reach.unsqueeze(1)))
    torch.testing.assert_close(ends[0], gate * (1 - reach.unsqueeze(1)))
    for _ in range(20):
        near = torch.cdist(perturbed(gate, torch.rand_like(gate)), gate)
        assert near.argmin(dim=1).tolist() == list(range(6))
    assert torch.equal(perturbed(gate[:1], torch.rand(1, 32)), gate[:1])


def test_the_perturbation_is_of_step_and_layer():
    draws = {key: uniform_numbers(key, (8, 64), torch.device("cpu")) for key in ((0, 0), (0, 1), (1, 0))}
    assert torch.equal(draws[0, 1], uniform_numbers((0, torch.tensor(1)), (8, 64), torch.device("cpu")))
    assert not any(torch.equal(draws[0, 0], draws[key]) for key in ((0, 1), (1, 0)))
    together = torch.cat([draw.flatten() for draw in draws.values()])
    assert 0 < together.min() < 0.01 < 0.99 < together.max() < 1
    assert together.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / len(together)) ** 0.5)
    module = _module(router_coupling_loss_coef=1.0)
    found = [_losses(module, step)["router_coupling"].item() for step in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("reaches", [False, True])
def test_coupling_moves_the_gate_only_if_asked(reaches):
    module = _module(router_coupling_loss_coef=1.0, router_coupling_gradient=reaches)
    _losses(module)["router_coupling"].backward()
    mlp = module.decoder.blocks[0].mlp
    assert mlp.experts.gate_up_proj.grad.abs().sum() > 0
    assert mlp.experts.gate_up_proj.grad.chunk(2, dim=1)[1].abs().sum() == 0  # up has no part in it
    assert (mlp.router.weight.grad is not None and bool(mlp.router.weight.grad.abs().sum() > 0)) == reaches


# Gate embeddings at right angles -------------------------------------------------------------------------------------


def test_simbal_by_hand():
    assert gram_distance(torch.eye(3, 7)) == 0
    assert gram_distance(2 * torch.eye(3)) == 9
    assert gram_distance(torch.tensor([[1.0, 0], [1, 0]])) == 2


def test_ernie_by_hand():
    assert squared_cosines(torch.eye(3, 7) * 5).item() == pytest.approx(0, abs=1e-12)
    assert squared_cosines(torch.tensor([[1.0, 2], [2, 4]])).item() == pytest.approx(0.5)


def test_simbal_begins_orthogonal():
    module = _module(router_orthogonality_loss_coef=0.1, router_orthogonality="simbal")
    for router in module.decoder.routers:
        torch.testing.assert_close(router.weight @ router.weight.T, torch.eye(4), rtol=0, atol=1e-5)
    assert _losses(module)["router_orthogonality"] < 1e-4
    plain = _module(router_orthogonality_loss_coef=0.1).decoder.routers[0].weight
    assert torch.equal(plain, _module().decoder.routers[0].weight)  # ERNIE's begin as ever


# A token's outputs and probabilities ---------------------------------------------------------------------------------


def test_projections_by_hand():
    """Outputs at right angles: 0. Equal ones: their squared length. Three in a plane: all of each."""
    assert projections(torch.eye(3, 8).unsqueeze(0) * 4).item() == pytest.approx(0, abs=1e-6)
    equal = torch.tensor([3.0, 4.0]).expand(1, 2, 2)
    assert projections(equal).item() == pytest.approx(25, rel=1e-4)
    plane = torch.tensor([[1.0, 0], [0, 2], [1, 1]])
    assert projections(plane.unsqueeze(0)).item() == pytest.approx((1 + 4 + 2) / 3, rel=1e-3)
    assert projections(torch.randn(5, 1, 8)).tolist() == [0] * 5
    assert projections(torch.zeros(2, 3, 8)).tolist() == [0, 0]


def test_projections_are_gram_schmidt_s():
    outputs = torch.randn(6, 4, 9)
    expected = torch.zeros(6)
    for token in range(6):
        for i in range(4):
            others = torch.cat([outputs[token, :i], outputs[token, i + 1 :]])
            basis = torch.linalg.qr(others.T).Q
            expected[token] += (basis.T @ outputs[token, i]).square().sum() / 4
    torch.testing.assert_close(projections(outputs), expected, rtol=1e-4, atol=1e-4)


def test_variance_of_probabilities_by_hand():
    found = negative_variance(torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]))
    torch.testing.assert_close(found, torch.tensor([-3 / 16, 0.0]))


# In a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ernie", "simbal"])
def test_each_falls_where_it_is_trained(kind):
    for name in NAMES:
        module = _module(**{f"{name}_loss_coef": 1.0, "router_orthogonality": kind})
        with torch.no_grad():
            for router in module.decoder.routers:
                router.weight.add_(0.5)  # alike at first
        optimizer = torch.optim.Adam(module.decoder.parameters(), 1e-2)
        seen = []
        for _ in range(15):
            found = torch.stack([layer[name] for layer in _terms(module).router_losses]).mean()
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            seen.append(found.item())
        assert seen[-1] < seen[0] - 0.1 * abs(seen[0]), name


def test_off_they_are_not_there_and_on_they_leave_the_language_model_loss():
    plain, watched = _module(), _module(**ON)
    assert _losses(plain) == {}
    found = _terms(watched)
    assert set(found.router_losses[0]) == set(NAMES)
    torch.testing.assert_close(_terms(plain).nats, found.nats, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert _module(**ON).eval().losses.terms(IDS, IDS).router_losses == [{}, {}]
    total = watched.losses.router_losses(found)
    weighted = sum(0.1 * sum(layer[name] for layer in found.router_losses) / 2 for name in NAMES)
    torch.testing.assert_close(total, weighted)


def test_the_same_recomputed_and_in_one_graph():
    one, other = _module(**ON), _module(**ON)
    other.decoder.activation_checkpointing = True
    for module in (one, other):
        sum(value for layer in _terms(module).router_losses for value in layer.values()).backward()
    for parameter, again in zip(one.parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (again.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, again.grad, rtol=1e-4, atol=1e-6)
    mlp, x = one.decoder.blocks[0].mlp, torch.randn(40, 32)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[1].losses, mlp(x)[1].losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["router_coupling", "router_orthogonality"])
@pytest.mark.parametrize("router", ["hash", "kmeans", "autonomy", "expert_norm"])
def test_a_router_without_gate_embeddings_is_refused(name, router):
    config = tiny_config(router=router, router_options={"d_low": 8}, **{f"{name}_loss_coef": 0.1})
    with pytest.raises(ConfigError, match=f"{name}_loss_coef is of gate embeddings, but router {router} has none"):
        Decoder(config)


def test_what_compares_a_token_s_experts_says_so_where_there_is_one():
    for name in ("output_orthogonality", "output_diversity"):
        (said,) = cautions(tiny_config(num_experts_per_tok=1, norm_topk_prob=False, **{f"{name}_loss_coef": 0.1}))
        assert said.startswith(f"{name}_loss_coef compares a token's experts with each other")
        with pytest.raises(ConfigError, match=f"{name}_loss_coef compares the K experts"):
            tiny_config(router="relu", **{f"{name}_loss_coef": 0.1})
    assert not cautions(
        tiny_config(num_experts_per_tok=[1, 2], norm_topk_prob=False, output_orthogonality_loss_coef=0.1)
    )


def test_bf16_autocast_is_close():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = _losses(_module(**ON))
    for name, value in _losses(_module(**ON)).items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], value, rtol=0.05, atol=0.02)


def test_one_expert_has_no_other():
    module = _module(**ON, num_experts=1, num_experts_per_tok=1)
    found = _losses(module)
    assert all(float(value) == pytest.approx(0, abs=1e-12) for value in found.values())
    sum(found.values()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
