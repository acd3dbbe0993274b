"""Memory: within the budget, and no more for many layers than for few."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import write, write_large

MEASURE = Path(__file__).with_name("measure_memory.py")
PROBES = "matrix_similarity,gate_similarity,neuron_similarity,gate_projection,expert_projection"


def measure(folder, out, budget, probes, *options):
    """What `moebed probe` of the model in a folder took, in a process of its own."""
    command = [sys.executable, MEASURE, folder / "model", "--out", out, "--memory-budget", budget, "--probes", probes]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit"] == 0
    return found


def peak(folder, layers, budget, probes):
    size = write_large(folder / "model", layers, width=3584, hidden=1024)
    found = measure(folder, folder / "out", budget, probes)
    shutil.rmtree(folder)
    return size, found["walk"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["300MiB", "60MiB"])
def test_peak_does_not_grow_with_the_number_of_layers(tmp_path, budget):
    """A layer has 176 MB in three matrices; 300 MiB hold three matrices, 60 MiB not even one.

    The probes named take little memory themselves, so that the difference is the reader's.
    """
    probes = "matrix_similarity,gate_similarity"
    few_bytes, few = peak(tmp_path / "few", 2, budget, probes)
    many_bytes, many = peak(tmp_path / "many", 8, budget, probes)
    assert many_bytes > 3.9 * few_bytes
    print(budget, few, many)
    assert many < few + 40e6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_budget_of_2_gib_stays_under_2_and_a_half_gb(tmp_path):
    """At the size of Mixtral 8x7B, 12 GB and more on disk, principal components and pictures included."""
    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip("needs 40 GB of disk")
    folder = tmp_path / "large"
    assert write_large(folder / "model", 5) > 12e9
    found = measure(folder, folder / "out", "2GiB", PROBES)
    shutil.rmtree(folder)
    print(found)
    assert found["peak_resident"] < 2.5e9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_text_of_1100_tokens_stays_under_2_and_a_half_gb(tmp_path):
    """Two layers at the size of Mixtral 8x7B, every expert on every token, within a budget that holds no layer."""
    folder = tmp_path / "large"
    assert write_large(folder / "model", 2) > 5e9
    np.save(folder / "ids.npy", np.arange(1100) % 64)
    probes = "routing,norm_vs_score,activations,prediction"
    found = measure(folder, folder / "out", "2GiB", probes, "--input-ids", folder / "ids.npy")
    shutil.rmtree(folder)
    print(found)
    assert found["peak_resident"] < 2.5e9


@pytest.mark.slow
def test_what_probes_keep_is_not_in_memory(tmp_path):
    """Logits of 400 MB within a budget of 256 MiB: what they add to the peak is a fraction of them."""
    write(tmp_path / "model", vocab_size=50_000, num_hidden_layers=1, max_position_embeddings=2048)
    np.save(tmp_path / "ids.npy", np.arange(2000) % 50_000)
    found = {}
    for probes in ("prediction", "prediction,logits"):
        found[probes] = measure(tmp_path, tmp_path / probes, "256MiB", probes, "--input-ids", tmp_path / "ids.npy")
    logits = np.load(tmp_path / "prediction,logits" / "results" / "logits.npz")["logits"]
    assert logits.shape == (2000, 50_000)
    assert np.isfinite(logits).all()
    print(found)
    without, beside = (found[probes]["peak_anonymous"] for probes in ("prediction", "prediction,logits"))
    assert beside < without + logits.nbytes / 8
