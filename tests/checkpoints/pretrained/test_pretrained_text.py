"""Text through a streamed checkpoint: the oracles' values, a live model's numbers, reading once, going on, faults."""

import json

import numpy as np
import pytest
import torch
from checkpoint_files import write
from streamed_cases import CASES, Reads, make_text, stopped_and_continued

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.views.attending import attention_groups
from moebed.views.layer import Need, ProbeText
from moebed.views.live import walk
from probes.registry import PROBES, resolve_probes
from probes.running import store
from probes.running.choosing import probes_for
from probes.running.driver import needs_of, run_probes
from tests import oracle_shares
from tests.conftest import ORACLES

_ALL = probes_for(["all", "logits"], True)
WITH_TEXT = resolve_probes([n for n in _ALL if PROBES[n].sources or not PROBES[n].needs <= {Need.WEIGHTS}])
oracles = pytest.mark.shared("oracles")


def run(model, names=WITH_TEXT):
    probes = [PROBES[name]() for name in names]
    try:
        return run_probes(model.views(model.text, needs_of(probes)), probes)
    finally:
        model.close()


def assert_equal_results(found, wanted):
    assert found.keys() == wanted.keys()
    for name, result in wanted.items():
        assert found[name].arrays.keys() == result.arrays.keys(), name
        for key, value in result.arrays.items():
            other = found[name].arrays[key]
            if value.dtype.kind in "iU":
                np.testing.assert_array_equal(other, value, err_msg=f"{name} {key}")
            else:
                np.testing.assert_allclose(other, value, rtol=1e-4, atol=2e-5, err_msg=f"{name} {key}")


@oracles
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("name", ["mixtral", "deepseekmoe", "grok-1"])
def test_every_dynamic_value_of_the_oracles(name, length, monkeypatch):
    wanted = np.load(ORACLES / name / f"expected_dynamic_{length}.npz")
    ids = torch.from_numpy(wanted["input_ids"]).unsqueeze(0)
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    reference = str(ORACLES / "mistral") if name == "mixtral" else None

    def arrays_of(*names):
        model = PretrainedMoE(str(ORACLES / name), reference_dense=reference, text=text)
        return {key: value for result in run(model, names).values() for key, value in result.arrays.items()}

    found = arrays_of("logits", "routing", "norm_vs_score", "expert_outputs", "activations")
    compared = set()
    for key in set(wanted.files) - {"input_ids"}:
        value, kind = found[key], key.split("/")[0]
        if kind in ("output_cos", "output_angular_mean"):  # the reference is one more, the last
            size = wanted[key].shape[-1]
            value = value[..., :size, :size]
        if kind in ("topk_index", "rank_count_score_by_norm"):
            np.testing.assert_array_equal(value, wanted[key], err_msg=key)
        elif kind != oracle_shares.KEY:
            np.testing.assert_allclose(
                value, wanted[key], rtol=1e-4, atol=1e-4 * np.abs(wanted[key]).max(), err_msg=key
            )
        compared.add(kind)
    oracle_shares.assert_shares(wanted, lambda: arrays_of("activations"), monkeypatch)
    assert len(compared) == (12 if name == "mixtral" else 11)


@oracles
def test_the_command_with_text(tmp_path, capsys):
    """Two sequences and a reference by the command, and what it writes."""
    wanted = [np.load(ORACLES / "mixtral" / f"expected_dynamic_{length}.npz") for length in ("short", "long")]
    files = []
    for number, expected in enumerate(wanted):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], expected["input_ids"])
    options = ["--input-ids", *map(str, files), "--save-logits", "--probes", "routing,norm_vs_score"]
    options += ["--reference-dense", str(ORACLES / "mistral")]
    assert main(["probe", str(ORACLES / "mixtral"), "--out", str(tmp_path / "out"), *options]) == 0
    logits = store.load_arrays(tmp_path / "out", "logits")["logits"]
    np.testing.assert_allclose(logits, np.concatenate([e["logits"] for e in wanted]), rtol=1e-4, atol=1e-4)
    assert store.load_arrays(tmp_path / "out", "routing")["sequence_start"].tolist() == [0, 6]
    norms = store.load_arrays(tmp_path / "out", "norm_vs_score")
    for key in ("output_norm/2", "dense_ffn_output_norm/2"):
        np.testing.assert_allclose(norms[key], np.concatenate([e[key] for e in wanted]), rtol=1e-4)
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["probes"]) == {
        "logits", "routing", "norm_vs_score",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("case", "budget"),
    [
        pytest.param(case, budget, id=f"{name}-{budget}", marks=pytest.mark.slow if number % 2 == whole else ())
        for number, (name, case) in enumerate(CASES.items())
        for budget, whole in (("1GiB", True), ("260kB", False))
    ],
)
def test_a_streamed_checkpoint_gives_the_numbers_of_a_live_model(case, budget, tmp_path):
    decoder, text = write(tmp_path, **case), make_text(9, 4, 1, 12)
    probes = [PROBES[name]() for name in WITH_TEXT]
    live = run_probes(walk(decoder, text, needs_of(probes)), probes)
    assert_equal_results(run(PretrainedMoE(str(tmp_path), memory_budget=budget, text=text)), live)


def test_bfloat16_is_close_to_float32(tmp_path):
    write(tmp_path, num_experts_per_tok=6)  # all, because a near tie may be decided either way
    text = make_text(30, 30)
    wide, narrow = (run(PretrainedMoE(str(tmp_path), text=text, dtype=d), ("logits",)) for d in (None, "bfloat16"))
    a, b = (result["logits"].arrays["logits"] for result in (wide, narrow))
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize("probes", [("routing",), ("norm_vs_score", "prediction"), WITH_TEXT])
def test_each_weight_is_read_once(probes, tmp_path, monkeypatch):
    write(tmp_path, num_experts_per_tok=2)
    reads = Reads(monkeypatch)
    run(PretrainedMoE(str(tmp_path), text=make_text(20, 30)), probes)
    assert set(reads.values()) == {1}
    assert sum(".w2." in name for name, _ in reads) == 3 * 6 * 32  # down of 6 experts in 3 layers, 32 rows each


def test_a_layer_larger_than_the_budget_is_read_an_expert_at_a_time(tmp_path, monkeypatch):
    write(tmp_path, num_experts=32, num_experts_per_tok=2)
    reads, text = Reads(monkeypatch), make_text(20, 30)
    model = PretrainedMoE(str(tmp_path), text=text, memory_budget="200kB")
    probes = [PROBES[name]() for name in ("norm_vs_score", "prediction")]
    views = model.views(text, needs_of(probes))
    assert model._pool.limit < 32 * 3 * 24 * 32 * 2
    run_probes(views, probes)
    model.close()
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("budget", ["1GiB", "700kB", "200kB", "150kB"])
def test_what_is_read_is_what_was_planned(tmp_path, budget):
    """With weights, text and a dense reference: in order, and each group once, however little fits."""
    write(tmp_path / "model", num_experts=12, num_experts_per_tok=2, num_hidden_layers=2)
    write(tmp_path / "dense", family="mistral", num_experts=0, num_hidden_layers=2)
    text = make_text(9, 4)
    dense = str(tmp_path / "dense")
    model = PretrainedMoE(str(tmp_path / "model"), reference_dense=dense, text=text, memory_budget=budget)
    done, read, original = [], [], Checkpoint.read_into

    def read_into(checkpoint, part, out):
        read.append(checkpoint.num_bytes(part))
        original(checkpoint, part, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read_into", read_into)
        probes = [PROBES[name]() for name in ("norm_vs_score", "matrix_similarity", "expert_outputs")]
        views = model.views(text, needs_of(probes))
        model.on_read = done.append
        planned, beside = model.bytes_total, 2 * len(text.token_ids.unique()) * 32 * 2  # the rows of the embeddings
        run_probes(views, probes)
    model.close()
    assert done == sorted(done)
    assert 0 < done[-1] < planned
    assert sum(read) <= planned + 40 * beside


def test_a_stopped_pass_goes_on_where_it_was(tmp_path, monkeypatch):
    names = "routing,norm_vs_score,prediction,coactivation,vocabulary,repeats,expert_outputs"
    probe, reads = stopped_and_continued(tmp_path, monkeypatch, "norm_vs_score", "--probes", names)
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.", "model.embed")) for name, _ in reads)
    for name in names.split(","):
        whole, other = store.load_arrays(tmp_path / "whole", name), store.load_arrays(tmp_path / "out", name)
        assert whole.keys() == other.keys(), name
        for key, value in whole.items():
            np.testing.assert_array_equal(other[key], value, err_msg=f"{name} {key}")
    reads.clear()
    assert probe("out") == 0
    assert not reads


def test_layers_that_are_not_asked_for_are_passed_through(tmp_path):
    write(tmp_path, num_experts_per_tok=2)
    text = make_text(20, 30)
    whole = run(PretrainedMoE(str(tmp_path), text=text), ("routing",))["routing"].arrays
    part = run(PretrainedMoE(str(tmp_path), text=text, layers=[2]), ("routing",))["routing"].arrays
    assert "router_probs/1" not in part
    np.testing.assert_allclose(part["router_probs/2"], whole["router_probs/2"], rtol=1e-5)


def test_hidden_states_that_overflow_are_a_gap(tmp_path, capsys):
    decoder = write(tmp_path / "unused")
    with torch.no_grad():
        decoder.layers[1].self_attn.o_proj.weight.mul_(1e38)
        decoder.layers[1].self_attn.v_proj.weight.mul_(1e3)
    from moebed.checkpoints import write_checkpoint

    write_checkpoint(decoder, "mixtral", tmp_path / "model", torch.float32)
    np.save(tmp_path / "ids.npy", make_text(8).input_ids.numpy())
    arguments = ["--input-ids", str(tmp_path / "ids.npy"), "--probes", "routing,norm_vs_score,gate_similarity"]
    assert main(["probe", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    assert len(error) == 1
    assert "layer 1" in error[0]
    assert "Inf" in error[0] or "NaN" in error[0]
    arrays = store.load_arrays(tmp_path / "out", "norm_vs_score")
    assert {key.split("/")[1] for key in arrays if key.startswith("output_norm")} == {"0"}
    # Weights of later layers are looked at all the same.
    assert {key.split("/")[1] for key in store.load_arrays(tmp_path / "out", "gate_similarity")} == {"0", "2"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert any("layer 1 is missing" in note for note in summary["probes"]["norm_vs_score"]["notes"])


def test_sequences_of_like_length_attend_together():
    lengths = torch.tensor([5, 100, 98, 0, 6, 3000, 2990])
    groups = attention_groups(lengths)
    seen = torch.cat([group[group >= 0] for group in groups])
    assert sorted(seen.tolist()) == list(range(int(lengths.sum())))
    assert sorted(len(group) for group in groups) == [2, 2, 2]
    assert sum(group.numel() for group in groups) < 1.01 * int(lengths.sum())


@pytest.mark.parametrize("name", WITH_TEXT)
def test_one_token_is_enough_or_said(name, tmp_path):
    write(tmp_path, num_experts_per_tok=2)
    result = run(PretrainedMoE(str(tmp_path), text=make_text(1)), (*PROBES[name].sources, name))[name]
    assert result.notes or result.headlines
    for value in result.scalars.values():
        assert np.isfinite(value)
    for build in result.figures.values():
        build()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gpu_gives_the_numbers_of_a_cpu(case, tmp_path):
    write(tmp_path, **case)
    text = make_text(9, 4, 1, 12)
    on_cpu = run(PretrainedMoE(str(tmp_path), text=text))
    assert_equal_results(run(PretrainedMoE(str(tmp_path), text=text).to("cuda")), on_cpu)
