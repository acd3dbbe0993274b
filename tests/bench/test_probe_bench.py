"""``moebed bench probe`` at a size that takes a second."""

import json

import pytest

from moebed.bench import command, probe, streaming
from moebed.errors import UserError


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(probe, "DEEPSEEK", (300, 24))
    monkeypatch.setattr(probe, "SOME_EXPERTS", 3)
    sizes = {
        "mixtral": ("Mixtral 8x7B", streaming.Shape(64, 96, 4, 2, 4, 1, 40, 20)),
        "deepseek": ("DeepSeekMoE-16B", streaming.Shape(64, 24, 4, 4, 4, 1, 40, 20)),
    }
    monkeypatch.setattr(probe.weights, "SIZES", sizes)
    monkeypatch.setattr(probe, "STREAMED", streaming.Shape(64, 96, 4, 2, 4, 2, 40, 20))
    monkeypatch.setattr(probe, "big_rows", lambda rounds: [probe._row("big", [2.0], [1.0], 3, False)])


def test_it_measures_prints_and_keeps(tiny, tmp_path, capsys):
    command.run("bench", ["probe", "--rounds", "1", "--json", str(tmp_path / "x.json")])
    kept = json.loads((tmp_path / "x.json").read_text())
    rows = kept["results"]["rows"]
    assert len(rows) == 28
    assert all(0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2] for row in rows)
    names = [row["name"] for row in rows]
    assert "plain read / streamed read, from disk" in names
    assert "pass of 20 tokens / its products alone, bfloat16" in names
    assert rows[-1] == {"name": "big", "ratio": [2.0, 2.0, 2.0], "goal": "≤ 3", "met": True}
    for name in (*probe.weights.MEASURED, "all probes of weights but matching"):
        assert sum(row["name"].startswith(f"{name} / reading and multiplying a layer") for row in rows) == 2
    assert kept["machine"]["versions"]["scipy"]
    out = capsys.readouterr().out
    assert "random, 9 of 6048 pairs" in out
    assert "≤ 4.5" in out


def test_some_rows_alone(tiny, tmp_path, capsys):
    command.run("bench", ["probe", "--rounds", "1", "--only", "weights", "--json", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())["results"]
    rows = found["rows"]
    assert rows
    assert all("reading and multiplying a layer" in row["name"] for row in rows)
    assert "published procedure" not in " ".join(found["notes"])  # nothing is said of rows that are not there
    options = ["--rounds", "1", "--only", "weights", "--size", "deepseek", "--experts", "3"]
    command.run("bench", ["probe", *options, "--json", str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())["results"]["rows"]
    assert rows
    assert all("DeepSeekMoE-16B, 3 of 4 experts" in row["name"] for row in rows)
    with pytest.raises(UserError, match="--experts is '1'; give a whole number of at least 2"):
        command.run("bench", ["probe", "--experts", "1"])
    with pytest.raises(UserError, match="--size huge"):
        command.run("bench", ["probe", "--size", "huge"])
    with pytest.raises(UserError, match="--only speed"):
        command.run("bench", ["probe", "--only", "speed"])


def test_neurons_of_correlated_experts_have_the_cosine_asked_for():
    a, b = probe.experts((200, 400), 2, 0.5, transposed=True)
    cosine = (a.float() * b.float()).sum(1) / a.float().norm(dim=1) / b.float().norm(dim=1)
    assert float(cosine.mean()) == pytest.approx(0.5, abs=0.02)
    assert a.stride() == (1, 200)


def test_no_rounds():
    with pytest.raises(UserError, match="--rounds is '0'; give a whole number of at least 1"):
        command.run("bench", ["probe", "--rounds", "0"])
