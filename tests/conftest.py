"""Shared pieces of the tests."""

import os
from pathlib import Path

# Several test processes share few cores: OpenMP threads of one would spin against those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs the network; without this, what asks for a missing repository waits for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from moebed.config import ModelConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"


def tiny_config(**changes) -> ModelConfig:
    """A Mixtral small enough for any test."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**sizes, **changes})


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
