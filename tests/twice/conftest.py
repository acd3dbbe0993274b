"""Tiny models and runs for commands that are given twice."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from moebed.checkpoints import write_checkpoint
from moebed.cli import main
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from tests.small_run import probing, small_recipe, write_recipe

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}


def write_model(folder: Path, seed: int = 3, **changes) -> Decoder:
    """A random Mixtral of three layers."""
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig(**{**SIZES, **changes})).eval()
    write_checkpoint(decoder, "mixtral", folder, torch.float32)
    return decoder


def write_ids(path: Path, seed: int = 0) -> Path:
    """Two sequences of 120 ids, so that some are seen often."""
    np.save(path, np.random.default_rng(seed).integers(0, 40, (2, 120)))
    return path


def kept_bytes(out: Path) -> dict[str, bytes]:
    """All arrays and the summary that a probing left."""
    paths = [*sorted((out / "results").glob("*.npz")), out / "summary.json"]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures and the report are left out: they take most of the time and are made from the arrays."""
    monkeypatch.setattr("probes.running.callback.ProbeCallback._draw", lambda *arguments, **options: None)
    monkeypatch.setattr("probes.report.page.write_report", lambda folders, path: path)
    monkeypatch.setattr("probes.running.run_folder.read_curves", lambda folder: {})


@pytest.fixture(scope="session")
def run_recipe(tmp_path_factory) -> Path:
    """A recipe of 4 steps on made-up words."""
    folder = tmp_path_factory.mktemp("recipe")
    draw = random.Random(5)
    words = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(2)) for _ in range(60)]
    sentences = [" ".join(draw.choice(words) for _ in range(60)) + ".\n\n" for _ in range(200)]
    content = small_recipe(
        folder,
        "".join(sentences),
        trainer={"precision": "32-true", "callbacks": probing(2, probes=["balance", "saturation"])},
        config={"vocab_size": 320},
        model={"optimizer": {"learning_rate": 3.0e-3, "warmup_steps": 2}},
        data={"batch_size": 4, "max_validation_windows": 8, "validation_fraction": 0.3},
    )
    del content["trainer"]["default_root_dir"]
    return write_recipe(folder, content)


def fit(recipe: Path, folder: Path, *options: str, command: str = "fit") -> int:
    """Run one of the four training commands."""
    given = [command, "--config", str(recipe), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    return main([*given, *options])
