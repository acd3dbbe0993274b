"""`moebed probe`: the oracles' values, other sizes and layouts, the same numbers as a live model, and going on."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import random_decoder, write

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.commands.probe import read_options
from moebed.machine.units import parse_bytes
from moebed.views.layer import Need
from moebed.views.live import walk
from probes.registry import PROBES
from probes.running import store
from probes.running.driver import run_probes
from tests.conftest import ORACLES

WEIGHTS = frozenset({Need.WEIGHTS})
FEW = ("matrix_similarity", "gate_similarity")
RECIPES = Path(__file__).resolve().parents[3] / "recipes"
STATIC = tuple(name for name, probe in PROBES.items() if probe.needs <= WEIGHTS)
oracles = pytest.mark.shared("oracles")


def probe(checkpoint, out, *options, probes=FEW):
    arguments = ["probe", str(checkpoint), "--out", str(out), "--probes", ",".join(probes), *map(str, options)]
    return main(arguments)


@oracles
@pytest.mark.parametrize(
    "name",
    [pytest.param("mixtral", marks=pytest.mark.slow), pytest.param("deepseekmoe", marks=pytest.mark.slow), "grok-1"],
)
def test_the_command_finds_the_oracles_values(name, tmp_path):
    reference = ("--reference-dense", ORACLES / "mistral") if name == "mixtral" else ()
    assert main(["probe", str(ORACLES / name), "--out", str(tmp_path), *map(str, reference)]) == 0
    found = {}
    for probe_name in STATIC:
        found = store.load_arrays(tmp_path, probe_name) | found  # gate_projection repeats a part of neuron_similarity's
    wanted = np.load(ORACLES / name / "expected_static.npz")
    kinds = set()
    for key in wanted.files:
        ours = found[key.replace("matrix_pca_abs", "matrix_pca")]
        if "matrix_pca_abs" in key:  # of the routed experts alone, and a component's sign is free
            ours = np.abs(ours)[: len(wanted[key])]
        kinds.add(key.split("/")[0])
        np.testing.assert_allclose(ours, wanted[key], rtol=1e-4, atol=1e-4 * np.abs(wanted[key]).max(), err_msg=key)
    assert len(kinds) == 9
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert ("reference_cos_up" in summary["probes"]["matrix_similarity"]["headlines"]) == (name == "mixtral")
    assert set(summary["probes"]) == set(STATIC)
    assert "<html" in (tmp_path / "report.html").read_text()[:200]
    assert list((tmp_path / "figures").glob("matrix_similarity_*.png"))
    assert list((tmp_path / "tensorboard").glob("events*"))


CASES = {
    "6 experts": {"num_experts": 6},
    "12 experts, fp16": {"num_experts": 12, "dtype": torch.float16},
    "24 experts, fp32": {"num_experts": 24, "dtype": torch.float32, "num_hidden_layers": 1},
    "one expert": {"num_experts": 1},
    "one file": {"shards": False},
    "one bin": {"shards": False, "pickled": True},
    "bins, fp16": {"pickled": True, "dtype": torch.float16},
    "layers without experts": {"family": "deepseek", "num_experts": [0, 6, 6], "num_shared_experts": 2,
                               "norm_topk_prob": False},
    "every other layer": {"family": "qwen3_moe", "num_experts": [0, 12, 0], "qk_norm": "head"},
    "a shared expert of the same shape": {"family": "qwen2_moe", "num_shared_experts": 1, "shared_expert_gate": True},
    "no layer has experts": {"family": "mistral", "num_experts": 0, "intermediate_size": 20},
}  # fmt: skip


# Of these the widest, or the same in another form: every probe of theirs is slow.
WIDE = ("12 experts, fp16", "24 experts, fp32", "one bin")


@pytest.mark.parametrize(
    ("case", "budget"),
    [
        pytest.param(case, budget, id=f"{name}-{budget}", marks=pytest.mark.slow if name in WIDE and every else ())
        for budget, every in (("1GiB", True), ("30kB", False))
        for name, case in CASES.items()
    ],
)
def test_a_streamed_checkpoint_gives_the_numbers_of_a_live_model(case, budget, tmp_path):
    decoder = write(tmp_path, **case).to(case.get("dtype", torch.bfloat16))
    names = FEW if budget == "30kB" else STATIC
    live = run_probes(walk(decoder, None, WEIGHTS), [PROBES[name]() for name in names])
    model = PretrainedMoE(str(tmp_path), memory_budget=budget)
    streamed = run_probes(model.views(None, WEIGHTS), [PROBES[name]() for name in names])
    model.close()
    for name in names:
        assert streamed[name].arrays.keys() == live[name].arrays.keys()
        for key, value in live[name].arrays.items():
            np.testing.assert_array_equal(streamed[name].arrays[key], value, err_msg=f"{name} {key}")


def test_a_small_budget_reads_an_expert_at_a_time(tmp_path):
    write(tmp_path, num_experts=12)
    model = PretrainedMoE(str(tmp_path), memory_budget="8kB")
    done = []
    model.on_read = done.append
    run_probes(model.views(None, WEIGHTS), [PROBES["matrix_similarity"]()])
    assert not model._pool.fits(0)
    assert done == sorted(done)
    assert 0 < done[-1] < model.bytes_total == 3 * 12 * 3 * 24 * 32 * 2


def test_the_bar_ends_where_all_is_done_with(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("moebed.machine.progress.Progress.update", lambda bar, done: seen.append((done, bar.total)))
    write(tmp_path / "model")
    assert probe(tmp_path / "model", tmp_path / "out", probes=["matrix_similarity"]) == 0
    done, total = zip(*seen, strict=True)
    assert 0 < done[-2] < done[-1] == total[-1]


def test_probes_are_told_what_memory_is_left(tmp_path):
    write(tmp_path, num_experts=12)
    matrices = 12 * 24 * 32 * 2  # bytes of one matrix of a layer
    for budget in (40 * matrices, 4 * matrices):
        model = PretrainedMoE(str(tmp_path), memory_budget=budget)
        view = next(model.views(None, WEIGHTS))
        assert view.work_bytes == budget - model._pool.most
        assert 0 < view.work_bytes <= budget - matrices
        held = 0
        for name in ("up", "gate", "down"):
            for expert in range(12):
                view.expert_matrix(name, expert)
                held = max(held, model._pool._bytes())
        assert matrices <= held <= model._pool.most
        model.close()


def test_dtype_rounds_the_weights(tmp_path):
    decoder = write(tmp_path, dtype=torch.float32)
    model = PretrainedMoE(str(tmp_path), dtype="bfloat16")
    view = next(model.views(None, WEIGHTS))
    assert torch.equal(view.expert_matrix("up", 2), decoder.layers[0].mlp.experts.matrix("up")[2].bfloat16())
    model.close()


def test_a_second_run_continues_where_the_first_was_stopped(tmp_path, monkeypatch):
    write(tmp_path / "model")
    assert probe(tmp_path / "model", tmp_path / "whole") == 0
    shown = []
    original = PROBES["matrix_similarity"].update

    def stop_at_layer_2(self, view):
        shown.append(view.index)
        if len(shown) == 3:
            raise KeyboardInterrupt
        original(self, view)

    monkeypatch.setattr(PROBES["matrix_similarity"], "update", stop_at_layer_2)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        probe(tmp_path / "model", tmp_path / "out")
    assert not list((tmp_path / "out" / "results").glob("*.npz"))
    assert probe(tmp_path / "model", tmp_path / "out") == 0
    assert shown == [0, 1, 2, 2]
    for name in FEW:
        whole, other = store.load_arrays(tmp_path / "whole", name), store.load_arrays(tmp_path / "out", name)
        assert whole.keys() == other.keys()
        assert all(np.array_equal(whole[key], other[key]) for key in whole)
    assert probe(tmp_path / "model", tmp_path / "out", "--layers", "0,2") == 0  # nothing is left to do
    assert len(shown) == 4
    assert {key.split("/")[1] for key in store.load_arrays(tmp_path / "out", "gate_similarity")} == {"0", "2"}
    shard = next((tmp_path / "model").glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    assert probe(tmp_path / "model", tmp_path / "out") == 0  # the files are others: begins anew
    assert shown[4:] == [0, 1, 2]


def test_results_of_another_model_are_not_overwritten(tmp_path, capsys):
    for name in ("one", "two"):
        write(tmp_path / name)
    assert probe(tmp_path / "one", tmp_path / "out") == 0
    before = (tmp_path / "out" / "summary.json").read_text()
    capsys.readouterr()
    assert probe(tmp_path / "two", tmp_path / "out") == 2
    assert "holds the results of one" in capsys.readouterr().err
    assert (tmp_path / "out" / "summary.json").read_text() == before
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "num_experts": 6}
    assert json.loads(before)["model"] == {"name": "one", "model_type": "mixtral", **sizes}


def test_options_from_a_file(tmp_path, capsys):
    write(tmp_path / "model")
    path = tmp_path / "probe.yaml"
    path.write_text(
        f"checkpoint: {tmp_path / 'model'}\nout: {tmp_path / 'out'}\nprobes: [gate_similarity]\nlayers: [1]\n"
    )
    assert main(["probe", "--config", str(path)]) == 0
    assert list(store.load_arrays(tmp_path / "out", "gate_similarity")) == ["gate_cos/1"]
    assert main(["probe", "--config", str(path), "--layers", "2"]) == 0
    assert list(store.load_arrays(tmp_path / "out", "gate_similarity")) == ["gate_cos/2"]
    path.write_text("checkpoints: x\n")
    capsys.readouterr()
    assert main(["probe", "--config", str(path)]) == 2
    assert "did you mean 'checkpoint'" in capsys.readouterr().err


def test_memory_budget_is_read_and_checked():
    assert [parse_bytes(text) for text in ("8GiB", "500 MB", "1.5kib", "12", 7)] == [8 << 30, 500_000_000, 1536, 12, 7]


def test_a_runs_own_checkpoint(tmp_path):
    decoder = random_decoder(num_experts=[0, 4, 5], num_shared_experts=1, tie_word_embeddings=True)
    state = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"model_config": decoder.config.to_dict(), "state_dict": state, "optimizer_states": [{}]}, path)
    assert probe(path, tmp_path / "out") == 0
    live = run_probes(walk(decoder, None, WEIGHTS), [PROBES[name]() for name in FEW])
    for name in FEW:
        found = store.load_arrays(tmp_path / "out", name)
        assert found.keys() == live[name].arrays.keys()
        assert all(np.array_equal(found[key], value) for key, value in live[name].arrays.items())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("probe_*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_well_formed(path):
    options = read_options(["--config", str(path)])
    assert "/" in options["checkpoint"]
    assert options["out"] == f"runs/{path.stem}"
    assert parse_bytes(options["memory_budget"]) >= 4 << 30


def test_a_hub_id_fetches_weights_and_config_only(tmp_path, monkeypatch):
    write(tmp_path / "model", pickled=True)
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = PretrainedMoE("org/name@v1")
    assert model.config.num_experts == 6
    assert [item[:2] for item in asked] == [("org/name", "v1")]
    patterns = asked[0][2]
    assert "config.json" in patterns
    assert not any(fnmatch("consolidated.00.pt", pattern) or fnmatch("modeling_x.py", pattern) for pattern in patterns)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, capsys):
    def download(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert probe("org/name", tmp_path / "out") == 2
    line = capsys.readouterr().err.strip()
    assert "org/name" in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bfloat16", "same_as"), [(800.0, "bfloat16"), (2.0, None)])
def test_dtype_auto_is_bfloat16_where_that_is_faster_and_else_the_default(
    tmp_path, capsys, monkeypatch, bfloat16, same_as
):
    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: (100.0, bfloat16))
    write(tmp_path / "in", dtype=torch.float32)
    given = {}
    init = PretrainedMoE.__init__

    def spy(self, *arguments, **options):
        given.update(options)
        init(self, *arguments, **options)

    monkeypatch.setattr(PretrainedMoE, "__init__", spy)
    assert probe(tmp_path / "in", tmp_path / "out", "--dtype", "auto", probes=FEW[1:]) == 0
    assert given["dtype"] == same_as
    assert f"dtype auto: {same_as or 'as stored, and products in float32'} (a core" in capsys.readouterr().err
    assert probe(tmp_path / "in", tmp_path / "plain", probes=FEW[1:]) == 0
    assert given["dtype"] is None  # asked for by nobody


@pytest.mark.parametrize("first", ["bfloat16", None])
def test_dtype_auto_stays_what_it_was_where_another_kind_of_machine_goes_on(
    tmp_path, capsys, caplog, monkeypatch, first
):
    rates = {"bfloat16": (100.0, 800.0), None: (100.0, 2.0)}
    other = None if first else "bfloat16"
    write(tmp_path / "in", dtype=torch.float32)
    auto = ("--dtype", "auto", "--layers", "0")
    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: rates[first])
    assert probe(tmp_path / "in", tmp_path / "out", *auto) == 0
    arrays = store.load_arrays(tmp_path / "out", "matrix_similarity")
    capsys.readouterr()

    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: rates[other])
    assert probe(tmp_path / "in", tmp_path / "out", *auto[:2]) == 0
    said = capsys.readouterr().err
    assert f"dtype auto: {first or 'as stored, and products in float32'} (as the results in" in said
    assert "1 layers are finished already" in caplog.text
    found = store.load_arrays(tmp_path / "out", "matrix_similarity")
    for key, value in arrays.items():
        np.testing.assert_array_equal(found[key], value)
    plain = ("--dtype", first) if first else ()
    assert probe(tmp_path / "in", tmp_path / "plain", *plain) == 0
    for key, value in store.load_arrays(tmp_path / "plain", "matrix_similarity").items():
        np.testing.assert_array_equal(found[key], value)  # all layers are of one kind

    assert probe(tmp_path / "in", tmp_path / "out", *auto[:2], "--fresh") == 0
    assert f"dtype auto: {other or 'as stored, and products in float32'} (a core" in capsys.readouterr().err


def test_dtype_auto_leaves_the_folder_of_another_model_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: (100.0, 800.0))
    write(tmp_path / "in", dtype=torch.float32)
    assert probe(tmp_path / "in", tmp_path / "out") == 0
    write(tmp_path / "other", dtype=torch.float32)
    results = tmp_path / "out" / "results"
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert probe(tmp_path / "other", tmp_path / "out", "--dtype", "auto") == 2
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before
