"""A whole study of real runs: killed in the middle, continued, an arm against itself, and one that must be worse."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 24,
        "val_check_interval": 8,
        "log_every_n_steps": 4,
        "callbacks": [
            {
                "class_path": "probes.ProbeCallback",
                "init_args": {"every_n_steps": 8, "num_sequences": 2, "probes": ["balance"]},
            }
        ],
    },
    "checkpoint": {"every_n_train_steps": 2},
    "samples": {"prompt_tokens": 4, "new_tokens": 4},
    "model": {
        "config": {
            "vocab_size": 260,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_experts": 4,
            "moe_intermediate_size": 32,
        },
        "optimizer": {"learning_rate": 3.0e-3, "warmup_steps": 2},
    },
    "data": {
        "tokenizer": {"kind": "bytes"},
        "sequence_length": 32,
        "batch_size": 4,
        "max_validation_windows": 16,
    },
}


def _start(path: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "moebed.cli", "study", str(path), "--out", str(out), "--jobs", "2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_study_continues_and_says_what_is_there(tmp_path):
    text = "\n\n".join(f"{i}: the cat sat on the mat and saw {i}. " * 6 for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    sources = [{"name": "text", "kind": "files", "path": str(tmp_path / "text.txt")}]
    data = {**BASE["data"], "sources": sources, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, "data": data}))
    arms = {"topk": {}, "again": {}, "crippled": {"model.optimizer.learning_rate": 1.0e-5}}
    path, out = tmp_path / "try.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "arms": arms, "seeds": [1, 2]}, sort_keys=False))

    study = _start(path, out)
    checkpoint = out / "runs/topk/seed_1/checkpoints/last.ckpt"
    while not checkpoint.exists():
        assert study.poll() is None, study.stderr.read()
        time.sleep(0.02)
    study.send_signal(signal.SIGTERM)
    assert study.wait(timeout=60) == 143
    assert "the same command continues" in study.stderr.read()
    assert not (out / "runs/topk/seed_1/run_summary.json").exists()

    whole = _start(path, out)
    said, errors = whole.communicate(timeout=900)
    assert whole.returncode == 0, errors
    log = (out / "status/runs/topk/seed_1.log").read_text()
    assert "a new run in" in log
    assert "continuing the run in" in log
    found = json.loads((out / "study.json").read_text())
    runs = {arm: [found["arms"][arm]["runs"][seed] for seed in ("1", "2")] for arm in arms}
    assert {run["status"] for both in runs.values() for run in both} == {"finished"}
    for killed, never in zip(runs["topk"], runs["again"], strict=True):
        assert killed["loss"] == never["loss"]  # bit for bit, one of them killed in between
        assert killed["curve"]["step"] == [8, 16, 24]
        assert killed["headlines"]["balance/max_violation"]["step"] == [0, 8, 16, 24]
    assert runs["topk"][0]["loss"] != runs["topk"][1]["loss"]
    assert "again: equal to topk in every one of 2 pairs; no difference." in said
    assert "crippled: a higher loss than topk" in said

    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*/run_summary.json")}
    assert len(before) == 6
    third = _start(path, out)
    assert third.communicate(timeout=200)[0] == said
    assert {file: file.stat().st_mtime_ns for file in before} == before

    changed = {**arms, "again": {"model.config.num_experts": 8}}
    path.write_text(yaml.safe_dump({"base": "base.yaml", "arms": changed, "seeds": [1, 2]}, sort_keys=False))
    refused = _start(path, out)
    errors = refused.communicate(timeout=200)[1]
    assert refused.returncode == 2
    assert "model.config.num_experts was 4 and is 8" in errors
    assert "again/seed_1" in errors


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_diverges_is_marked(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}: a b c d e f g {i}. " * 8 for i in range(200)))
    sources = [{"name": "text", "kind": "files", "path": str(tmp_path / "text.txt")}]
    data = {**BASE["data"], "sources": sources, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, "data": data}))
    arms = {"topk": {}, "explodes": {"model.optimizer.learning_rate": 1.0e30}}
    path, out = tmp_path / "try.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "arms": arms, "seeds": [1]}, sort_keys=False))
    study = _start(path, out)
    said, errors = study.communicate(timeout=500)
    assert study.returncode == 0, errors
    found = json.loads((out / "study.json").read_text())
    explodes = found["arms"]["explodes"]["runs"]["1"]
    assert explodes["status"] == "diverged"
    assert re.search(r"\b(nan|inf)\b.* at step \d+", explodes["why"])
    assert "ONE SEED" in said
    assert "explodes: no pair of finished runs" in said
