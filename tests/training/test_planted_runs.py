"""Runs on planted text: their floor is written down, and routers that are told domains are told them all the way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moebed.cli import main
from moebed.data.planted import PlantedConfig, PlantedLanguage
from moebed.model.routers.document_pool import DocumentPool
from tests.small_run import probing, small_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[2]

LANGUAGE = {"domains": 2, "symbols": 6, "branching": 2, "mean_document": 40}


def recipe(folder, switch=0.0, router="oracle", **sections):
    """A run of a few steps; its only prompt is long enough to be sampled from, were the router one that can."""
    sources = [
        {"name": f"d{domain}", "kind": "planted", "max_bytes": 20_000, "planted": {**LANGUAGE, "domain": domain}}
        for domain in range(2)
    ]
    if switch:
        sources = [{**sources[0], "planted": {**LANGUAGE, "switch": switch}}]
    options = {"num_domains": 2} if router.startswith("oracle") else {}
    config = {
        "vocab_size": 13,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "router": router,
        "router_options": options,
    }
    trainer = {"callbacks": probing(2, 8, probes=["domain_purity"]), **sections.pop("trainer", {})}
    content = small_recipe(
        folder,
        config=config | sections.pop("config", {}),
        data={"sources": sources, "tokenizer": {"kind": "symbols"}, "batch_size": 4},
        trainer=trainer,
        **sections,
    )
    return write_recipe(folder, content)


@pytest.mark.parametrize("switch", [0.0, 0.2])
def test_a_run_knows_the_floor_and_its_oracle_the_domains(switch, tmp_path):
    assert main(["fit", "--config", str(recipe(tmp_path, switch))]) == 0
    numbers = json.loads((tmp_path / "run" / "run_summary.json").read_text(encoding="utf-8"))
    language = PlantedLanguage(PlantedConfig(**LANGUAGE, switch=switch))
    assert numbers["planted/entropy_rate/d0"] == pytest.approx(language.entropy_rate)
    assert numbers["planted/floor/d0"] == pytest.approx(language.floor)
    assert numbers["val/nats_over_floor"] == pytest.approx(numbers["val/loss"] - numbers["planted/floor"])
    assert numbers["val/nats_over_floor"] > 0
    assert ("val/nats_over_floor/d1" in numbers) == (not switch)
    with np.load(tmp_path / "run" / "results" / "domain_purity.npz") as arrays:
        assert [float(arrays[f"{key}/0"]) for key in ("purity", "nmi", "matched")] == pytest.approx([1, 1, 1])


def test_validation_and_prediction_know_the_domains(tmp_path, capsys):
    path = recipe(tmp_path)
    assert main(["fit", "--config", str(path)]) == 0
    numbers = json.loads((tmp_path / "run" / "run_summary.json").read_text(encoding="utf-8"))
    last = ["--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt")]
    out = ["--trainer.default_root_dir", str(tmp_path / "predicted")]
    assert main(["predict", "--config", str(path), *last, *out]) == 0
    with np.load(tmp_path / "predicted" / "token_losses.npz") as arrays:
        kept = arrays["labels"] != -100
        assert arrays["nats"][kept].mean() == pytest.approx(numbers["val/loss"], rel=1e-5)


def test_a_run_continues_bit_for_bit(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        steps = [[]] if name == "whole" else [["--trainer.max_steps", "2"], ["--ckpt_path", "last"]]
        for more in steps:
            assert main(["fit", "--config", str(recipe(tmp_path / name, 0.2)), *more]) == 0
    states = [
        torch.load(tmp_path / name / "run" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("whole", "parts")
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_another_number_of_domains_is_refused(tmp_path, capsys):
    path = recipe(tmp_path, config={"router_options": {"num_domains": 4}})
    assert main(["fit", "--config", str(path)]) == 2
    assert "router_options.num_domains is 4, but the data have 2 domains; give 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_probed_on_text_of_other_domains(tmp_path, capsys):
    assert main(["fit", "--config", str(recipe(tmp_path))]) == 0
    np.save(tmp_path / "ids.npy", np.arange(12)[None])
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    where = ["--out", str(tmp_path / "out"), "--input-ids", str(tmp_path / "ids.npy"), "--probes", "balance"]
    code = main(["probe", checkpoint, *where])
    said = capsys.readouterr()
    assert "needs the domain of each token, which is known in training and validation only" in said.err + said.out
    assert code == 2


def test_documents_are_told_in_training_alone_and_a_window_holds_several(tmp_path, monkeypatch):
    told, pools = [], DocumentPool.pools
    monkeypatch.setattr(DocumentPool, "pools", lambda *given: told.append(given[2]) or pools(*given))
    path = recipe(tmp_path, router="document_pool", config={"router_aux_loss_scope": "window"})
    more = ["--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    assert main(["fit", "--config", str(path), *more]) == 0
    assert len(told) == 2 * 2 * (2 + 2)  # steps, layers, micro-batches: once to look ahead and once to train
    documents = torch.stack(told).view(-1, 4, 32)  # (calls, B, S)
    assert torch.equal(documents[:, :, 0], torch.arange(0, 4 * 32, 32).expand(len(told), -1))
    steps = documents.diff(dim=2)
    assert set(steps.unique().tolist()) == {0, 1}
    assert torch.equal(documents[0], documents[4])  # what was looked at ahead is what is trained on
    assert torch.equal(documents[2], documents[6])
    assert not torch.equal(documents[0], documents[2])


def test_it_is_said_where_a_run_begins(tmp_path):
    with pytest.warns(UserWarning, match="router oracle is told the domain of each token: it measures other routers"):
        main(["fit", "--config", str(recipe(tmp_path, trainer={"max_steps": 1}))])


def test_the_recipe_of_planted_text_is_of_one_language():
    """Its four domains, by an anchor of YAML."""
    content = yaml.safe_load((ROOT / "recipes" / "tiny_planted.yaml").read_text(encoding="utf-8"))
    planted = [source["planted"] for source in content["data"]["sources"]]
    assert [one.pop("domain") for one in planted] == [0, 1, 2, 3]
    assert all(one == planted[0] for one in planted)
