"""What the tests of streamed checkpoints share: texts, models, counted reads, a pass that is stopped and goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.cli import main
from moebed.views.layer import ProbeText
from probes.registry import PROBES

CASES = {
    "mixtral": {"num_experts_per_tok": 2},
    "fp32": {"dtype": torch.float32, "num_experts_per_tok": 3},
    "shared, a dense layer": {"family": "deepseek", "num_experts": [0, 6, 6], "num_shared_experts": 2,
                              "norm_topk_prob": False, "num_experts_per_tok": 2},
    "a gated shared expert": {"family": "qwen2_moe", "num_shared_experts": 1, "shared_expert_gate": True},
    "every other layer, normalised heads": {"family": "qwen3_moe", "num_experts": [0, 12, 0], "qk_norm": "head"},
    "one expert": {"num_experts": 1},
    "tied": {"family": "grok-1", "tie_word_embeddings": True, "post_norms": True, "norm_topk_prob": False,
             "attn_logit_softcapping": 30.0, "embedding_multiplier": 3.0, "logits_multiplier": 0.5,
             "attention_multiplier": 0.2, "hidden_act": "gelu", "num_experts_per_tok": 2},
    "no experts": {"family": "mistral", "num_experts": 0},
}  # fmt: skip


def make_text(*lengths, vocab_size=40):
    torch.manual_seed(5)
    ids = torch.randint(vocab_size, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return ProbeText(ids.masked_fill(~mask, 0), mask, torch.arange(len(lengths)) % 2, ("one", "two"))


class Reads(Counter):
    """How often each row of each tensor was read."""

    def __init__(self, monkeypatch):
        super().__init__()
        original = Checkpoint.read_into

        def read_into(checkpoint, part, out):
            self.update((part.name, row) for row in range(part.first, part.first + part.rows))
            original(checkpoint, part, out)

        monkeypatch.setattr(Checkpoint, "read_into", read_into)


def stopped_and_continued(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stops: str, *options: str
) -> tuple[Callable[[str], int], Reads]:
    """A pass into ``whole``; and one into ``out`` that ends while this probe looks at layer 2, and goes on.

    Returns:
        Probes into a folder by its name once more, and what was read when it went on.
    """
    write(folder / "model", num_experts_per_tok=2)
    np.save(folder / "ids.npy", make_text(20, 20).input_ids.numpy())
    monkeypatch.setattr("probes.running.callback.ProbeCallback._draw", lambda *arguments, **options: None)
    monkeypatch.setattr("probes.report.page.write_report", lambda folders, path: path)

    def probe(out: str) -> int:
        asked = ["probe", str(folder / "model"), "--out", str(folder / out), "--input-ids", str(folder / "ids.npy")]
        return main([*asked, *options])

    assert probe("whole") == 0
    original = PROBES[stops].update

    def stop_at_layer_2(self, view):
        if view.index == 2:
            raise KeyboardInterrupt
        original(self, view)

    with monkeypatch.context() as patched:
        patched.setattr(PROBES[stops], "update", stop_at_layer_2)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            probe("out")
    reads = Reads(monkeypatch)
    assert probe("out") == 0
    return probe, reads
