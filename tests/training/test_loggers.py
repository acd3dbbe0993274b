"""What each logger takes of a run, read back: numbers, sentences and pictures, from files and without a network."""

import io
import json

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from PIL import Image

from moebed.training.loggers import MLFLOW_AT_ONCE, log_numbers, log_picture, log_texts, takes_text

NUMBERS = {f"balance/q{number}": number / 7 for number in range(MLFLOW_AT_ONCE + 1)}
TEXTS = {"answers/1_norm": "**Does it?** It does.", "balance/cv": "Half."}


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def log_all(logger):
    trainer = Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    log_numbers(trainer, NUMBERS, 7)
    log_texts(trainer, "sentences", TEXTS, 7)
    log_picture(trainer, "balance/figures/load", picture(), 7)
    logger.finalize("success")


def test_csv_has_a_row_a_step_and_no_place_for_text(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    log_all(logger)
    header, row = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    found = dict(zip(header.split(","), map(float, row.split(",")), strict=True))
    assert found == pytest.approx(NUMBERS | {"step": 7})
    assert not takes_text([logger])


def test_mlflow_has_numbers_sentences_and_pictures(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    logger = MLFlowLogger(tracking_uri=uri)
    log_all(logger)
    client = mlflow.tracking.MlflowClient(uri)
    run = client.get_run(logger.run_id)
    assert run.data.metrics == pytest.approx(NUMBERS)
    assert [metric.step for metric in client.get_metric_history(logger.run_id, "balance/q3")] == [7]
    said = client.download_artifacts(logger.run_id, "sentences/step_00000007.md", str(tmp_path))
    with open(said, encoding="utf-8") as file:
        assert file.read() == "## answers/1_norm\n\n**Does it?** It does.\n\n## balance/cv\n\nHalf."
    shown = client.download_artifacts(logger.run_id, "pictures/balance/figures/load/step_00000007.png", str(tmp_path))
    assert Image.open(shown).getpixel((3, 3))[:3] == (200, 10, 20)


def test_wandb_has_numbers_sentences_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="moebed", save_dir=tmp_path, offline=True)
    run = logger.experiment
    log_all(logger)
    summary = {key: run.summary[key] for key in ("balance/q3", "sentences", "balance/figures/load")}
    run.finish()
    assert summary["balance/q3"] == pytest.approx(3 / 7)
    (table,) = tmp_path.rglob("media/table/*.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content["columns"] == ["step", "what", "text"]
    assert content["data"] == [["7", what, text] for what, text in TEXTS.items()]
    (image,) = tmp_path.rglob("media/images/**/*.png")
    assert Image.open(image).getpixel((3, 3))[:3] == (200, 10, 20)
