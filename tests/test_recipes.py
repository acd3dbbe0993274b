"""The recipes that come with the project: each is read whole, and trains."""

import json

import pytest
import torch
import yaml

from moebed.cli import main
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters
from moebed.study.resolving import resolve
from probes import ProbeCallback
from tests.small_run import made_up_text
from tests.test_architecture import ROOT

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith("probe_"))


def _at_the_end_alone(probe):
    return lambda callback, trainer, module, draw=False: probe(callback, trainer, module, draw) if draw else None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    """At full size on the meta device, every setting of it read as `moebed fit` reads them."""
    config = ModelConfig.from_dict(yaml.safe_load(path.read_text())["model"]["config"])
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count_parameters(config)[0]
    assert resolve(["--config", str(path)]).config == config


# One of each kind of recipe; the others differ by the family that their model is of.
QUICK = ("demo", "domains", "study_planted", "tiny_hyper", "tiny_mixtral", "upcycled")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES],
)
def test_every_recipe_takes_a_step(path, tmp_path, monkeypatch):
    """One real step, a GPU-sized model narrowed for it, and probed.

    Pictures, the report and what is probed before the step are those of one recipe alone.
    """
    if path.stem != "demo":
        monkeypatch.setattr(ProbeCallback, "_draw", lambda *arguments, **options: None)
        monkeypatch.setattr(ProbeCallback, "_probe", _at_the_end_alone(ProbeCallback._probe))
        monkeypatch.setattr("probes.report.page.write_report", lambda folders, out: out)
    content = yaml.safe_load(path.read_text())
    config = ModelConfig.from_dict(content["model"]["config"])
    text = "".join(f"{part}\n\n{made_up_text()}" for part in range(12))  # for 128 windows to probe
    (tmp_path / "text.txt").write_text(text)
    changes = {
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
        "trainer.strategy": "auto",
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.accumulate_grad_batches": 1,
        "trainer.enable_progress_bar": "false",
        "samples.new_tokens": 2,
        "model.compile": "false",
        "data.sources": json.dumps([{"name": "text", "kind": "files", "path": str(tmp_path / "text.txt")}]),
        "data.tokenizer": json.dumps({"kind": "bpe", "vocab_size": 400}),
        "data.sequence_length": 32,
        "data.batch_size": max(2, config.expert_ranks),
        "data.max_validation_windows": 2,
        "data.cache_dir": tmp_path / "cache",
    }
    if content["data"].get("tokenizer", {}).get("kind") == "symbols":  # planted text, which is made up on the spot
        del changes["data.tokenizer"]
        changes["data.sources"] = json.dumps([source | {"max_bytes": 200_000} for source in content["data"]["sources"]])
    if config.hidden_size > 256:
        changes |= {"model.config.hidden_size": 48, "model.config.moe_intermediate_size": 32}
    arguments = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    assert main(["fit", "--config", str(path), *arguments]) == 0
    assert json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert (tmp_path / "run" / "report.html").is_file() == (path.stem == "demo")
