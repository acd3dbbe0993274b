"""Muon over stacks of experts: each matrix by itself, at one size of step, and not where there is no gradient."""

import copy

import pytest
import torch
from torch import nn

from moebed.model.decoder import Decoder
from moebed.training.muon import _COEFFICIENTS, Muon, muon_parameters, orthogonalised
from moebed.training.optim import OptimizerConfig, build_optimizer
from tests.conftest import tiny_config

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def _muon(*parameters, joined=1, weight_decay=0.0, **changes):
    groups = [{"params": list(parameters), "weight_decay": weight_decay, "joined": joined}]
    return Muon(groups, lr=changes.pop("lr", 1.0), fused=True, **changes)


def _decoder(**changes):
    torch.manual_seed(0)
    return Decoder(tiny_config(**changes))


LEAST, MOST, KEPT = 0.68183, 1.20237, 1.13436


def test_the_polynomial_leaves_no_singular_value_below_682_and_many_below_7():
    """What may be claimed of a step: [.682, 1.202], and not the [.7, 1.2] that is often said.

    x → 3.4445 x − 4.7750 x³ + 2.0315 x⁵ has its only extrema above 0 at .5545 and 1.0501, where it is 1.2024 and .6818.
    So no value goes above 1.2024; [.6818, 1.1344] is mapped onto itself, 1.0501 being in it, and no number of steps
    leads out of its lower end. Five steps bring all that is at least .00151 of the norm above .6818.
    """
    a, b, c = _COEFFICIENTS

    def steps(x: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            x = a * x + b * x**3 + c * x**5
        return x

    kept, all_of_it = (torch.linspace(LEAST, end, 1_000_001).double() for end in (KEPT, MOST))
    for x in (kept, all_of_it):
        found = steps(x, 1)
        assert [found.min(), found.max()] == pytest.approx([LEAST, KEPT], abs=2e-5)
    begun = torch.logspace(-4, 0, 400_001).double()
    found = steps(begun, 5)
    assert found.max() == pytest.approx(MOST, abs=2e-5)
    assert begun[found < LEAST - 1e-5].max() == pytest.approx(0.00151, abs=1e-5)
    reached = found[begun > 0.003]
    assert 0.10 < (reached < 0.7).double().mean() < 0.15  # of values evenly spread in their logarithm


@pytest.mark.parametrize("shape", [(3, 32, 48), (3, 48, 32), (2, 32, 32)])
def test_singular_values_come_near_one(shape):
    """Of those that are .005 of the matrix's norm or more, to .6818 to 1.2024."""
    stack = torch.randn(shape) * 17
    found = torch.linalg.svdvals(orthogonalised(stack))
    before = torch.linalg.svdvals(stack)
    counted = before / before.norm(dim=1, keepdim=True) > 0.005
    assert counted.float().mean() > 0.9
    assert found[counted].min() > LEAST - 1e-3
    assert found.max() < MOST + 1e-3
    assert torch.equal(orthogonalised(torch.zeros(2, 4, 5)), torch.zeros(2, 4, 5))


def test_a_stack_is_so_many_matrices():
    """As each by itself, to 1e-6; of experts as one matrix, each block would be smaller by the root of their number."""
    stack = torch.randn(4, 24, 40)
    alone = torch.cat([orthogonalised(matrix.unsqueeze(0)) for matrix in stack])
    torch.testing.assert_close(orthogonalised(stack), alone, rtol=0, atol=1e-6)
    equal = stack[:1].expand(4, -1, -1)
    joint = orthogonalised(equal.reshape(1, 96, 40)).view(4, 24, 40)
    ratio = joint.norm() / orthogonalised(equal).norm()
    assert ratio == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(("joined", "matrix"), [(1, (12, 10)), (2, (6, 10))])
def test_a_step_has_the_size_of_one_expert_s_matrix(joined, matrix):
    """.2 · √max(R, C) · O, of gate and of up by themselves; 2-D parameters the same."""
    stack, gradient = torch.randn(3, 12, 10), torch.randn(3, 12, 10)
    parameter = nn.Parameter(stack.clone())
    parameter.grad = gradient.clone()
    _muon(parameter, joined=joined, lr=0.1, nesterov=False).step()
    expected = 0.2 * max(matrix) ** 0.5 * orthogonalised(gradient.reshape(-1, *matrix)).view_as(stack)
    torch.testing.assert_close(parameter.detach(), stack - 0.1 * expected)
    torch.testing.assert_close(parameter.grad, gradient)  # as it was
    flat = nn.Parameter(stack[0].clone())
    flat.grad = gradient[0].clone()
    _muon(flat, joined=joined, lr=0.1, nesterov=False).step()
    torch.testing.assert_close(flat, parameter[0])


def test_momentum_nesterov_and_decay_by_hand():
    gradients = torch.randn(3, 2, 5, 7)
    for nesterov in (False, True):
        start = torch.randn(2, 5, 7)
        parameter, mean, expected = nn.Parameter(start.clone()), torch.zeros(2, 5, 7), start.clone()
        optimizer = _muon(parameter, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            mean = 0.9 * mean + gradient
            ahead = gradient + 0.9 * mean if nesterov else mean
            expected = expected - 0.01 * (0.2 * 7**0.5 * orthogonalised(ahead) + 0.1 * expected)
        torch.testing.assert_close(parameter.detach(), expected)


def test_the_step_does_not_know_the_gradient_s_size():
    start, gradient = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    moved = []
    for scale in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(start.clone())
        parameter.grad = gradient * scale
        _muon(parameter).step()
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved[2], moved[1], rtol=1e-3, atol=1e-4)


def test_an_expert_without_a_token_is_left_as_it_is():
    """Stale momentum would move it at full size, and decay would shrink it; its momentum waits."""
    decoder = _decoder(num_experts_per_tok=1)
    optimizer = build_optimizer(decoder, OptimizerConfig(name="muon", learning_rate=0.01))
    experts = decoder.blocks[0].mlp.experts
    choose, blocked = decoder.blocks[0].mlp.router.choose, torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    for step in range(2):
        if step:
            decoder.blocks[0].mlp.router.choose = lambda logits: choose(logits + blocked)
        before = [p.detach().clone() for p in experts.parameters()]
        kept = [optimizer.state[p]["momentum"].clone() for p in experts.parameters()] if step else None
        decoder(IDS).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter, was, momentum in zip(experts.parameters(), before, kept, strict=True):
        assert torch.equal(parameter[2], was[2])
        assert torch.equal(optimizer.state[parameter]["momentum"][2], momentum[2])
        assert momentum[2].abs().sum() > 0
        for other in (0, 1, 3):
            assert not torch.equal(parameter[other], was[other])


def test_who_is_trained_by_what():
    """Attention, feed-forward, experts and gates by Muon; embedding, norms and head by AdamW; a frozen gate by none."""
    decoder = _decoder(num_shared_experts=1, attention_bias=True)
    names = {id(p): name for name, p in decoder.named_parameters()}
    optimizer = build_optimizer(decoder, OptimizerConfig(name="muon"))
    groups = optimizer.param_groups
    by_muon = {names[id(p)]: group["joined"] for group in groups if "joined" in group for p in group["params"]}
    assert {name.split(".", 2)[2] for name in by_muon} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"),
    }
    assert {name for name, count in by_muon.items() if count == 2} == {
        f"layers.{layer}.mlp.experts.gate_up_proj" for layer in range(2)
    }
    assert sum(len(group["params"]) for group in groups) == len(names)
    frozen = _decoder(router="random")
    assert not any(id(block.mlp.router.weight) in muon_parameters(frozen) for block in frozen.blocks)
    assert type(build_optimizer(decoder, OptimizerConfig())) is torch.optim.AdamW


def test_what_adamw_trains_it_trains_as_ever():
    moved = []
    for name in ("adamw", "muon"):
        decoder = _decoder()
        optimizer = build_optimizer(decoder, OptimizerConfig(name=name, learning_rate=0.01))
        decoder(IDS).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
        moved.append(dict(decoder.named_parameters()))
    for key in ("embed_tokens.weight", "lm_head.weight", "norm.weight", "layers.0.pre_ffn_norm.weight"):
        assert torch.equal(moved[0][key], moved[1][key])
    assert not torch.equal(moved[0]["layers.0.self_attn.q_proj.weight"], moved[1]["layers.0.self_attn.q_proj.weight"])


def test_it_goes_on_from_its_state():
    """Bit for bit, as from a checkpoint."""
    decoder = _decoder()
    config = OptimizerConfig(name="muon", learning_rate=0.01)
    optimizer, found = build_optimizer(decoder, config), []

    def step(model, optimizer):
        model(IDS).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(decoder, optimizer)
    again = _decoder()
    again.load_state_dict(decoder.state_dict())
    resumed = build_optimizer(again, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((decoder, optimizer), (again, resumed)):
        step(model, one)
        found.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
