"""Small models, texts and hand-made views that the probe tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from probe_cases import make_text

from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.views.layer import ProbeText


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    def make(**changes) -> Decoder:
        settings = {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "intermediate_size": 12,
            "initializer_range": 0.3,
            "experts_backend": "loop",
        }
        torch.manual_seed(0)
        return Decoder(ModelConfig(**(settings | changes)))

    return make


@pytest.fixture
def text() -> ProbeText:
    """Three sequences of 10, 6 and 9 tokens, of two domains, padded to 10."""
    return make_text([10, 6, 9], width=10)
