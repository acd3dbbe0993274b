"""Streaming: memory for a layer's FFN and an expert, however many layers and experts there are."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from moebed.checkpoints.families import FAMILIES, KeyMap
from moebed.checkpoints.writer import FolderWriter
from moebed.model.config import ModelConfig

# Prints the exit code and the most memory that was resident at once, in bytes.
MEASURE = """
import json, resource, sys
import torch
import moebed.upcycling.upcycle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from moebed.cli import main
code = main(sys.argv[1:])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([code, 1024 * before, 1024 * after]))
"""


def write_large(folder, layers, hidden=1024, width=3584, vocabulary=8192):
    """Write a Mistral of random bf16 weights, a band at a time; returns its bytes."""
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_experts=0,
        intermediate_size=width,
    )
    family = FAMILIES["mistral"]
    writer = FolderWriter(KeyMap(family, config), family.write_config(config), torch.bfloat16)
    pool = torch.randn(1 << 22).bfloat16() * 0.02

    def content(name, placed):
        left = placed.part.rows * placed.part.columns
        while left:
            yield pool[: min(left, len(pool))]
            left -= min(left, len(pool))

    writer.write(folder, content)
    return writer.total


def upcycle(folder, method, *options):
    """Upcycle in a process of its own; returns the memory it had before and at most."""
    arguments = ["upcycle", str(folder / "dense"), "--out", str(folder / "moe"), "--method", method, *options]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    code, before, peak = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return before, peak


@pytest.mark.slow
def test_memory_of_text_does_not_grow_with_layers_or_experts(tmp_path):
    """Importance of streamed gradients and six first losses: a layer of both models in float32, whatever the depth."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(8192, size=(8, 256)))
    peaks = []
    for layers, experts in ((1, 4), (6, 16)):
        folder = tmp_path / f"{layers}"
        write_large(folder / "dense", layers)
        options = ["--by", "inner", "--input-ids", str(tmp_path / "ids.npy"), "--num-experts", str(experts)]
        before, peak = upcycle(folder, "partition", *options, "--memory-budget", "600MB")
        peaks.append(peak - before)
    print(peaks)
    assert peaks[1] < peaks[0] + 150e6
    assert peaks[1] < 700e6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["copy", "noise", "drop", "split", "cluster", "partition", "scratch"])
def test_memory_does_not_grow_with_layers_or_experts(tmp_path, method):
    """A layer has 3 matrices of 7.3 MB; the largest model written has 2.3 GB."""
    peaks = []
    for layers, experts in ((1, 4), (6, 16)):
        folder = tmp_path / f"{layers}"
        write_large(folder / "dense", layers)
        before, peak = upcycle(folder, method, "--num-experts", str(experts))
        peaks.append(peak - before)
    print(method, peaks)
    # The allocator's fragments vary by tens of megabytes; a layer's experts more would be 350 MB.
    assert peaks[1] < peaks[0] + 150e6
    # One layer as stored, and a few float32 copies of one matrix.
    assert peaks[1] < 22e6 + 12 * 14.7e6 + 80e6
