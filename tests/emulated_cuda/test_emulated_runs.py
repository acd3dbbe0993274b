"""Runs by the command line over two emulated devices, in every layout: what a CPU's run logs, and nothing refused."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from tests.emulated_cuda import steps
from tests.emulated_cuda.environment import ROOT, environment
from tests.emulated_cuda.test_emulated_cuda import python
from tests.parallel.forked import run
from tests.parallel.parallel_runs import curves, fit, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the device"),
]

CASES = {
    "EP-2": {"router": "sigmoid_topk", "router_options": {"bias_update_rate": 0.01}},
    "EP-2, gathered": {},
    "FSDP2-2": {"router": "document_pool"},
    "replicated-2": {"router": "quantile", "router_aux_loss_scope": "window"},
    "DDP-2": {},
}
LAYERS, MICRO_BATCHES, STEPS = 2, 2, 4
TRAINED = ("train/loss", "train/grad_norm", "train/load_balancing_loss", "val/bits_per_byte")


def moebed(arguments, folder, devices):
    """A command over emulated devices; how often its first rank waited, by place."""
    command = [sys.executable, "-m", "moebed.cli", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(devices, waits=folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (first,) = folder.glob("0-*.json")
    return Counter(json.loads(first.read_text(encoding="utf-8")))


def of_function(waits, name):
    return sum(count for where, count in waits.items() if f" {name}: " in where)


@pytest.mark.parametrize("layout", CASES)
def test_a_run_and_what_continues_it(layout, tmp_path):
    """Training, a mixture by gate load, logging, validation, a probe, samples, checkpoints as folder and as file."""
    path = recipe(tmp_path, STEPS, **CASES[layout])
    content = yaml.safe_load(path.read_text())
    content["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 2, "num_sequences": 3, "probes": ["balance"]}
    content["trainer"] |= {"val_check_interval": 4, "accumulate_grad_batches": MICRO_BATCHES}
    spread = layout != "DDP-2"  # whose replicas DDP keeps: no layout of ours, and no Muon over ranks
    content["model"]["optimizer"] |= {"schedule": "constant", "name": "muon" if spread else "adamw"}
    content["data"]["mixing"] = {"rule": "gate_load", "every_n_steps": 2}
    path.write_text(yaml.safe_dump(content))
    whole, ranks = fit(path, tmp_path / "cpu", layout, "--trainer.max_steps", str(STEPS + 2))
    run(whole, ranks, tmp_path / "log")
    arguments, _ = fit(path, tmp_path / "cuda", layout, "--trainer.accelerator", "gpu")
    waits = moebed(arguments, tmp_path / "waits", ranks)
    more = ["--ckpt_path", "last", "--trainer.max_steps", str(STEPS + 2)]
    moebed([*arguments, *more, *(["--parallel.checkpoint", "file"] * spread)], tmp_path / "again", ranks)
    found, wanted = curves(tmp_path / "cuda"), curves(tmp_path / "cpu")
    assert sorted(found["train/loss"]) == list(range(STEPS + 2))
    for tag in TRAINED:
        assert found[tag] == pytest.approx(wanted[tag], rel=1e-4), tag
    assert of_function(waits, "skips") == STEPS  # whether the gradient's norm is finite
    assert of_function(waits, "read") == STEPS  # what is logged
    exchanges = of_function(waits, "begin")
    assert exchanges % LAYERS == 0
    trained = STEPS * MICRO_BATCHES
    assert trained <= exchanges / LAYERS <= trained + 4 if layout == "EP-2" else exchanges == 0


def test_a_run_of_two_devices_goes_on_on_one(tmp_path):
    path = recipe(tmp_path, STEPS)
    content = yaml.safe_load(path.read_text())
    content["trainer"]["callbacks"] = []
    content["model"]["optimizer"] |= {"schedule": "constant"}
    path.write_text(yaml.safe_dump(content))
    run(*fit(path, tmp_path / "cpu", "1 process", "--trainer.max_steps", str(STEPS + 2)), tmp_path / "log")
    more = ["--ckpt_path", "last", "--trainer.max_steps", str(STEPS + 2)]
    for layout, options in (("EP-2", []), ("1 process", more)):
        arguments, ranks = fit(path, tmp_path / "cuda", layout, "--trainer.accelerator", "gpu", *options)
        moebed(arguments, tmp_path / layout, ranks)
    found, wanted = curves(tmp_path / "cuda"), curves(tmp_path / "cpu")
    assert sorted(found["train/loss"]) == list(range(STEPS + 2))
    for tag in TRAINED:
        assert found[tag] == pytest.approx(wanted[tag], rel=1e-4), tag


PLANTED = """
import pytest, torch
from torch import distributed as dist
from torch.distributed import _functional_collectives as functional
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
there, here, group = torch.ones(2, device="cuda"), torch.ones(2), dist.group.WORLD
for refused in (
    lambda: dist.all_reduce(here),
    lambda: dist.all_reduce(torch.tensor(1)),
    lambda: dist.broadcast(there.cpu(), src=0),
    lambda: functional.all_reduce(here, "sum", group),
    lambda: functional.all_to_all_single(here, None, None, group),
    lambda: functional.all_to_all_single_autograd(here.clone().requires_grad_(), None, None, group),
):
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        refused()
both = dist.new_group(backend="cpu:gloo,cuda:nccl")
for each in (here, there):
    dist.all_reduce(each, group=both)
    assert functional.all_reduce(each, "sum", both).device == each.device
    dist.broadcast_object_list([3], src=0)
assert functional.all_to_all_single(there, None, None, group).device.type == "cuda"
"""

PLANTED_IN_A_ROUTER = """
import sys, torch
from unittest import mock
from moebed.model.routers.softmax import SoftmaxTopK
from tests.emulated_cuda import steps
logits = SoftmaxTopK.logits
faults = {
    "wrong place": lambda self, x: logits(self, x) + torch.zeros(self.weight.shape[0]),
    "asks": lambda self, x: logits(self, x) + float(x.detach().sum()) * 0,
}
with mock.patch.object(SoftmaxTopK, "logits", faults[sys.argv.pop(1)]):
    steps.main()
"""


def test_faults_that_are_planted_are_found():
    python("-W", "ignore", "-c", PLANTED)
    wrong = json.loads(python("-c", PLANTED_IN_A_ROUTER, "wrong place", "router softmax_topk").splitlines()[-1])
    assert "cuda:0 and cpu" in wrong["error"]
    asks = json.loads(python("-c", PLANTED_IN_A_ROUTER, "asks", "router softmax_topk").splitlines()[-1])
    assert sum(asks["waits"].values()) == 1 + steps.SMALL.num_hidden_layers
