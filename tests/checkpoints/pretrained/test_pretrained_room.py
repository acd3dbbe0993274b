"""What the probes will keep of a text is said before any work, and refused where the disk has no room for it."""

import shutil

import numpy as np
import pytest
import torch
from checkpoint_files import write

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.machine.units import human
from moebed.views.layer import ProbeText
from probes.registry import PROBES
from probes.running.driver import needs_of, run_probes

SIZES = {"family": "qwen3_moe", "num_experts": [0, 32, 0, 32], "num_hidden_layers": 4, "num_experts_per_tok": 4,
         "qk_norm": "head", "vocab_size": 300}  # fmt: skip
TOKENS = 700
SAID = ["--probes", "routing,norm_vs_score", "--save-logits"]
# What these keep of a token they drop with the last layer (`test_what_is_kept_of_a_token_is_what_is_said`).
WHILE_IT_GOES = {"routing_ladder", "expert_lens", "control_content"}
KEPT = TOKENS * (2 * (4 * 32 + 8 * 4) + 2 * 4 * 32 + 4 * 300)  # routing, norms, logits


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "model", **SIZES)
    return tmp_path / "model"


def _text(first=400, second=300):
    ids = torch.randint(300, (2, first), generator=torch.Generator().manual_seed(1))
    return ProbeText(ids, torch.arange(first) < torch.tensor([[first], [second]]), torch.zeros(2, dtype=torch.int64))


def test_no_probe_stores_much_more_of_a_token_than_it_says(checkpoint):
    """Beside it a few numbers of a token at a layer, and its chosen experts; what no token enlarges does not count."""
    model = PretrainedMoE(str(checkpoint), text=_text(60, 47))  # of 107 tokens
    probes = [kind() for kind in PROBES.values()]
    results = run_probes(model.views(model.text, needs_of(probes)), probes)
    model.close()
    said_by = {}
    for name, result in results.items():
        said = sum(PROBES[name].token_bytes(model.config, layer) for layer in (*model.config.moe_layers, None))
        stored = sum(value.nbytes for value in result.arrays.values() if value.ndim and len(value) == 107) / 107
        lasts = 0 if name in WHILE_IT_GOES else said
        assert lasts <= stored <= lasts + 80, name
        said_by[name] = said
    lasting = {"logits", "routing", "norm_vs_score", "activations"}
    assert {name for name, said in said_by.items() if said} == lasting | WHILE_IT_GOES


def _probe(checkpoint, out, *options):
    files = []
    for number, ids in enumerate(_text().token_ids.split((400, 300))):
        files.append(str(checkpoint.parent / f"{number}.npy"))
        np.save(files[-1], ids.numpy())
    return main(["probe", str(checkpoint), "--out", str(out), "--input-ids", *files, *SAID, *options])


def test_what_will_be_kept_is_said_and_kept(checkpoint, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("probes.running.checkpoint_pass.WORTH_SAYING", 2 * KEPT)
    assert _probe(checkpoint, tmp_path / "out") == 0
    (line,) = [line for line in caplog.messages if "will be kept" in line]
    assert f"{human(KEPT, 'B')} will be kept" in line
    assert f"{human(2 * KEPT, 'B')} are needed until the results are written" in line
    files = sum(path.stat().st_size for path in (tmp_path / "out" / "results").glob("*.npz"))
    assert 0.95 * KEPT < files < 1.1 * KEPT  # arrays of less than 64 kB are deflated
    caplog.clear()
    assert _probe(checkpoint, tmp_path / "out") == 0  # all is there
    assert not any("will be kept" in line for line in caplog.messages)
    monkeypatch.setattr("probes.running.checkpoint_pass.WORTH_SAYING", 2 * KEPT + 1)
    assert _probe(checkpoint, tmp_path / "out", "--fresh") == 0
    assert not any("will be kept" in line for line in caplog.messages)


def test_a_disk_without_room_is_refused_before_any_work(checkpoint, tmp_path, capsys, monkeypatch):
    usage, out = shutil.disk_usage(tmp_path), tmp_path / "out"
    monkeypatch.setattr("moebed.machine.storage.shutil.disk_usage", lambda path: usage._replace(free=2 * KEPT - 1))
    assert _probe(checkpoint, out) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    assert f"the probes need, until their results are written, {human(2 * KEPT, 'B')}" in line
    assert f"{human(1200 * TOKENS, 'B')} are of logits" in line
    assert not list(out.rglob("*.npz"))
    monkeypatch.setattr("moebed.machine.storage.shutil.disk_usage", lambda path: usage._replace(free=2 * KEPT))
    assert _probe(checkpoint, out) == 0
    monkeypatch.setattr("moebed.machine.storage.shutil.disk_usage", lambda path: usage._replace(free=0))
    assert _probe(checkpoint, out) == 0  # and nothing more is needed
