"""Runs whose domains' weights change: as the rule says, logged, and the same through stops and skipped steps."""

import json

import numpy as np
import pytest
import torch

from moebed.data.mixing_rules import RULES, changed_weights, excess_loss, gate_load_distance
from moebed.model.losses import domain_counts
from moebed.model.routing import Routing
from moebed.training.step_losses import StepLosses
from tests.small_run import made_up_text, small_recipe, write_recipe
from tests.training.saving_runs import ACCUMULATE, call, callback, last, require_same_model, scalars

RULE = {
    "excess_loss": {"rule": "excess_loss", "reference": {"a": 4.0, "b": 5.0}, "step_size": 2.0},
    "gate_load": {"rule": "gate_load", "every_n_steps": 2},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, _without_reports):
    """Makes the recipe of a run of a second on two domains, with a rule."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "b.txt").write_text("\n\n".join(f"{i} + {i} = {2 * i}; " * 40 for i in range(200)), encoding="utf-8")

    def make(mixing, **sections):
        content = small_recipe(
            folder,
            made_up_text(240),
            trainer={"precision": "32-true", "max_steps": 8, "val_check_interval": 3, **sections.pop("trainer", {})},
            checkpoint={"every_n_train_steps": 1000},
            samples={"prompt_tokens": 2, "new_tokens": 1},
            config={"hidden_size": 16, "num_attention_heads": 2, "moe_intermediate_size": 16, **sections},
            model={"optimizer": {"warmup_steps": 2, "learning_rate": 0.01}},
            data={"sequence_length": 16, "max_validation_windows": 2, "mixing": mixing},
        )
        content["data"] |= {"batch_size": 4, "validation_fraction": 0.25}
        content["data"]["sources"] = [
            {"name": "a", "kind": "files", "path": str(folder / "text.txt")},
            {"name": "b", "kind": "files", "path": str(folder / "b.txt")},
        ]
        del content["trainer"]["default_root_dir"]
        return write_recipe(folder, content)

    return make


def _weights(folder):
    """Of each domain, by step."""
    return {name: scalars(folder, f"train/weight/{name}") for name in "ab"}


def _state(folder):
    return last(folder)["TextDataModule"]


def test_the_weights_follow_the_validation_losses(mixed, tmp_path):
    """What is logged of a step is what its samples were drawn by; looking on, as at the end, changes nothing."""
    assert call(mixed(RULE["excess_loss"] | {"start": "uniform", "smoothing": 0.1}), tmp_path / "run") == 0
    losses = [dict(scalars(tmp_path / "run", f"val/loss/{name}")) for name in "ab"]
    found = _weights(tmp_path / "run")
    assert sorted(losses[0])[:2] == [2, 5]  # logged at the step before
    wanted = [np.array([0.5, 0.5])]
    for step in (2, 5):
        gain = excess_loss(np.array([domain[step] for domain in losses]), np.array([4.0, 5.0]), False)
        wanted.append(changed_weights(wanted[-1], gain, 2.0, 0.1))
    for index, name in enumerate("ab"):
        assert [step for step, _ in found[name]] == list(range(8))
        logged = [value for _, value in found[name]]
        assert logged == pytest.approx([wanted[step // 3][index] for step in range(8)], rel=1e-5)
    assert abs(wanted[1] - 0.5).max() > 0.05
    np.testing.assert_allclose(_state(tmp_path / "run")["train"]["draws"]["weights"], wanted[2], rtol=1e-5)
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert {"val/loss/a", "val/loss/b", "val/bits_per_byte/a", "train/weight/a"} <= set(summary)


def test_the_weights_follow_the_gate_load(mixed, tmp_path, monkeypatch):
    """Of the last layer with experts, over the steps since the last change."""
    kept = []
    add = RULES["gate_load"].add
    monkeypatch.setattr(
        RULES["gate_load"], "add", lambda rule, counts: kept.append(counts.clone()) or add(rule, counts)
    )
    assert (
        call(
            mixed(RULE["gate_load"], num_experts=[4, 0, 3], num_hidden_layers=3, intermediate_size=32),
            tmp_path / "run",
            *ACCUMULATE,
        )
        == 0
    )
    assert len(kept) == 8 * 4
    assert all(counts.shape == (2, 3) and counts.sum() == 4 * 16 * 2 for counts in kept)
    found = np.array([[value for _, value in values] for values in _weights(tmp_path / "run").values()]).T
    for update in range(3):
        counts = sum(kept[8 * update : 8 * update + 8]).double().numpy()
        wanted = changed_weights(found[2 * update], gate_load_distance(counts), 10.0, 0.05)
        np.testing.assert_allclose(found[2 * update + 2], wanted, rtol=1e-5)
        np.testing.assert_array_equal(found[2 * update + 1], found[2 * update])
    # With two domains both are as far from each other: only what is mixed in moves the weights.
    assert abs(found[0] - found[-1]).max() > 1e-3


# Between two changes; at a step that is validated and counted to the end.
@pytest.mark.parametrize("stop", [pytest.param(5, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("rule", RULE)
def test_a_resumed_run_is_the_uninterrupted_one(rule, stop, mixed, tmp_path):
    recipe, stopping = mixed(RULE[rule]), callback("Stop", step=stop)
    assert call(recipe, tmp_path / "whole", *ACCUMULATE) == 0
    options = ["--trainer.callbacks", json.dumps(stopping)]
    assert call(recipe, tmp_path / "parts", *ACCUMULATE, *options) == 0
    assert last(tmp_path / "parts")["global_step"] == stop
    assert call(recipe, tmp_path / "parts", *ACCUMULATE, "--ckpt_path", "last") == 0
    require_same_model(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert _state(tmp_path / "whole") == _state(tmp_path / "parts")
    assert "draws" in _state(tmp_path / "whole")["train"]
    # Of the log, the values: a run that ended where it validated numbers its later steps one too high.
    whole, parts = ([value for _, value in _weights(tmp_path / name)["a"]] for name in ("whole", "parts"))
    assert whole == parts


def test_a_step_that_is_skipped_is_not_counted(mixed, tmp_path, monkeypatch):
    terms = StepLosses.terms

    def poisoned(losses, *batch):
        found = terms(losses, *batch)
        return (
            found._replace(nats=found.nats * float("nan")) if losses.decoder.routers[0].optimizer_step == 1 else found
        )

    monkeypatch.setattr(StepLosses, "terms", poisoned)
    options = ["--model.on_nan", "skip", "--trainer.max_steps", "3"]
    assert call(mixed({"rule": "gate_load", "every_n_steps": 9}), tmp_path / "run", *options) == 0
    kept = _state(tmp_path / "run")["mixing"]
    assert kept["steps"] == 2
    assert torch.tensor(kept["counts"]).sum() == 2 * 4 * 16 * 2


def test_a_dense_parent_gives_the_reference(mixed, tmp_path, capsys):
    dense = mixed({"start": "uniform"}, num_experts=0, intermediate_size=32)
    assert call(dense, tmp_path / "dense") == 0
    assert "draws" not in _state(tmp_path / "dense")["train"]
    numbers = json.loads((tmp_path / "dense" / "run_summary.json").read_text())
    recipe = mixed({"rule": "excess_loss", "reference": str(tmp_path / "dense")})
    assert call(recipe, tmp_path / "moe") == 0
    assert _state(tmp_path / "moe")["mixing"]["reference"] == [numbers["val/loss/a"], numbers["val/loss/b"]]
    capsys.readouterr()
    tokenizer = ["--data.tokenizer", '{"kind": "bpe", "vocab_size": 260}']
    assert call(recipe, tmp_path / "other", *tokenizer) == 2
    assert "has another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("mixing", "sections", "said"),
    [
        (RULE["gate_load"], {"num_experts": 0, "intermediate_size": 32}, "goes by experts, and the model has none"),
        (
            RULE["excess_loss"],
            {"trainer": {"val_check_interval": "00:00:05:00"}},
            "val_check_interval to a number of steps",
        ),
        (RULE["excess_loss"], {"trainer": {"limit_val_batches": 2}}, "set data.max_validation_windows instead"),
        ({"rule": "excess_loss", "reference": {"a": 1.0}}, {}, "no finite loss for the domain 'b'"),
        ({"start": "llama"}, {}, "has no weight for the domain 'a'"),
        ({"rule": "excess"}, {}, "data.mixing.rule"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(mixing, sections, said, mixed, tmp_path, capsys):
    assert call(mixed(mixing, **sections), tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_domain_counts_are_those_of_a_loop():
    index = torch.tensor([[0, 1], [2, 0], [1, 0], [1, 2], [2, 1], [0, 2]])
    weight = torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.5, 0.5], [1.0, 0.0], [0.6, 0.4], [0.9, 0.1]])
    routing = Routing(torch.zeros(6, 3), torch.full((6, 3), 1 / 3), index, weight, ragged=True)
    mask, domain = torch.tensor([True, True, False, True, True, True]), torch.tensor([1, 0])  # two sequences of three
    wanted = torch.zeros(2, 3)
    for token in range(6):
        for expert, share in zip(index[token].tolist(), weight[token].tolist(), strict=True):
            wanted[domain[token // 3], expert] += mask[token] and share > 0
    assert torch.equal(domain_counts(routing, mask, domain, 2), wanted)
    assert domain_counts(routing._replace(ragged=False), mask, domain, 2).sum() == 10
