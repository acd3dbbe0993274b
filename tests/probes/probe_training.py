"""A tiny training run for the callback's tests: real module, made-up data, randomness in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from moebed.model.config import ModelConfig
from moebed.training.loggers import EventLog
from moebed.training.module import MoEModule

LENGTH = 12


class Windows(LightningDataModule):
    """Random tokens in two domains; the probes' text ends in padding."""

    domains = ("books", "mathematics")
    sequence_length = LENGTH

    def check_vocabulary(self, vocab_size: int) -> None:
        assert vocab_size == 32

    def train_dataloader(self) -> DataLoader:
        ids = torch.randint(32, (64, LENGTH + 1), generator=torch.Generator().manual_seed(3))
        rows = [
            {
                "input_ids": row[:-1],
                "labels": row[1:],
                "label_bytes": torch.ones(LENGTH, dtype=torch.int64),
                "domain": torch.tensor(number % 2),
            }
            for number, row in enumerate(ids)
        ]
        return DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def probe_batch(self, num_sequences: int) -> dict[str, torch.Tensor]:
        torch.rand(5)  # a careless datamodule: what it draws must not be missed by training
        ids = torch.randint(32, (num_sequences, LENGTH), generator=torch.Generator().manual_seed(4))
        labels = ids.roll(-1, 1)
        labels[0, 7:] = -100
        return {"input_ids": ids, "labels": labels, "domain": torch.arange(num_sequences) % 2}


class NoisyModule(MoEModule):
    """Draws from torch's random state in every step, as dropout or router noise would."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (0.5 + torch.rand(()))


def train(folder: Path, callbacks: list, steps: int, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    """Train for so many optimizer steps; returns the trainer, which still holds the module."""
    seed_everything(5, verbose=False)
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        moe_intermediate_size=8,
        max_position_embeddings=LENGTH,
        experts_backend="loop",
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=EventLog(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(NoisyModule(config), datamodule=Windows(), ckpt_path=ckpt_path)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trained parameters, copied."""
    return {key: value.clone() for key, value in trainer.lightning_module.state_dict().items()}
