"""What takes the way of a GPU, on devices that are emulated on the host: see the README beside this file."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from tests.emulated_cuda import steps
from tests.emulated_cuda.environment import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the device"),
]
FINITE, ROUTING = "training/not_finite.py", "model/routing.py"  # the first: whether the gradient's norm is finite
RAGGED = {"relu", "threshold", "expert_choice"}  # which ask, in each layer, how many experts the busiest token has


def python(*arguments, devices=1, capability="9.0", **variables):
    """What a Python process with emulated devices prints."""
    command = [sys.executable, *map(str, arguments)]
    around = environment(devices, capability) | variables
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def findings(step, out):
    rows = json.loads((out / "steps" / f"{step}.json").read_text(encoding="utf-8"))["findings"]
    return {row["name"]: row for row in rows}


BASICS = """
import io, pytest, torch
from tests.emulated_cuda.waits import WAITS
torch.manual_seed(3)
a, generator = torch.randn(4, 5, device="cuda"), torch.Generator("cuda")
assert torch.equal(*(torch.randn(3, device="cuda", generator=generator.manual_seed(3)) for _ in range(2)))
weight = torch.randn(5, 6, device="cuda", requires_grad=True)
(a @ weight).relu().sum().backward()
reference = weight.detach().cpu().requires_grad_()
(a.cpu() @ reference).relu().sum().backward()
assert weight.grad.device.type == "cuda" and torch.equal(weight.grad.cpu(), reference.grad)
add = lambda other: lambda: a + other
for mixed in (add(torch.ones(4, 5)), add(a.to("cuda:1")), lambda: torch.cat([a, a.cpu()]), lambda: a @ reference):
    with pytest.raises(RuntimeError, match="same device"):
        mixed()
with pytest.raises(TypeError, match="numpy"):
    a.numpy()
with pytest.raises(RuntimeError, match="generator"):
    torch.randn(3, device="cuda", generator=torch.Generator())
assert torch.equal(a[torch.tensor([1, 2])].cpu(), a.cpu()[1:3]) and (a + torch.tensor(1.0)).device.type == "cuda"
with torch.autocast("cuda", dtype=torch.bfloat16):
    assert (a @ weight).dtype == torch.bfloat16
file = io.BytesIO()
torch.save(a, file)
for where, place in ((None, "cuda"), ("cpu", "cpu")):
    file.seek(0)
    again = torch.load(file, map_location=where)
    assert again.device.type == place and torch.equal(again.cpu(), a.cpu())
torch.cuda.set_sync_debug_mode("warn")
a.sum().item(), a.cpu(), a[a > 0], torch.ones(3).to("cuda"), torch.full((3,), 2.0, device="cuda"), a.sum() + 1
assert WAITS.counted() == dict.fromkeys(
    ["aten::_local_scalar_dense", "aten::nonzero", "copy from the host", "copy to the host"], 1
)
"""


@pytest.mark.filterwarnings("ignore")
def test_it_behaves_as_a_device():
    python("-c", BASICS, devices=2)


def test_the_steps_of_check_find_nothing_wrong_and_the_waits_of_an_h200(tmp_path):
    python("-m", "moebed.cli", "check", "--only", "probes,checkpoints,waits", "--minutes", 30, "--out", tmp_path)
    found = {name: row for step in ("probes", "checkpoints") for name, row in findings(step, tmp_path).items()}
    assert len(found) == 6
    assert {row["verdict"] for row in found.values()} == {"works"}
    waits = findings("waits", tmp_path)
    assert waits["grouped_mm, bf16-mixed"]["figures"]["waits"] == 1
    assert waits["grouped_mm, 32-true"]["figures"]["waits"] == 13


def test_every_router_and_block_trains_as_on_a_cpu_and_waits_once():
    found = [
        json.loads(line) for line in python("-m", "tests.emulated_cuda.steps").splitlines() if line.startswith("{")
    ]
    assert [each["case"] for each in found] == list(steps.CASES)
    layers = steps.SMALL.num_hidden_layers
    for each in found:
        assert each.get("difference", 1) < 1e-5, each
        of_layers = layers if each["case"].removeprefix("router ") in RAGGED else 0
        waits: Counter[str] = Counter()
        for where, often in each["waits"].items():
            waits[where.partition(":")[0]] += often
        assert waits == Counter({FINITE: 1.0, ROUTING: float(of_layers)}), each


def test_two_devices_train_the_same_model(tmp_path):
    python("-m", "moebed.cli", "check", "--only", "ranks", "--minutes", 30, "--out", tmp_path, devices=2)
    found = findings("ranks", tmp_path)
    ours = [row["verdict"] for name, row in found.items() if "2 ranks" in name]
    assert len(ours) >= 3
    assert set(ours) == {"works"}
