"""Two processes train the routers that one process trains: the same bias, the same coins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[3]


def _state(folder: Path, router: str, ranks: int) -> dict[str, torch.Tensor]:
    run = folder / f"ranks{ranks}"
    model = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "moe_intermediate_size": 64,
        "router": router,
        "router_options": {"competition_rate": 0.5},
        "router_aux_loss_coef": 0.0,
        "router_aux_loss_scope": "global",
    }
    trainer = {"accelerator": "cpu", "devices": ranks, "strategy": "ddp", "precision": 32, "max_steps": 6}
    data = {
        "tokenizer": {"kind": "bytes"},
        "sequence_length": 64,
        "batch_size": 4 // ranks,
        "max_validation_windows": 4,
    }
    content = {
        "trainer": trainer | {"default_root_dir": str(run), "val_check_interval": 6, "enable_progress_bar": False},
        "checkpoint": {"every_n_train_steps": 6},
        "model": {"config": model, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2}},
        "data": data | {"sources": [{"name": "math", "max_bytes": 200_000}], "cache_dir": str(folder / "cache")},
    }
    path = folder / f"{ranks}.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "moebed.cli", "fit", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("router", ["sigmoid_topk", "competesmoe", "noisy_topk"])
def test_two_processes_equal_one(router, tmp_path):
    one, two = (_state(tmp_path, router, ranks) for ranks in (1, 2))
    assert one.keys() == two.keys()
    for key, value in one.items():
        if key.endswith("expert_bias"):
            assert value.abs().max() > 0
            assert torch.equal(value, two[key])
        torch.testing.assert_close(value, two[key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
