"""Attention without a gradient takes the queries in blocks, so that its logits stay small."""

import pytest
import torch

from moebed.model import attention
from moebed.model.attention import Attention
from moebed.model.rope import RotaryEmbedding
from tests.conftest import tiny_config

CASES = {
    "math": {"attention_backend": "math"},
    "a soft cap": {"attn_logit_softcapping": 20.0},
    "sinks": {"attention_sinks": True},
    "a window": {"attention_backend": "math", "sliding_window": 5},
    "a window, sdpa": {"attention_backend": "sdpa", "sliding_window": 5},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("limit", [1, 40, 1000])
def test_blocks_give_what_the_whole_gives(case, limit, monkeypatch):
    torch.manual_seed(0)
    config = tiny_config(**case)
    layer = Attention(config)
    x, rope = torch.randn(2, 23, config.hidden_size), RotaryEmbedding(config)(0, 23, torch.device("cpu"))
    whole = layer(x, rope).detach()
    largest = []
    softmax = torch.Tensor.softmax

    def noted(self, *arguments, **options):
        largest.append(self.numel())
        return softmax(self, *arguments, **options)

    monkeypatch.setattr(attention, "_LOGITS_AT_A_TIME", limit)
    monkeypatch.setattr(torch.Tensor, "softmax", noted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, rope), whole)
    assert all(size <= max(limit, 24) for size in largest)  # a sink is one more
    assert largest or case.get("attention_backend") == "sdpa"
