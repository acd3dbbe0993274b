"""A run cut and resumed by Lightning sees the very batches that an uncut run sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moebed.data.datamodule import TextDataModule
from moebed.data.loader import Batch
from moebed.data.sources import SourceConfig


class Recorder(LightningModule):
    """Trains one number and keeps every batch it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch)
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch["labels"].shape[0] == 4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def _run(data: TextDataModule, folder: Path, steps: int, resume: Path | None = None, **options: Any) -> list[Batch]:
    trainer = Trainer(
        max_steps=steps,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    model = Recorder()
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    assert trainer.global_step == steps
    return model.trained


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "val_check_interval": 5, "check_val_every_n_epoch": None},
        {"val_check_interval": 4, "limit_val_batches": 2, "num_sanity_val_steps": 2},
        {"limit_train_batches": 7},
    ],
    ids=["plain", "accumulate", "validate", "epochs"],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_resume_is_exact(
    make_data: Callable, streaming_stories: SourceConfig, tmp_path: Path, options: dict, streaming: bool
) -> None:
    sources = {"sources": [streaming_stories, make_data().sources[0]]} if streaming else {}
    whole = _run(make_data(**sources), tmp_path / "whole", 20, **options)
    first = _run(make_data(**sources), tmp_path / "first", 9, **options)
    rest = _run(make_data(**sources), tmp_path / "rest", 20, resume=tmp_path / "first" / "step=9.ckpt", **options)
    assert len(whole) == 20 * options.get("accumulate_grad_batches", 1)
    assert len(first) + len(rest) == len(whole)
    for expected, batch in zip(whole, first + rest, strict=True):
        assert all(torch.equal(expected[key], batch[key]) for key in expected)
    assert len({batch["labels"].sum().item() for batch in whole}) > len(whole) // 2
