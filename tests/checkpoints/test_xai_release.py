"""xai-org's release of Grok-1: pickles read without running them, and the matrices turned the right way round."""

import dataclasses
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.xai import SLOTS, XaiEntry, open_release, read_pickled_tensor, release_folder
from moebed.errors import UserError

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 256, 384, 4, 12, 300  # two heads of 128


@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: np.ndarray
    scales: np.ndarray


@pytest.fixture(autouse=True)
def _model_module(monkeypatch):
    """The class as the release names it, model.QuantizedWeight8bit, for writing only."""
    module = types.ModuleType("model")
    module.QuantizedWeight8bit = QuantizedWeight8bit
    monkeypatch.setitem(sys.modules, "model", module)
    monkeypatch.setattr(QuantizedWeight8bit, "__module__", "model")


def _quantized(rng, *shape, groups):
    weight = rng.integers(-127, 128, shape, dtype=np.int8)
    scales = rng.random((*shape[:-2], groups, shape[-1])).astype(np.float32)
    whole = weight.astype(np.float32) * np.repeat(scales, shape[-2] // groups, axis=-2)
    return QuantizedWeight8bit(weight, scales), whole


def _write(folder, rng):
    """A release of LAYERS layers; returns its plain tensors by the port's names, as (in, out)."""
    folder.mkdir()
    plain, files = {}, []
    plain["model.embed_tokens.weight"] = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    plain["model.norm.scale"] = rng.random(HIDDEN).astype(np.float32)
    files += [plain["model.embed_tokens.weight"], plain["model.norm.scale"]]
    shapes = {
        "linear.weight": ((EXPERTS, HIDDEN, WIDTH), 1),
        "linear_1.weight": ((EXPERTS, WIDTH, HIDDEN), 8),
        "linear_v.weight": ((EXPERTS, HIDDEN, WIDTH), 1),
        "k_proj.weight": ((HIDDEN, 128), 1),
        "v_proj.weight": ((HIDDEN, 128), 1),
        "q_proj.weight": ((HIDDEN, HIDDEN), 1),
        "o_proj.weight": ((HIDDEN, HIDDEN), 8),
    }
    for layer in sorted(range(LAYERS), key=str):
        for name, _ in SLOTS:
            full = f"model.layers.{layer}.{name}"
            kind = ".".join(name.split(".")[-2:])
            if kind in shapes:
                shape, groups = shapes[kind]
                stored, whole = _quantized(rng, *shape, groups=groups)
            elif name.endswith("gate.weight"):
                stored = whole = rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32)
            else:
                stored = whole = rng.random(HIDDEN).astype(np.float32)
            files.append(stored)
            plain |= {full.format(e=e): whole[e] for e in range(EXPERTS)} if "{e}" in name else {full: whole}
    for index, stored in enumerate(files):
        (folder / f"tensor{index:05d}_000").write_bytes(pickle.dumps(stored, protocol=4))
    return plain


def test_every_tensor_is_what_was_written(tmp_path):
    plain = _write(tmp_path / "ckpt-0", np.random.default_rng(0))
    assert release_folder(tmp_path) == tmp_path / "ckpt-0"
    settings, entries = open_release(tmp_path / "ckpt-0")
    assert entries.keys() == plain.keys()
    expected = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
    }
    assert expected.items() <= settings.items()
    for name, whole in plain.items():
        entry = entries[name]
        turned = torch.from_numpy(whole)
        if turned.ndim == 2 and name != "model.embed_tokens.weight":
            turned = turned.T
        assert entry.shape == tuple(turned.shape), name
        turned = turned.reshape(-1, turned.shape[-1]).to(entry.dtype)
        out = torch.empty_like(turned)
        entry.read(0, out)
        assert torch.equal(out, turned), name
        if len(turned) > 8:
            some = torch.empty_like(turned[3:7])
            entry.read(3, some)
            assert torch.equal(some, turned[3:7]), name


def test_probe_reads_the_release_as_it_reads_a_port(tmp_path):
    """The command on the release, against the same weights in a decoder."""
    from moebed.checkpoints import Checkpoint
    from moebed.cli import main

    plain = _write(tmp_path / "ckpt-0", np.random.default_rng(1))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.hidden_act == "gelu_tanh"
    assert checkpoint.config.post_norms
    arguments = ["--probes", "matrix_similarity,gate_similarity", "--layers", "2,10"]
    assert main(["probe", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]) == 0
    with np.load(tmp_path / "out" / "results" / "matrix_similarity.npz") as found:
        assert {name.split("/")[1] for name in found} == {"2", "10"}
        for matrix, name in (("gate", "linear"), ("up", "linear_v"), ("down", "linear_1")):
            flat = [plain[f"model.layers.10.moe_block.experts.{e}.{name}.weight"].ravel() for e in range(EXPERTS)]
            expected = np.corrcoef(torch.tensor(np.stack(flat)).bfloat16().float().numpy())
            np.testing.assert_allclose(found[f"matrix_cos/10/{matrix}"], expected, atol=2e-3)
    with np.load(tmp_path / "out" / "results" / "gate_similarity.npz") as found:
        gate = plain["model.layers.2.moe_block.gate.weight"].T
        gate = gate / np.linalg.norm(gate, axis=1, keepdims=True)
        np.testing.assert_allclose(found["gate_cos/2"], gate @ gate.T, atol=1e-5)


def test_a_file_that_is_another_one_now_is_named(tmp_path):
    _write(tmp_path / "ckpt-0", np.random.default_rng(0))
    path, opened = tmp_path / "ckpt-0" / "tensor00000_000", Checkpoint.open(tmp_path)
    opened.require_unchanged()
    (tmp_path / "new").write_bytes(path.read_bytes())
    os.utime(tmp_path / "new", ns=(1, path.stat().st_mtime_ns + 1))
    (tmp_path / "new").replace(path)  # it is opened by its name whenever some of it is read
    with pytest.raises(UserError, match=f"{path} has changed since it was opened"):
        opened.require_unchanged()


def test_large_payloads_stay_in_the_file(tmp_path):
    """A tensor of 64 MB is described without its bytes being read."""
    import tracemalloc

    path = tmp_path / "tensor00000_000"
    array = np.arange(16 << 20, dtype=np.float32).reshape(1 << 14, -1)
    path.write_bytes(pickle.dumps(array, protocol=4))
    tracemalloc.start()
    entry = XaiEntry(path, read_pickled_tensor(path), transposed=False)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    out = torch.empty(2, 1024)
    entry.read(5000, out)
    assert torch.equal(out, torch.from_numpy(array[5000:5002]))


class _Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "tensor00000_000"
    path.write_bytes(pickle.dumps(_Malicious(tmp_path / "ran"), protocol=4))
    with pytest.raises(UserError, match=r"tensor00000_000 is not a tensor of the release: it names \w+\.mkdir"):
        read_pickled_tensor(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps(np.array(["x"]))]
)
def test_what_is_no_tensor_is_one_line(tmp_path, content):
    path = tmp_path / "tensor00000_000"
    path.write_bytes(content)
    with pytest.raises(UserError, match="tensor00000_000 is not a tensor of the release") as caught:
        read_pickled_tensor(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scales", [(4, 8), (3, 8), (2, 2, 8)])
def test_scales_of_other_groups_than_there_are_rows_for(tmp_path, scales):
    path = tmp_path / "tensor00002_000"
    stored = QuantizedWeight8bit(np.ones((8, 8), np.int8), np.ones(scales, np.float32))
    path.write_bytes(pickle.dumps(stored, protocol=4))
    if scales == (4, 8):
        assert XaiEntry(path, read_pickled_tensor(path), True).shape == (8, 8)
        return
    with pytest.raises(UserError, match="do not fit weights"):
        XaiEntry(path, read_pickled_tensor(path), True)


def test_a_file_cut_short_and_a_missing_one(tmp_path):
    _write(tmp_path / "ckpt-0", np.random.default_rng(0))
    path = tmp_path / "ckpt-0" / "tensor00002_000"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="tensor00002_000 is not a tensor of the release"):
        open_release(tmp_path / "ckpt-0")
    path.unlink()
    with pytest.raises(UserError, match="tensor00002_000 is the first that is missing"):
        open_release(tmp_path / "ckpt-0")
