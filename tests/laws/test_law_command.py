"""``moebed law`` as a person meets it: tables in, law.json, page and pictures out, or one line that says why not."""

import hashlib
import json

import numpy as np
import pytest
from planted import PLANTED, grid, runs, write_csv

from moebed.cli import main
from moebed.laws.contract import Shape
from moebed.laws.reading import read_table, select
from moebed.laws.registry import LAWS
from moebed.model.flops import count_parameters, scaling_sizes
from tests.conftest import tiny_config

pytestmark = pytest.mark.drawn
FAST = ("--resamples", "40")


@pytest.fixture(scope="module")
def leverage_csv(tmp_path_factory):
    columns = runs("leverage", sigma=0.02)
    columns = {"C": columns["flops"], "A": columns["A"], "granularity": columns["G"], "EL": columns["leverage"]}
    return write_csv(tmp_path_factory.mktemp("leverage") / "runs.csv", columns)


@pytest.fixture(scope="module")
def joint_csv(tmp_path_factory):
    law = LAWS["joint"]
    columns = grid(N=np.geomspace(1e8, 1.5e9, 3), tokens=np.geomspace(3e9, 6e10, 3), num_experts=[1.0, 8.0, 32.0])
    logs = law.log_target(
        law.published, {"N": columns["N"], "tok": columns["tokens"], "E": columns["num_experts"]}
    ) + 0.004 * np.random.default_rng(1).normal(size=27)
    table = {**columns, "loss": np.exp(logs), "seed": np.ones(27)}
    return write_csv(tmp_path_factory.mktemp("joint") / "runs.csv", table)


@pytest.fixture(scope="module")
def joint(joint_csv, tmp_path_factory):
    """A law that was fitted, and its folder."""
    out = tmp_path_factory.mktemp("out") / "joint"
    given = ("--fix", "E_start=2.0732", "--fix", "E_max=290.4521", "--budget", "1e20", *FAST)
    assert main(["law", str(joint_csv), "--form", "joint", "--out", str(out), *given]) == 0
    return out


def _kept(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _fails(capsys, arguments, *words):
    capsys.readouterr()
    assert main(["law", *(str(argument) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:14] for line in lines] == ["moebed: error:"]
    for word in words:
        assert word in lines[0]


def test_what_a_law_leaves(joint):
    assert set(_kept(joint)) == {
        "law.json",
        "law.html",
        "figures/law_loss_contours.png",
        "figures/law_frontiers.png",
        "figures/law_residuals.png",
    }
    content = json.loads((joint / "law.json").read_text(encoding="utf-8"))
    constants = content["fit"]["constants"]
    for name, value in PLANTED["joint"].items():
        assert constants[name]["published"] == value
        low, high = constants[name]["interval"]
        assert low <= constants[name]["value"] <= high or not constants[name]["fixed"]
    assert constants["E_max"]["fixed"]
    assert constants["E_max"]["value"] == pytest.approx(290.4521)
    assert content["table"]["notes"][0] == "not used: column seed"
    assert content["provenance"]["identity"]["form"] == "joint"


def test_what_a_law_says_is_right_and_has_intervals(joint):
    content = json.loads((joint / "law.json").read_text(encoding="utf-8"))
    law, (optima,) = LAWS["joint"], content["optima"]
    for row in optima["shapes"]:
        low, high = row["loss"]["interval"]
        assert low <= row["loss"]["value"] <= high
        assert high / low < 1.05
    planted = {1: (1.73e9, 2.590), 8: (990e6, 2.529), 32: (674e6, 2.472)}  # at 1e20
    for row in optima["shapes"]:
        size, loss = planted[row["shape"]["E"]]
        assert row["published"]["N"] == pytest.approx(size, rel=0.01)
        assert row["loss"]["value"] == pytest.approx(loss, rel=0.008)
    assert optima["best"]["shape"]["E"] == 32
    assert [row["inside"] for row in content["predictions"]] == [True, False, False, False] * 3
    for row in content["predictions"][::4]:
        planted_loss = law.loss(law.published, row["N"], row["tok"], Shape(row["shape"]["E"]))
        assert row["value"] == pytest.approx(planted_loss, rel=0.01)
    said = " ".join(content["sentences"])
    assert "describes 27 runs with a root mean square error of 0.3" in said or "error of 0.2" in said
    assert "For 1e+20 FLOPs E 32 has the lowest loss, 2.4" in said
    assert "cost is taken as all parameters that must be held" in said
    page = (joint / "law.html").read_text(encoding="utf-8")
    assert "<h1>Scaling law joint of runs.csv</h1>" in page
    assert "Other text or another tokenizer alone changes a, b and c." in page
    assert page.count("<img") == 3


def test_twice_gives_the_same_bytes_and_nothing_else_is_mixed_in(leverage_csv, joint_csv, tmp_path, capsys):
    out = tmp_path / "out"
    command = [leverage_csv, "--form", "leverage", "--out", out, *FAST]
    assert main(["law", *map(str, command)]) == 0
    first, said = _kept(out), capsys.readouterr().out
    assert set(first) == {"law.json", "law.html", "figures/law_leverage.png", "figures/law_residuals.png"}
    assert "Leverage is largest at granularity 1" in said
    assert "(published constants: 11.3)" in said
    assert main(["law", *map(str, command)]) == 0
    assert _kept(out) == first
    assert capsys.readouterr().out == said
    other = tmp_path / "other.csv"
    other.write_text(leverage_csv.read_text(encoding="utf-8").replace("\n", "\n\n", 1), encoding="utf-8")
    _fails(capsys, [other, *command[1:]], "law.json was made from something else (table)")
    _fails(capsys, [*command, "--seed", "1"], "made from something else (seed)")
    fixed = ("--fix", "E_start=2", "--fix", "E_max=290")
    _fails(capsys, [joint_csv, "--form", "joint", "--out", out, *FAST, *fixed], "(table, form, fixed)")
    assert _kept(out) == first


def test_other_code_makes_a_folder_anew(leverage_csv, tmp_path, monkeypatch):
    command = ["law", str(leverage_csv), "--form", "leverage", "--out", str(tmp_path / "out"), *FAST]
    monkeypatch.setattr("probes.report.page.write_report", lambda runs, out, first, kind: out)
    monkeypatch.setattr("moebed.laws.figures.draw_all", lambda fitted: {})
    assert main(command) == 0
    before = json.loads((tmp_path / "out" / "law.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("moebed.machine.provenance.code", lambda: "another")
    assert main(command) == 0
    after = json.loads((tmp_path / "out" / "law.json").read_text(encoding="utf-8"))
    assert after["provenance"].pop("code") == "another"
    assert before["provenance"].pop("code") != "another"
    assert after == before


def _table(lines):
    return lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8")


ROWS = [f"{1e8 + i},{1e9 * (1 + i % 5)},{1 + i % 7},{3 + i / 100}" for i in range(30)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["N,tokens,E,loss"], ("has no runs",)),
        (["a,b", "1,2"], ("no column is known, of a, b", "the first line names them")),
        (["N,tokens,E,loss", *ROWS, "1e99,1e9,2,3"], ("column N is 1e99; it must be finite, above 0 and below 1e+60",)),
        (["N,tokens,E,loss,L", *(f"{row},3" for row in ROWS)], ("'loss' and 'L' both mean loss",)),
        (["N,tokens,E,loss", *ROWS[:9], "1e8,1e9,2,nan"], ("line 11, column loss is nan", "leave out runs")),
        (["N,tokens,E,loss", *ROWS, "1e8,1e9,2,-1"], ("line 32, column loss is -1",)),
        (["N,tokens,E,loss", *ROWS, "1e8,1e9,2,inf"], ("column loss is inf",)),
        (["N,tokens,E,loss", *ROWS, "1e8,1e9,two,3"], ("line 32, column E: 'two' is no number",)),
        (
            ["N;tokens;E;loss", *(row.replace(",", ";").replace(".", ",") for row in ROWS)],
            ("write a point for the comma",),
        ),
        (["N,tokens,E,loss", *ROWS, "1e8,1e9,2"], ("line 32: 3 cells under 4 columns",)),
        (["size,tokens,E,loss", *ROWS], ("missing: N (or active_parameters)", "not used: column size")),
        (["N,tokens,E,loss", *ROWS[:15]], ("has 15 runs", "at least 16")),
        (["N,tokens,E,loss", *(f"{i}e8,1e9,8,3" for i in range(1, 31))], ("tok, E are the same in all 30 runs",)),
        (["N,tokens,E,K,loss", *(f"{i}e8,1e9,8,9,3" for i in range(1, 31))], ("more experts a token (K) than",)),
    ],
)
def test_a_table_that_cannot_tell_is_one_line(lines, words, tmp_path, capsys):
    table = tmp_path / "runs.csv"
    _table(lines)(table)
    _fails(capsys, [table, "--form", "joint", "--out", tmp_path / "out"], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--form", "chinchilla"), ("--form is 'chinchilla'; choose one of yun",)),
        (("--form", "joint", "--fix", "A=1"), ("'A' is no constant of joint; it has a, alpha",)),
        (("--form", "joint", "--fix", "a=-1"), ("a must be finite and above 0",)),
        (("--form", "joint", "--fix", "a"), ("give a number",)),
        (("--form", "joint", "--budget", "5"), ("--budget is '5'; give a number of at least 1e+06 and at most 1e+31",)),
        (("--form", "joint", "--resamples", "3"), ("--resamples is '3'; give a whole number of at least 40",)),
        (("--form", "leverage"), ("missing: flops (also C, training_flops, compute), A",)),
    ],
)
def test_options_that_cannot_be_are_one_line(options, words, joint_csv, tmp_path, capsys):
    _fails(capsys, [joint_csv, "--out", tmp_path / "out", *options], *words)


def test_a_table_that_is_not_there(tmp_path, capsys):
    _fails(capsys, [tmp_path / "no.csv", "--form", "yun", "--out", tmp_path], "no.csv cannot be read")
    (tmp_path / "study").mkdir()
    _fails(capsys, [tmp_path / "study", "--form", "yun", "--out", tmp_path], "is a folder, and no table of runs")
    (inside := tmp_path / "study" / "study.json").write_text("{}")
    _fails(capsys, [tmp_path / "study", "--form", "yun", "--out", tmp_path], f"give {inside}")
    _fails(capsys, [tmp_path / "study.json", "--form", "yun", "--out", tmp_path], "does not exist")


def _study(configs, steps_before=()):
    """Content of a study.json: an arm a config, two seeds each, the second of the last arm diverged."""
    arms = {}
    for index, (name, config) in enumerate(configs.items()):
        total, active = count_parameters(config)
        seeds = {
            seed: {"status": "finished", "loss": 3.0 + index / 10 + int(seed) / 100, "folder": "", "why": ""}
            for seed in ("1", "2")
        }
        arms[name] = {
            "steps_before": list(steps_before) if name == "later" else [],
            "settings": {},
            "tokens": 1000 * (index + 1),
            "total_parameters": total,
            "active_parameters": active,
            "active_flops_per_token": 2 * active,
            "sizes": scaling_sizes(config),
            "runs": seeds,
        }
    arms[name]["runs"]["2"] |= {"status": "diverged", "loss": None}
    return {"format": 1, "name": "made up", "arms": arms}


def test_a_study_is_a_table(tmp_path):
    configs = {
        "eight": tiny_config(num_experts=8),
        "later": tiny_config(),
        "ragged": tiny_config(num_experts=[4, 8]),
        "dense": tiny_config(num_experts=0, intermediate_size=96),
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(_study(configs, [["fit", {}]])), encoding="utf-8")
    table = read_table(path)
    assert table.runs == 3
    assert table.columns["E"].tolist() == [8, 8, 1]
    assert table.columns["K"].tolist() == [2, 2, 1]
    assert table.columns["loss"] == pytest.approx([3.01, 3.02, 3.31])
    assert table.columns["tok"].tolist() == [1000, 1000, 4000]
    assert table.columns["flops"][0] == 6 * table.columns["active_parameters"][0] * 1000
    assert [note.split(",")[0] for note in table.notes] == [
        "left out: arm later",
        "left out: arm ragged",
        "left out: arm dense",
    ]
    for form in ("yun", "joint", "krajewski", "abnar"):
        selected = select(LAWS[form], table)
        assert selected.columns["N"].tolist() == table.columns[LAWS[form].size].tolist()
    assert select(LAWS["krajewski"], table).columns["E"][0] == pytest.approx(8 / (8 * 32 / (3 * 48)))


def test_a_study_too_old_or_of_one_size_is_refused(tmp_path, capsys):
    path, content = tmp_path / "study.json", _study({"one": tiny_config()})
    path.write_text(json.dumps(content), encoding="utf-8")
    _fails(capsys, [path, "--form", "yun", "--out", tmp_path / "out"], "has 1 runs that count", "at least 15")
    del content["arms"]["one"]["sizes"]
    path.write_text(json.dumps(content), encoding="utf-8")
    _fails(capsys, [path, "--form", "yun", "--out", tmp_path / "out"], "moebed study RECIPE.yaml --collect")


def test_sizes_as_the_laws_count_them():
    """Hidden 32, two layers, 4 experts of 48, two a token; keys and values half as wide as queries."""
    config = tiny_config()
    sizes = scaling_sizes(config)
    attention, expert, norms = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48, 2 * 32
    total, active = count_parameters(config)
    assert sizes["dense_parameters"] == 2 * (attention + expert + norms)
    assert sizes["total_nonembedding_parameters"] == 2 * (attention + 4 * expert + norms)
    assert (sizes["total_parameters"], sizes["active_parameters"]) == (total, active)
    assert sizes["G"] == pytest.approx(8 * 32**2 / expert)
    assert sizes["expansion_rate"] == pytest.approx(4 * expert / (8 * 32**2))
    dense = scaling_sizes(tiny_config(num_experts=0, intermediate_size=48))
    assert dense["dense_parameters"] == sizes["dense_parameters"]
    assert (dense["E"], dense["K"]) == (1, 1)


def test_leverage_is_read_off_the_tables_own_dense_runs(tmp_path):
    """Dense loss 4 − log₁₀(FLOPs)/10: a model at .1 below that of its own FLOPs has ten times the leverage."""
    flops = np.geomspace(1e18, 1e22, 9)
    dense = {"C": flops, "E": np.ones(9), "K": np.ones(9), "G": np.ones(9), "loss": 4 - np.log10(flops) / 10}
    sparse = {"C": flops, "E": np.full(9, 8.0), "K": np.ones(9), "G": np.full(9, 2.0), "loss": dense["loss"] - 0.1}
    table = read_table(write_csv(tmp_path / "runs.csv", {k: np.concatenate([dense[k], sparse[k]]) for k in dense}))
    found = select(LAWS["leverage"], table)
    assert found.columns["leverage"] == pytest.approx(np.full(7, 10.0), rel=1e-6)
    assert found.columns["A"].tolist() == [1 / 8] * 7
    assert found.notes[-1] == "left out: 2 runs whose loss lies beyond those of the dense runs"
    # Between dense runs as well; and dense runs that are worse than a smaller one say nothing.
    sparse["loss"], ones = dense["loss"] - 0.125, [1, 1]
    bad = {"C": [5e19, 6e19], "E": ones, "K": ones, "G": ones, "loss": [3.0, 2.5]}
    columns = {k: np.concatenate([dense[k], bad[k], sparse[k]]) for k in dense}
    found = select(LAWS["leverage"], read_table(write_csv(tmp_path / "more.csv", columns)))
    assert found.columns["leverage"] == pytest.approx(np.full(6, 10**1.25), rel=1e-6)


def test_what_a_table_leaves_open_is_said(tmp_path):
    columns = {"N": [1e8, 2e8], "D": [1e9, 2e9], "E": [1, 8], "L": [3.0, 2.9]}
    table = select(LAWS["yun"], read_table(write_csv(tmp_path / "a.csv", columns)))
    assert table.columns["K"].tolist() == [1, 2]
    assert table.notes == [
        "N is taken as parameters of the corresponding dense model, without embeddings",
        "no column K: 1/2 is taken",
        "no column G: 1 is taken",
    ]
    path = tmp_path / "c.csv"
    rows = [f"{row}," for row in ("N,tokens,E,loss", *ROWS[:8], ROWS[2], ROWS[5], ",,,")]
    _table([*rows, ""])(path)
    table = read_table(path)
    assert table.runs == 10
    (note,) = table.notes
    assert note.startswith("2 lines repeat an earlier one in every cell (line 10, 11), and each counts as a run")
    granular = {"N": [1e8, 2e8], "tokens": [1e9, 2e9], "G": [1, 8], "loss": [3.0, 2.9]}
    table = select(LAWS["krajewski"], read_table(write_csv(tmp_path / "b.csv", granular)))
    assert table.columns["E"].tolist() == [64, 64]
