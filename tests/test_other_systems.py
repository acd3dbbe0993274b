"""What not every system has: Linux's calls, a locale in UTF-8, a terminal for every letter, float64 on the device."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moebed.machine import float64
from moebed.training.metrics import TextLoss

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moebed", "probes", "triton_kernels")
# Run by Python as it starts, also where moebed begins again in UTF-8 mode.
ABSENT = """
import mmap, os, sys
for module, names in {
    os: ["preadv", "pread", "posix_fadvise", "sched_getaffinity", "killpg", "getloadavg", "O_DIRECT"],
    mmap: ["MADV_HUGEPAGE"],
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
import psutil  # it needs resource on Linux
sys.modules["fcntl"] = sys.modules["resource"] = None
"""
# Every module is imported, then the commands are given as a shell would.
COMMANDS = """
import importlib, json, pkgutil, sys
import moebed, probes
from moebed.cli import main

for argv in json.loads(sys.argv[1]):
    sys.argv = ["moebed", *argv]
    code = main()
    assert code == 0, (argv, code)
for package in (moebed, probes):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "lm_eval", error  # an extra
"""
RECIPE = {
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": 1,
        "val_check_interval": 1,
        "limit_val_batches": 1,
        "callbacks": [{"class_path": "probes.ProbeCallback", "init_args": {"num_sequences": 2, "probes": ["balance"]}}],
    },
    "model": {
        "config": {
            "vocab_size": 257,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "moe_intermediate_size": 16,
        },
        "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 1},
    },
    "data": {"tokenizer": {"kind": "bytes"}, "sequence_length": 32, "batch_size": 1, "validation_fraction": 0.3},
}


def _elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that lacks what only Linux has, in a locale that is not UTF-8."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT, encoding="utf-8")
    (tmp_path / "commands.py").write_text(COMMANDS, encoding="utf-8")
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    return os.environ | changes | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_training_probing_and_reporting_where_linux_is_not(tmp_path):
    sentence = "Der Läufer {} läuft über die Brücke, façade, 日本語. "
    lines = [json.dumps({"text": sentence.format(n) * 4}, ensure_ascii=False) for n in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = {"name": "läufe", "kind": "files", "path": str(tmp_path / "text.jsonl")}
    data = {**RECIPE["data"], "sources": [source], "cache_dir": str(tmp_path / "cache")}
    text = yaml.safe_dump({**RECIPE, "data": data}, allow_unicode=True)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    commands = [
        ["fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "run"],
        ["probe", "run/checkpoints/last.ckpt", "--out", "out", "--probes", "balance", "--domain", "a=text.jsonl"],
        ["report", "run", "out", "--out", "report.html"],
    ]
    command = [sys.executable, str(tmp_path / "commands.py"), json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, env=_elsewhere(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "läufe" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("package", PACKAGES)
def test_every_text_file_is_opened_with_an_encoding(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            mode = [a.value for a in [*node.args, given.get("mode")] if isinstance(a, ast.Constant)]
            text = any(isinstance(m, str) and set(m) <= set("rwaxt+") for m in mode)
            opens = name == "open" and (text or (isinstance(node.func, ast.Name) and len(node.args) == 1 and not mode))
            of_path = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") != "storage"
            reads = of_path and name in ("read_text", "write_text")  # moebed.machine.storage writes UTF-8 alone
            opens = opens and not (name == "open" and "force_zip64" in given)  # a member of a zip file is bytes
            if opens or reads or "text" in given or "universal_newlines" in given:
                spoken = name in ("run", "Popen", "check_output") or opens or reads
                assert not spoken or "encoding" in given, f"{path}:{node.lineno}"


def test_float64_is_reached_through_one_place():
    """Apple's GPUs have none: a tensor is in main memory before it becomes float64, or ``double`` sees to it."""
    in_main_memory = re.compile(
        r"(\.cpu\(\)|torch\.tensor\(\w+\)|from_numpy\([\w\[\]]+\))\.double\(\)"
        r"|torch\.(zeros|full|tensor)\((?!.*device).*dtype=torch\.float64"
        r"|^ *torch\.float64: "  # what is known of a type, in a table by type, makes no tensor of it
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("moebed", "probes")
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if (".double()" in line or "torch.float64" in line) and not in_main_memory.search(line)
    }
    assert found == {"moebed/machine/float64.py"}


def test_sums_of_losses_stay_in_main_memory_where_a_device_has_no_float64(monkeypatch):
    monkeypatch.setattr(float64, "_WITHOUT", ("meta",))
    metric = TextLoss(2).to("meta")
    for _ in range(2):
        metric.update(torch.tensor([3.0, 5.0]), torch.tensor([2, 2]), torch.tensor([4, 4]), torch.tensor([0, 1]))
    assert {metric.nats.dtype, metric.tokens.dtype, metric.bytes.dtype} == {torch.float64}
    assert metric.nats.tolist() == [6.0, 10.0]
    assert metric.compute()["loss_by_domain"].tolist() == [1.5, 2.5]
    assert TextLoss(2).to("cpu").nats.device.type == "cpu"


def test_a_device_without_float64_hands_its_numbers_over(monkeypatch):
    assert float64.double(torch.ones(2)).dtype == torch.float64
    assert not float64.has_float64(torch.device("mps"))
    assert float64.has_float64(torch.device("cuda"))
