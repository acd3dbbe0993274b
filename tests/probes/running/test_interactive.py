"""``moebed.load`` and ``moebed.probe``: from Python and in a notebook."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import moebed
from moebed.cli import main
from moebed.errors import ConfigError, UserError
from moebed.machine.units import human
from moebed.model.flops import count_parameters
from tests.small_run import small_recipe, write_recipe

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "recipes" / "probing.ipynb"
PUBLIC = ["ConfigError", "Decoder", "MoEModule", "ModelConfig", "TextDataModule", "UserError", "load", "probe"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["fit", "--config", str(write_recipe(folder, small_recipe(folder)))]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_the_public_names_are_these():
    assert moebed.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(moebed, name).__doc__


def test_it_finds_what_the_command_finds(checkpoint, tmp_path):
    texts = ["the cat sat on the mat", "and saw 7. " * 9]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    files = [str(tmp_path / f"{number}.txt") for number in range(2)]
    assert (
        main(["probe", str(checkpoint), "--out", str(tmp_path / "out"), "--probes", "routing", "--text", *files]) == 0
    )
    model = moebed.load(checkpoint)
    total, active = count_parameters(model.config)
    assert f"4 experts, 2 a token, {human(total)} parameters, {human(active)} active" in repr(model)
    found = moebed.probe(model, texts, ["routing", "balance"])
    assert list(found) == ["routing", "balance"]
    kept = np.load(tmp_path / "out" / "results" / "routing.npz")
    assert kept.files
    for key in kept.files:
        if kept[key].dtype.kind == "f":
            np.testing.assert_allclose(found["routing"].arrays[key], kept[key], atol=1e-6)  # sums in another order
        else:
            np.testing.assert_array_equal(found["routing"].arrays[key], kept[key])


@pytest.mark.drawn
def test_a_finding_says_and_draws_itself(checkpoint):
    found = moebed.probe(moebed.load(checkpoint), {"a": ["one two three"], "b": ["four five six"]}, ["domain_share"])
    one = found["domain_share"]
    for headline in one.headlines.values():
        assert headline.sentence in repr(one)
        assert headline.sentence.split()[0] in found._repr_html_()
    assert one.draw().axes
    assert one._repr_html_().count("<img") == len(one.pictures) > 0
    with pytest.raises(ConfigError, match="has no picture 'nothing'"):
        one.draw("nothing")
    with pytest.raises(KeyError, match="did you mean 'domain_share'"):
        found["domain_shar"]


def test_ids_need_no_tokenizer_and_weights_no_text(checkpoint):
    decoder = moebed.load(checkpoint).decoder
    assert moebed.probe(decoder, torch.arange(8).view(2, 4), ["balance"])["balance"].headlines
    assert moebed.probe(decoder, probes=["gate_similarity"])["gate_similarity"].scalars
    with pytest.raises(UserError, match="has no tokenizer"):
        moebed.probe(decoder, "text")
    with pytest.raises(ConfigError, match="balance needs text"):
        moebed.probe(decoder, probes=["balance"])
    with pytest.raises(UserError, match="at least one"):
        moebed.probe(moebed.load(checkpoint), [])


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Each cell in turn, the last expression shown as a notebook shows it; few steps of training in place of many."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum("steps = 100" in source for source in code) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    names: dict = {}
    shown = []
    for source in code:
        *body, last = ast.parse(source.replace("steps = 100", "steps = 2")).body
        exec(compile(ast.Module([*body] if isinstance(last, ast.Expr) else [*body, last], []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    assert any("<img" in one for one in shown)
    assert (tmp_path / "runs" / "notebook" / "run_summary.json").exists()
