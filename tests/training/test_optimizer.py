"""Which parameters decay, by which schedule rates go, and that a restored optimizer does as told."""

from types import SimpleNamespace

import pytest

from moebed.model.decoder import Decoder
from moebed.training.optim import OptimizerConfig, build_optimizer, learning_rate_factor
from moebed.training.schedule import SchedulePlan, last_step
from tests.conftest import tiny_config


def test_schedules():
    cosine = OptimizerConfig(warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate_factor(cosine, 0, 110) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 10, 110) == pytest.approx(1.0)
    assert learning_rate_factor(cosine, 60, 110) == pytest.approx(0.55)
    assert learning_rate_factor(cosine, 110, 110) == pytest.approx(0.1)
    wsd = OptimizerConfig(warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.0)
    assert learning_rate_factor(wsd, 80, 100) == pytest.approx(1.0)
    assert learning_rate_factor(wsd, 90, 100) == pytest.approx(0.5)
    assert learning_rate_factor(wsd, 100, 100) == pytest.approx(0.0)
    wsd = OptimizerConfig(warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.1)
    assert [learning_rate_factor(wsd, step, 100) for step in (90, 100, 110)] == pytest.approx([0.55, 0.1, 0.1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_is_told_what_the_config_says(name):
    config = OptimizerConfig(name=name, beta1=0.8, beta2=0.99, eps=1e-6, learning_rate=0.02)
    for group in build_optimizer(Decoder(tiny_config()), config).param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.99), 1e-6, 0.02)


@pytest.mark.parametrize(
    ("max_steps", "limit_train_batches", "max_epochs", "fast_dev_run", "wanted"),
    [
        (7, 1.0, None, 0, 7),
        (-1, 10, 2, 0, 8),  # three micro-batches a step: the fourth of an epoch has one
        (7, 10, 2, 0, 7),
        (9, 10, 2, 0, 8),
        (-1, 10, -1, 0, None),
        (-1, 1.0, 2, 0, None),  # a share of a text without an end
        (5, 5, 1, 5, 5),  # Lightning makes it so many steps of one micro-batch
    ],
)
def test_the_step_that_ends_a_run(max_steps, limit_train_batches, max_epochs, fast_dev_run, wanted):
    trainer = SimpleNamespace(
        max_steps=max_steps,
        limit_train_batches=limit_train_batches,
        max_epochs=max_epochs,
        fast_dev_run=fast_dev_run,
        accumulate_grad_batches=3,
    )
    assert last_step(trainer) == wanted


def test_norms_and_biases_do_not_decay():
    rest, experts, scales = build_optimizer(Decoder(tiny_config(attention_bias=True)), OptimizerConfig()).param_groups
    assert all(parameter.ndim >= 2 for parameter in [*rest["params"], *experts["params"]])
    assert all(parameter.ndim == 3 for parameter in experts["params"])
    assert all(parameter.ndim < 2 for parameter in scales["params"])
    assert [group["weight_decay"] for group in (rest, experts, scales)] == [0.1, 0.1, 0.0]


def test_biases_of_experts_neither_decay_nor_are_made_orthogonal():
    """Stacks of vectors, which look like matrices; in a group of their own, as they lie where the experts do."""
    decoder = Decoder(tiny_config(experts_bias=True))
    biases = {id(p) for name, p in decoder.named_parameters() if name.endswith("_proj_bias")}
    for name in ("adamw", "muon"):
        *_, last = build_optimizer(decoder, OptimizerConfig(name=name)).param_groups
        assert {id(p) for p in last["params"]} == biases
        assert last["weight_decay"] == 0.0
        assert "joined" not in last
    assert all(bool((p == 0).all()) for p in decoder.parameters() if id(p) in biases)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_does_what_a_new_one_would(name):
    """In every group, whatever the checkpoint's optimizer was told: biases of experts do not decay either."""
    decoder = Decoder(tiny_config(experts_bias=True, attention_bias=True))
    before, now = (
        OptimizerConfig(name=name, warmup_steps=0, weight_decay=decay, beta2=beta, eps=eps, learning_rate=rate)
        for decay, beta, eps, rate in ((0.0, 0.99, 1e-6, 1e-4), (0.3, 0.9, 1e-9, 1e-2))
    )
    restored, new = build_optimizer(decoder, now), build_optimizer(decoder, now)
    plan = SchedulePlan(now, 10)
    schedule = plan.build(restored)
    restored.load_state_dict(build_optimizer(decoder, before).state_dict())
    plan.hold(restored, schedule, build_optimizer(decoder, now))
    decays = {id(p): group["weight_decay"] for group in restored.param_groups for p in group["params"]}
    for parameter_name, parameter in decoder.named_parameters():
        is_matrix = parameter.ndim >= 2 and not parameter_name.endswith("bias")
        assert decays[id(parameter)] == (0.3 if is_matrix else 0.0), parameter_name
    for group, built in zip(restored.param_groups, new.param_groups, strict=True):
        assert all(group[key] == value for key, value in built.items() if key != "params")
