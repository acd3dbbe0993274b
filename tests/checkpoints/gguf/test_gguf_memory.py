"""A GGUF file of 26 GB through the probes of weights, in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from large_gguf import LAYERS, write_large_gguf

from moebed.checkpoints import Checkpoint
from moebed.views.layer import Need
from probes.registry import PROBES

MEASURE = Path(__file__).parents[1] / "pretrained" / "measure_memory.py"
# Matching takes some nine minutes of a core a layer at this size, whatever the file (probes/README.md, what probing
# costs); what it takes in memory is `moebed bench probe`'s to measure.
ALL = [name for name, probe in PROBES.items() if probe.needs <= {Need.WEIGHTS} and name != "neuron_matching"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_weight_probes_of_26_gb_stay_under_2_and_a_half_gb(tmp_path):
    """Of 32 layers one is looked at, which is as large as the others: memory does not grow with layers
    (``test_pretrained_memory.py``). The others are holes in the file."""
    path, out = tmp_path / "mixtral.gguf", tmp_path / "out"
    assert write_large_gguf(path, [LAYERS - 1]) > 26e9
    assert path.stat().st_blocks * 512 < 1e9
    assert Checkpoint.open(path).config.num_hidden_layers == LAYERS
    command = [sys.executable, MEASURE, path, "--out", out, "--memory-budget", "2GiB", "--layers", str(LAYERS - 1)]
    done = subprocess.run([*command, "--probes", ",".join(ALL)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["exit"] == 0
    assert found["peak_resident"] < 2.5e9
    assert {path.stem for path in (out / "results").glob("*.npz")} == set(ALL)
