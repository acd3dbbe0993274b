"""muP: initial weights and learning rates by role, and what they are for: changes of one size at any width."""

import pytest
import torch

from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.width import Factors
from moebed.training.optim import OptimizerConfig, build_optimizer
from moebed.training.schedule import SchedulePlan
from tests.conftest import tiny_config

IDS = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
WIDTHS, SEEDS = (64, 128, 256, 512), range(3)


def _decoder(width=64, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "moe_intermediate_size": width, "head_dim": 16, "num_attention_heads": width // 16}
    return Decoder(tiny_config(**{**sizes, "num_key_value_heads": width // 16, "initializer_range": 0.1, **changes}))


def test_factors_by_hand():
    """Four times as wide, experts twice as wide as at the base."""
    changes = {"base_hidden_size": 64, "base_moe_intermediate_size": 128, "num_shared_experts": 1}
    decoder = _decoder(256, shared_expert_gate=True, **changes)
    found, layer = decoder.width_factors, "layers.1."
    hidden, few = Factors(0.5, 0.25), Factors(0.25, 0.25)
    expected = {f"{layer}self_attn.{part}_proj.weight": hidden for part in "qkvo"}
    expected |= {f"{layer}mlp.shared_expert.{part}_proj.weight": hidden for part in ("gate", "up", "down")}
    expected |= {
        f"{layer}mlp.shared_expert_gate.weight": few,
        f"{layer}mlp.router.weight": hidden,
        "lm_head.weight": few,
    }
    expected |= {f"{layer}mlp.experts.gate_up_proj": hidden, f"{layer}mlp.experts.down_proj": Factors(1.0, 0.5)}
    assert {key: found[key] for key in expected} == expected
    assert {key for key in found if key.startswith(layer) or "layers" not in key} == expected.keys()
    assert "embed_tokens.weight" not in found
    assert _decoder(256, base_hidden_size=64).width_factors[f"{layer}mlp.experts.down_proj"] == hidden
    tied = _decoder(256, base_hidden_size=64, tie_word_embeddings=True, router_options={"router_bias": True})
    outer = {"embed_tokens.weight", "lm_head.weight", f"{layer}mlp.router.bias"}
    assert not outer & tied.width_factors.keys()
    assert f"{layer}mlp.router.bias" in dict(tied.named_parameters())


def test_at_the_base_nothing_changes():
    plain, scaled = _decoder(64), _decoder(64, base_hidden_size=64, base_moe_intermediate_size=64)
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {group["lr"] for group in build_optimizer(scaled, OptimizerConfig(learning_rate=0.01)).param_groups} == {
        0.01
    }
    assert not any("width" in group for group in build_optimizer(plain, OptimizerConfig()).param_groups)


def test_initial_weights_and_rates_are_scaled():
    plain, scaled = _decoder(256), _decoder(256, base_hidden_size=64)
    names = dict(plain.named_parameters())
    optimizer = build_optimizer(scaled, OptimizerConfig(learning_rate=0.01))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(names)
    for name, parameter in scaled.named_parameters():
        factors = scaled.width_factors.get(name, Factors())
        torch.testing.assert_close(parameter, names[name] * factors.initial)
        assert rates[id(parameter)] == pytest.approx(0.01 * factors.rate)


def test_the_schedule_keeps_each_rate():
    """Also where an optimizer was restored from a checkpoint and the plan is another."""
    decoder = _decoder(256, base_hidden_size=64)
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=4, schedule="constant")
    optimizer, plan = build_optimizer(decoder, config), SchedulePlan(config, None)
    schedule = plan.build(optimizer)
    widths = [group["width"] for group in optimizer.param_groups]
    assert sorted(set(widths)) == [0.25, 1.0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0025 * width for width in widths])
    other = OptimizerConfig(learning_rate=0.02, warmup_steps=4, schedule="constant")
    SchedulePlan(other, None).hold(optimizer, schedule, build_optimizer(decoder, other))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005 * width for width in widths])


def five_steps(width: int, seed: int, embedding: float, adjust=None, **changes) -> dict[str, float]:
    """Root mean square of what five steps changed: router logits, experts' outputs, the residual stream, logits."""
    decoder = _decoder(width, seed, num_hidden_layers=2, **changes)
    with torch.no_grad():
        decoder.embed_tokens.weight.mul_(embedding / decoder.config.initializer_range)
    optimizer = build_optimizer(decoder, OptimizerConfig(learning_rate=0.01, weight_decay=0.0))
    if adjust is not None:
        adjust(decoder, optimizer)

    def seen() -> dict[str, torch.Tensor]:
        kept = {}
        block = decoder.blocks[1]
        hooks = [
            block.register_forward_hook(lambda module, inputs, out: kept.update(residual=out[0])),
            block.mlp.register_forward_hook(lambda module, inputs, out: kept.update(experts=out[0])),
        ]
        with torch.no_grad():
            out = decoder(IDS)
        for hook in hooks:
            hook.remove()
        return kept | {"router": out.routings[1].router_logits, "logits": out.logits}

    before = seen()
    for _ in range(5):
        logits = decoder(IDS[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: float((value - before[name]).square().mean().sqrt()) for name, value in seen().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("beginning", "embedding", "most"), [(0.1, 0.1, 1.5), (0.02, 0.02, 2.0), (0.02, 0.1, 1.5)])
def test_five_steps_change_as_much_at_any_width(beginning, embedding, most):
    """The coordinate check: within a factor 1.5 from 64 to 512, where one learning rate for all is far outside it.

    Of router logits, experts' outputs and the residual stream, means over seeds. The model's own logits come to change
    less the wider it is, as the share of the head's random beginning in it falls. From an embedding so small that five
    steps make several times as much of the stream, what experts see is made in those steps: their outputs scatter from
    seed to seed by nearly a factor 2, and are within one. It is the embedding: with that of the first case the same
    experts are within 1.5, while the epsilons of Adam and of the norms change nothing.
    """
    spread = {}
    for base in (None, 64):
        changes = {"base_hidden_size": base, "initializer_range": beginning}
        found = {width: [five_steps(width, seed, embedding, **changes) for seed in SEEDS] for width in WIDTHS}
        means = [{name: sum(one[name] for one in runs) / len(runs) for name in runs[0]} for runs in found.values()]
        spread[base] = {name: max(one[name] for one in means) / min(one[name] for one in means) for name in means[0]}
        each = [[found[width][seed]["experts"] for width in WIDTHS] for seed in SEEDS]
        print(base, {name: [round(one[name], 4) for one in means] for name in means[0]}, spread[base])
        print("experts, by seed:", [round(max(one) / min(one), 2) for one in each])
    for name in ("router", "experts", "residual"):
        assert spread[64][name] < most < 4 < spread[None][name]
    assert spread[64]["logits"] < 2 < spread[None]["logits"]


def test_muon_is_refused():
    with pytest.raises(ConfigError, match="name is muon, whose steps have one size at any width"):
        build_optimizer(_decoder(128, base_hidden_size=64), OptimizerConfig(name="muon"))
