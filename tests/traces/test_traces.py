"""Traces: a model's, read back, gives its numbers; what engines write is read; what is damaged is refused."""

from __future__ import annotations

import base64
import io
import json
import random

import numpy as np
import pytest
import torch

from moebed.checkpoints.whole import write_checkpoint
from moebed.cli import main
from moebed.errors import ConfigError, UserError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.traces.files import FORMATS, read_trace, write_trace
from moebed.traces.paths import is_trace
from moebed.traces.trace import RoutingTrace, text_of
from moebed.views.layer import Need
from moebed.views.live import walk
from probes.registry import make_probes
from probes.running import choosing, store
from probes.running.choosing import probes_that_fit
from probes.running.driver import needs_of, run_probes
from probes.running.traced import trace_of_results

OF_CHOICES = ("balance", "domain_share", "domain_purity", "repeats", "coactivation", "vocabulary")
SIZES = {
    "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "initializer_range": 0.3, "experts_backend": "loop",
}  # fmt: skip


def some_text():
    draw = np.random.default_rng(1)
    ids = [draw.integers(0, 12, size=length) for length in (30, 17, 24, 30)]
    return text_of(ids, ["prose", "code", "prose", "code"], [f"w{number}" for number in range(101)])


def trace(**changes) -> RoutingTrace:
    draw = np.random.default_rng(0)
    choices = {layer: np.argsort(draw.random((101, 6)), axis=1)[:, :width] for layer, width in ((1, 2), (2, 3))}
    return RoutingTrace("made", "made", choices, {1: 6, 2: 6}, some_text(), **changes)


@pytest.mark.parametrize("kind", FORMATS)
def test_probes_of_a_models_trace_are_those_of_the_model(kind, tmp_path):
    decoder = Decoder(ModelConfig(**SIZES | {"num_experts": [0, 6, 6], "intermediate_size": 16}))
    probes = make_probes([*OF_CHOICES, "routing"])
    model = run_probes(walk(decoder, some_text(), needs_of(probes)), probes)
    store.save_arrays(tmp_path, "routing", model["routing"].arrays)
    write_trace(trace_of_results(tmp_path), tmp_path / "trace.jsonl", kind)
    found = read_trace(tmp_path / "trace.jsonl")
    assert list(found.choices) == [1, 2]
    names, left_out = probes_that_fit(None, found.offers, "a trace")
    assert set(names) == set(OF_CHOICES)
    assert any("no router logits" in line and "router_state" in line for line in left_out)
    traced = run_probes(found.views(found.text, needs_of(make_probes(names))), make_probes(names))
    for name in OF_CHOICES:
        wanted = {key: one for key, one in model[name].arrays.items() if "predicted" not in key}
        assert traced[name].arrays.keys() == wanted.keys(), name
        for key, one in wanted.items():
            np.testing.assert_array_equal(traced[name].arrays[key], one, err_msg=f"{name} {key}")
        for key, headline in traced[name].headlines.items():
            assert headline == model[name].headlines[key]


def test_the_command_writes_one_and_reads_it(tmp_path, capsys):
    torch.manual_seed(0)
    folder = write_checkpoint(Decoder(ModelConfig(**SIZES)), "moebed", tmp_path / "model", torch.float32)
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(4, 12) % 12)
    asked = ["probe", str(folder), "--out", str(tmp_path / "a"), "--input-ids", str(tmp_path / "ids.npy")]
    saved, back = tmp_path / "t.jsonl", tmp_path / "b.jsonl"
    assert main([*asked, "--probes", "balance", "--save-trace", str(saved), "--trace-format", "megatron"]) == 0
    again = ["probe", str(saved), "--out", str(tmp_path / "b"), "--save-trace", str(back)]
    assert main([*again, "--probes", "balance"]) == 0
    one, other = (json.loads((tmp_path / out / "summary.json").read_text(encoding="utf-8")) for out in "ab")
    assert one["probes"]["balance"]["headlines"] == other["probes"]["balance"]["headlines"]
    assert other["model"]["model_type"] == "trace of megatron"
    assert (tmp_path / "b" / "report.html").exists()
    for layer, index in read_trace(saved).choices.items():
        np.testing.assert_array_equal(read_trace(back).choices[layer], index)
    capsys.readouterr()
    for options, said in (
        (["--probes", "router_state"], "router_state cannot run: a trace has no router logits"),
        (["--text", "paper-short"], "--text does nothing with a trace"),
        (["--num-experts", "4"], "names expert 5, but has 4 experts"),
    ):
        assert main([*again[:2], "--out", str(tmp_path / "c"), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "c").exists()


def npy(rows) -> str:
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def test_what_vllm_answers_is_read(tmp_path):
    """Prompt of 3 tokens, 2 generated, the last of which goes through no layer; 2 layers, K = 2."""
    rows = np.stack([[[5, i % 5], [5, (i + 1) % 5]] for i in range(8)]).astype(np.int16)
    prompt, ids = [7, 8, 9], [10, 11]
    cached = np.where(np.arange(3)[:, None, None] < 1, -1, rows[:3])
    answers = [
        {"prompt_token_ids": prompt, "prompt_routed_experts": rows[:3].tolist(),  # 0.21, of two completions
         "choices": [{"token_ids": ids, "routed_experts": rows[3:4].tolist()},
                     {"token_ids": ids, "routed_experts": rows[4:5].tolist()}]},
        {"prompt_token_ids": prompt, "choices": [{"token_ids": ids, "routed_experts": npy(rows[:4])}]},
        {"prompt_token_ids": prompt, "choices": [{"token_ids": ids, "routed_experts": rows[2:4].tolist()}]},  # a chat
        {"prompt_routed_experts": cached.tolist(), "choices": [{"routed_experts": None}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers), encoding="utf-8")
    found = read_trace(tmp_path / "a.jsonl")
    assert found.text.token_mask.sum(dim=1).tolist() == [4, 1, 4, 2, 2]
    assert found.text.token_ids.tolist() == [7, 8, 9, 10, 10, 7, 8, 9, 10, 9, 10, -1, -1]
    wanted = np.concatenate([rows[:4], rows[4:5], rows[:4], rows[2:4], rows[1:3]])
    for layer in (0, 1):
        np.testing.assert_array_equal(found.choices[layer], wanted[:, layer])
    assert found.num_experts == {0: 6, 1: 6}
    assert [note.split(": ")[-1].split(";")[0] for note in found.notes] == [
        "taken to be 6",
        "1 tokens whose experts vLLM did not know are left out",
        "layers are counted from 0, those without experts are not",
    ]


def record(step, layer, rank, indices, **more):
    shape = {"num_tokens": len(indices), "topk": len(indices[0]), "top_indices": indices}
    return {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank} | shape | more


def test_what_megatron_writes_is_read(tmp_path):
    """Two ranks with tokens of their own, a third that shares those of the first, and a step that was cut off."""
    first, second = [[0, 3], [1, 2]], [[4, 5], [0, 1], [2, 3]]
    lines = {
        0: [record(0, layer, 0, first) for layer in (1, 2)] + [record(0, 0, 0, first, block="mtp", mtp_idx=0)],
        1: [record(step, layer, 1, second) for step in (0, 1) for layer in (1, 2)] + [record(2, 1, 1, second)],
        2: [record(0, layer, 2, first) for layer in (1, 2)],
    }
    for rank, records in lines.items():
        file = tmp_path / f"router_trace_rank{rank}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    assert is_trace(tmp_path)
    found = read_trace(tmp_path, num_experts=8)
    assert found.num_experts == {1: 8, 2: 8}
    np.testing.assert_array_equal(found.choices[2], first + second + second)
    assert found.text.token_mask.sum(dim=1).tolist() == [2, 3, 3]
    assert found.offers == {Need.CHOICES}
    for said in (
        "1 records of other blocks",
        "1 steps of a rank that lack",
        "1 copies of other",
        "which tokens follow",
    ):
        assert any(said in note for note in found.notes), said
    names, left_out = probes_that_fit(None, found.offers, "a trace")
    assert "repeats" not in names
    assert any("no order of tokens: left out repeats" in line for line in left_out)
    with pytest.raises(ConfigError, match=r"repeats cannot run: a trace has no order of tokens"):
        probes_that_fit(["repeats"], found.offers, "a trace")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_hundred_mutated_traces_are_read_or_refused_in_a_line_each(kind, tmp_path):
    path = tmp_path / "t.jsonl"
    write_trace(trace(), path, kind)
    content, draw, refused = path.read_bytes(), random.Random(5), 0
    for number in range(100):
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(changed))
            way = draw.randrange(4)
            if way == 0:
                changed[place] = draw.choice(b'0987654321-[]{},"xe.')
            elif way == 1:
                del changed[place : place + draw.choice((1, 2, 40, 4000))]
            elif way == 2:
                changed[place:place] = draw.choice(
                    (b"9", b"99999999999999999999", b"[", b"null", b"-", b"1e9", b"\xff")
                )
            else:
                changed = changed[: place or 1]
        path.write_bytes(changed)
        said = ""
        try:
            read_trace(path)
        except UserError as error:
            said = str(error)
        assert "\n" not in said, number
        assert not said or "t.jsonl" in said, number
        refused += bool(said)
    assert refused > 60


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "is empty"),
        ('{"a": 1}', "is neither a record of Megatron's routing"),
        ("[" * 100000, "line 1 is no JSON"),
        ('{"prompt_routed_experts": [[[0, 0]]]}', "token 0 names an expert twice"),
        ('{"prompt_routed_experts": [[[0, 1]], [[2]]]}', "lists are not of one length"),
        ('{"prompt_routed_experts": [[[0, 30000]]]}', "names expert 30000; if layers have so many, say --num-experts"),
        ('{"prompt_routed_experts": [[[0, 0.5]]]}', "holds no whole numbers in 3 dimensions"),
        ('{"prompt_routed_experts": [[[-1, -1]]]}', "knows the experts of no token"),
        ('{"choices": [{"routed_experts": "AAAA"}]}', "is no array in base64"),
        ('{"step": 0, "layer": 0, "rank": 0, "top_indices": [[1]], "num_tokens": 2}', "is not of num_tokens and topk"),
        ('{"step": 0, "layer": 0, "rank": 0, "top_indices": [[1]], "num_experts": 1}', "has 1 experts"),
        ('{"step": 0, "layer": 0, "rank": 0, "top_indices": [[1]], "sequence_lengths": [2]}', "do not add up to the 1"),
    ],
)
def test_what_is_no_trace_is_refused(line, said, tmp_path):
    (tmp_path / "t.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_trace(tmp_path / "t.jsonl")


def test_an_array_is_not_believed_to_be_of_the_size_that_it_says(tmp_path):
    small = base64.b64decode(npy(np.zeros((2, 1, 2), np.int16)))
    large = small.replace(b"(2, 1, 2)", b"(2000000, 1000, 200)".ljust(9)).replace(b" " * 11, b"", 1)
    line = {"choices": [{"routed_experts": base64.b64encode(large).decode()}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(UserError, match="is no array in base64"):
        read_trace(tmp_path / "t.jsonl")


def test_whatever_a_probe_needs_has_a_name_where_it_is_not_to_be_had():
    assert set(choosing._CALLED) == set(Need)
