"""Alerts come when something planted goes wrong, once, and stay away from a run that is well."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moebed.training import command_line
from moebed.training.alerts import WINDOW, Alerts
from moebed.training.routing_log import StepRouting

EXPERTS, LAYERS = 8, range(4)


def step(loads=None, entropy=2.0, seed=0):
    """A step whose experts have nearly even loads, but those of some layers."""
    even = {layer: np.random.default_rng(seed + layer).uniform(90, 110, EXPERTS) for layer in LAYERS}
    return StepRouting({**even, **(loads or {})}, dict.fromkeys(LAYERS, entropy))


def watch(steps, losses=None, before=None):
    """Alerts of a run that had these steps, after those that a checkpoint remembers."""
    alerts = before or Alerts()
    for number, routing in enumerate(steps):
        loss = {"train/loss": torch.tensor(losses[number])} if losses is not None else {}
        trainer = SimpleNamespace(global_step=number + 1, is_global_zero=True, callback_metrics=loss)
        alerts.on_train_batch_end(trainer, SimpleNamespace(step_routing=routing), None, None, 0)
    return alerts.said


def test_a_run_that_is_well_says_nothing(capsys):
    count = 4 * WINDOW
    assert watch([step(seed=n) for n in range(count)], np.linspace(5, 2, count)) == []
    assert capsys.readouterr().err == ""


def test_an_expert_without_tokens_is_named_once(capsys):
    idle = np.full(EXPERTS, 100.0)
    idle[5] = 0
    said = watch([step({2: idle}, seed=n) for n in range(3 * WINDOW)])
    assert len(said) == 1
    assert f"step {WINDOW}: expert 5 of layer 2 had no token in the last {WINDOW} steps" in said[0]
    assert capsys.readouterr().err == f"alert: {said[0]}\n"


def test_an_expert_with_a_token_now_and_then_is_not_idle():
    def loads(number):
        load = np.full(EXPERTS, 100.0)
        load[5] = float(number % 25 == 7)
        return {2: load}

    assert not any("no token" in said for said in watch([step(loads(n), seed=n) for n in range(2 * WINDOW)]))


def test_a_run_that_is_continued_neither_forgets_nor_repeats(tmp_path):
    """Entropy is compared with that of the run's start, not of where it goes on."""
    idle = np.full(EXPERTS, 100.0)
    idle[5] = 0
    first = Alerts()
    (said,) = watch([step({2: idle}, seed=n) for n in range(WINDOW)], before=first)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Alerts()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = watch([step({2: idle}, entropy=0.3, seed=n) for n in range(WINDOW)], before=second)
    assert again[0] == said
    assert len(again) == 2
    assert "router's entropy" in again[1]


def test_one_layer_out_of_balance_is_named():
    busy = np.full(EXPERTS, 10.0)
    busy[0] = 100.0
    (said,) = watch([step({3: busy}, seed=n) for n in range(WINDOW)])
    assert "layer 3 is out of balance" in said
    assert "router_aux_loss_coef" in said


def test_a_router_whose_entropy_falls_is_named():
    said = watch([step(entropy=2.0 if n < WINDOW else 0.3, seed=n) for n in range(2 * WINDOW)])
    assert len(said) == 1
    assert "entropy in layers 0, 1, 2, 3" in said[0]
    assert watch([step(entropy=0.3, seed=n) for n in range(2 * WINDOW)]) == []  # low from the start


@pytest.mark.parametrize("steps", [[None] * (3 * WINDOW), [step(seed=n) for n in range(3 * WINDOW)]])
def test_a_rising_loss_is_said_of_dense_models_too(steps):
    losses = np.concatenate([np.full(WINDOW, 3.0), np.full(2 * WINDOW, 3.3)])
    (said,) = watch(steps, losses)
    assert said.startswith(f"step {2 * WINDOW}: the loss has risen to 3.300 from 3.000")
    assert watch(steps, np.full(3 * WINDOW, 3.0)) == []


def test_micro_batches_of_one_step_are_looked_at_once():
    alerts = Alerts()
    for number in range(4 * WINDOW):  # two a step, and each step's routing known at its end
        trainer = SimpleNamespace(global_step=number // 4, is_global_zero=True, callback_metrics={})
        alerts.on_train_batch_end(trainer, SimpleNamespace(step_routing=None), None, None, number)
    assert alerts._looked_at == WINDOW - 1


def test_what_moebed_warns_of_is_a_note_of_one_line(monkeypatch):
    """Where the code that says it lies is of no use to who trains; of other packages it is."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    command_line.quiet()
    own, other = str(Path(command_line.__file__)), "/elsewhere/other.py"
    assert warnings.formatwarning("look", UserWarning, own, 7) == "note: look\n"
    assert "/elsewhere/other.py:7: UserWarning: look" in warnings.formatwarning("look", UserWarning, other, 7)
    assert "RuntimeWarning: look" in warnings.formatwarning("look", RuntimeWarning, own, 7)
