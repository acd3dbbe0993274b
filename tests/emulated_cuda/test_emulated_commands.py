"""What a person with a GPU asks for, on an emulated one: models of others, precisions, runs that change devices."""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import ORACLES
from tests.emulated_cuda import models, probe_waits
from tests.emulated_cuda.test_emulated_cuda import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the device"),
]

MOST_OF_AN_EXPERT = 21  # waits of all probes for an expert's three matrices; their decompositions take most


def test_every_family_and_every_class_of_transformers_is_probed_as_on_a_cpu():
    lines = python("-m", "tests.emulated_cuda.models").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [each["case"] for each in found] == list(models.CASES)
    assert not [each for each in found if "error" in each]
    # One activation of a few hundred that lies within rounding of a threshold is counted on either side of it.
    off = {each["case"]: [key for key in each["arrays"] if "frac_above" not in key] for each in found}
    assert not any(off.values()), off


def test_probes_wait_by_layer_and_expert_and_never_by_token():
    found = json.loads(python("-m", "tests.emulated_cuda.probe_waits").splitlines()[-1])
    base, layers, experts, text = (sum(found[name].values()) for name in ("base", "layers", "experts", "text"))
    print(base, layers, experts, text, *sorted(found["experts"].items(), key=lambda item: -item[1])[:20], sep="\n")
    assert text <= base
    assert layers <= 2 * base
    matching = {name: sum(n for at, n in found[name].items() if " cosines: " in at) for name in ("base", "experts")}
    grown = (experts - matching["experts"]) - (base - matching["base"])
    assert grown <= MOST_OF_AN_EXPERT * probe_waits.EXPERTS * probe_waits.LAYERS


MOVES = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from moebed.check.runs import SMALL, Run, steps
from moebed.check.same_steps import largest_difference
folder, config = Path(sys.argv[1]), replace(SMALL, experts_backend="grouped_mm")
def run(name, device, count, continued=False, precision="32-true"):
    return steps(Run(folder / name, device, count, config, precision, continued))[0]
whole = run("whole", "cpu", 6)
moved = run("moved", "cuda", 2) | run("moved", "cpu", 4, True) | run("moved", "cuda", 6, True)
assert sorted(moved) == sorted(whole) and largest_difference(moved, whole) < 1e-5
half = "16-mixed"
whole = run("half", "cuda", 6, precision=half)
parts = run("parts", "cuda", 3, precision=half)
scaler = torch.load(folder / "parts" / "checkpoints" / "last.ckpt", weights_only=False)["MixedPrecision"]
assert scaler["scale"] > 1 and scaler["_growth_tracker"] <= 3
assert largest_difference(parts | run("parts", "cuda", 6, True, half), whole) == 0
"""


def test_a_run_changes_devices_and_keeps_the_scaler_of_half_precision(tmp_path):
    python("-W", "ignore", "-c", MOVES, tmp_path)


CHOICES = """
import torch
from moebed.machine.precision import choose_precision
from moebed.training.trainer import AutoTrainer
trainer = AutoTrainer(logger=False, enable_checkpointing=False)
print(type(trainer.accelerator).__name__, trainer.precision, choose_precision().reason, sep="|")
"""


@pytest.mark.parametrize("capability", ["7.5", "8.6", "12.0"])
def test_what_auto_chooses(capability):
    accelerator, precision, reason = python("-c", CHOICES, capability=capability).splitlines()[-1].split("|")
    assert accelerator == "CUDAAccelerator"
    assert precision == ("32-true" if capability == "7.5" else "bf16-mixed")
    assert f"capability {capability}" in reason


@pytest.mark.shared("oracles/mixtral")
def test_probing_by_the_command_line(tmp_path):
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 32, (3, 12)))
    for device in ("cpu", "cuda"):
        options = ["--input-ids", ids, "--device", device, "--out", tmp_path / device]
        python("-m", "moebed.cli", "probe", ORACLES / "mixtral", *options)
    files = sorted((tmp_path / "cpu" / "results").glob("*.npz"))
    assert len(files) > 20
    for file in files:
        ours, theirs = np.load(tmp_path / "cuda" / "results" / file.name), np.load(file)
        assert sorted(ours) == sorted(theirs)
        for key in theirs:
            if theirs[key].dtype.kind in "fc":
                np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4, err_msg=f"{file.name} {key}")
            elif theirs[key].dtype.kind in "iub":
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{file.name} {key}")
