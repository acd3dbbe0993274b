"""What a step is trained on beside the language-model loss, against formulas written out on each layer's routing."""

import pytest
import torch
import torch.nn.functional as F

from moebed.training.module import MoEModule
from tests.conftest import tiny_config

AUX, Z = 0.25, 0.5
IDS = torch.randint(0, 60, (3, 21), generator=torch.Generator().manual_seed(1))
LABELS = IDS[:, 1:].masked_fill(torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
COUNTED = LABELS != -100


def _module(**changes) -> MoEModule:
    torch.manual_seed(0)
    coefficients = {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z}
    return MoEModule(tiny_config(vocab_size=60, **{**coefficients, **changes})).train()


@torch.no_grad()
def _by_hand(module: MoEModule, chosen: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """E · Σ f_i P_i, the mean squared logsumexp, and the busiest expert's load over the mean, less 1, of each layer."""
    balance, z, violation = [], [], []
    for routing in module.decoder(IDS[:, :-1]).routings:
        probs, index = routing.router_probs.view(3, 20, -1)[chosen], routing.topk_index.view(3, 20, -1)[chosen]
        load = F.one_hot(index, probs.shape[-1]).double().sum(dim=(0, 1))
        balance.append(float(len(load) * (load / load.sum() * probs.double().mean(dim=0)).sum()))
        z.append(float(routing.router_logits.view(3, 20, -1)[chosen].double().logsumexp(-1).square().mean()))
        violation.append(float(load.max() / load.mean() - 1))
    return balance, z, violation


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_balance_and_z_loss_are_means_over_the_layers_each_with_its_coefficient(scope):
    module = _module(router_aux_loss_scope=scope)
    balance, z, violation = (torch.tensor(of).mean().item() for of in _by_hand(module, COUNTED))
    weight = COUNTED.sum(dim=1) / COUNTED.sum()
    each = [COUNTED & (torch.arange(3) == row).unsqueeze(1) for row in range(3)]
    alone = sum(weight[row].item() * sum(_by_hand(module, each[row])[0]) / 2 for row in range(3))
    total = module.losses.balancing_losses(module.losses.terms(IDS[:, :-1], LABELS)).item()
    logged, _ = module.step_log.read(1)
    wanted = alone if scope == "sequence" else balance
    assert total == pytest.approx(AUX * wanted + Z * z, rel=1e-5)
    assert logged["train/load_balancing_loss"] == pytest.approx(wanted, rel=1e-5)
    assert logged["train/router_z_loss"] == pytest.approx(z, rel=1e-5)
    assert logged["train/max_violation"] == pytest.approx(violation, rel=1e-5)
    assert logged["train/sequence_specialisation"] == pytest.approx(alone - balance, rel=1e-3)


def test_the_violation_is_of_a_micro_batch_whatever_the_balancing_loss_is_of():
    module = _module(router_aux_loss_scope="global")
    first, second = (module.losses.terms(IDS[row : row + 1, :-1], LABELS[row : row + 1]) for row in range(2))
    module.losses.balancing_losses(first)
    module.step_log.clear()
    module.losses.balancing_losses(second)
    expected = torch.stack([count.max() / count.mean() - 1 for count in second.counts]).mean()
    assert module.step_log.read(1)[0]["train/max_violation"] == pytest.approx(expected.item(), rel=1e-6)


def test_losses_of_a_layer_are_a_mean_over_layers_and_losses_of_a_batch_a_sum():
    module = _module(output_diversity_loss_coef=0.3, router="noisy_topk", router_options={"load_loss_coef": 0.7})
    terms = module.losses.terms(IDS[:, :-1], LABELS)
    diversity = [losses["output_diversity"] for losses in terms.router_losses]
    assert module.losses.router_losses(terms).item() == pytest.approx(0.3 * sum(diversity).item() / 2, rel=1e-5)
    variation = [{name: of.var() / of.mean() ** 2 for name, of in layer.items()} for layer in terms.router_sums]
    expected = sum(0.01 * layer["importance"] + 0.7 * layer["load"] for layer in variation)
    assert module.losses.batch_losses(terms).item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.losses.total(torch.tensor(2.0), terms).item() == pytest.approx(
        2 + sum(part(terms).item() for part in (module.losses.balancing_losses, module.losses.router_losses))
        + expected.item(),
        rel=1e-5,
    )  # fmt: skip


def test_looking_ahead_draws_nothing_that_the_step_will_draw(monkeypatch):
    """A pass that draws from torch's generator draws the same where it counts."""
    module, seen = _module(router_aux_loss_scope="window"), []
    terms = module.losses.terms
    monkeypatch.setattr(module.losses, "terms", lambda *batch: seen.append(torch.rand(())) or terms(*batch))
    batch = IDS[:, :-1], LABELS, {}
    module.router_steps.begin(0)
    module.losses.look_ahead([batch, batch], module.router_steps)
    for _ in range(2):
        module.losses.terms(*batch)
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
