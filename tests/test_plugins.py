"""Routers and probes of one's own, as the READMEs show them: trained, probed, exported, refused without their file."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from moebed.cli import main
from moebed.errors import ConfigError, UserError
from moebed.machine.provenance import plugins_record
from moebed.model.config import ModelConfig, RouterOptions, setting
from moebed.model.decoder import Decoder
from moebed.model.routers import ROUTERS, GatedRouter, Router, all_options, register
from moebed.plugins import VARIABLE, load_plugins
from moebed.study.recipe import read_recipe
from moebed.study.runs import plan_study
from moebed.views.live import walk
from probes import Probe
from probes.registry import PROBES, resolve_probes
from probes.running.choosing import probes_for
from probes.running.driver import ProbePass, run_probes
from tests.small_run import probing, small_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}


def _forget():
    for known, own in ((ROUTERS, "cosine"), (PROBES, "confidence"), (ROUTERS, "broken"), (PROBES, "broken")):
        known.pop(own, None)
    for name in [name for name in sys.modules if name.startswith("moebed_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The READMEs' router and probe in one file; forgotten afterwards."""
    shown = [ROOT / "moebed/model/routers/README.md", ROOT / "probes/README.md"]
    router, probe = (re.search(r"```python\n(.*?)```", p.read_text(encoding="utf-8"), re.DOTALL)[1] for p in shown)
    path = tmp_path / "mine.py"
    probe = probe.replace("class Confidence", "@register_probe\nclass Confidence")
    path.write_text(f"{router}\n\nfrom probes import register as register_probe\n{probe}")
    monkeypatch.setenv(VARIABLE, "")
    yield path
    _forget()


@pytest.fixture
def recipe(tmp_path):
    own = {"router": "cosine", "router_options": {"temperature": 0.5}}
    callbacks = probing(4, probes=["confidence"])
    return write_recipe(tmp_path, small_recipe(tmp_path, trainer={"callbacks": callbacks}, config=own))


def test_a_router_and_a_probe_of_ones_own(plugin, recipe, tmp_path, capsys, monkeypatch):
    assert main(["fit", "--plugins", str(plugin), "--config", str(recipe)]) == 0
    assert (
        ROUTERS["cosine"](ModelConfig(**SIZES, router="cosine"), ModelConfig(**SIZES).layer(0)).options.temperature
        == 0.1
    )
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert "confidence" in json.dumps(found)
    last = tmp_path / "run/checkpoints/last.ckpt"
    weights = torch.load(last, weights_only=True)
    assert weights["model_config"]["router_options"] == {"temperature": 0.5}

    asked = ["probe", str(last), "--out", str(tmp_path / "probed"), "--probes", "confidence,router_state"]
    (tmp_path / "short.txt").write_text("the cat sat on the mat")
    assert main([*asked, "--text", str(tmp_path / "short.txt"), f"--plugins={plugin}"]) == 0
    assert (tmp_path / "probed/results/confidence.npz").is_file()
    assert main(["export", str(last), "--out", str(tmp_path / "exported"), "--plugins", str(plugin)]) == 0
    assert json.loads((tmp_path / "exported/config.json").read_text())["config"]["router"] == "cosine"

    _forget()
    monkeypatch.setenv(VARIABLE, "")
    capsys.readouterr()
    assert main([*asked[:3], str(tmp_path / "again")]) == 2
    assert "router is 'cosine'; choose one of" in (said := capsys.readouterr().err)
    assert "--plugins FILE.py" in said


@pytest.mark.slow
def test_runs_of_a_study_and_its_job_array_have_it(plugin, recipe, tmp_path, capsys):
    """Each run is a process of its own; that of the router of one's own is run, as a task of the array would."""
    arms = {"topk": {"model.config.router": "softmax_topk"}, "mine": {}}
    settings = {"trainer.callbacks": []}
    study = tmp_path / "try.yaml"
    study.write_text(yaml.safe_dump({"base": "recipe.yaml", "arms": arms, "seeds": [1], "settings": settings}))
    with pytest.raises(ConfigError, match=r"arm 'mine': unknown key .*router_options\.temperature.* --plugins"):
        plan_study(read_recipe(study), tmp_path / "out")
    asked = ["study", str(study), "--out", str(tmp_path / "out"), "--plugins", str(plugin)]
    assert main([*asked, "--slurm"]) == 0
    assert f"--plugins {plugin}" in capsys.readouterr().out
    assert main([*asked, "--run", "0"]) == 0
    assert main([*asked, "--collect"]) == 0
    runs = json.loads((tmp_path / "out/study.json").read_text())["arms"]
    assert runs["mine"]["runs"]["1"]["status"] == "finished"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist"]),
        ("x = 1\ny = 1 / 0\n", ["cannot be imported", "ZeroDivisionError", "bad.py, line 2"]),
        ("def f(:", ["cannot be imported", "SyntaxError"]),
        (
            "from moebed.model.routers import Router, register\nregister('hash')(Router)",
            ["router 'hash' is Hash already"],
        ),
    ],
)
def test_a_plugin_that_fails_is_one_line(tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.setenv(VARIABLE, "")
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    assert main(["size", "--plugins", str(path), "x.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert "moebed_plugin_bad" not in sys.modules
    assert main(["size", "--plugins"]) == 2
    assert "--plugins wants a Python file" in capsys.readouterr().err


PROBE = """from probes import Probe, ProbeResult, register
from probes.contract import numbers
from moebed.views.layer import Need
@register
class Broken(Probe):
    name, needs = "broken", frozenset({Need.WEIGHTS})
    question = "Which?"
    def update(self, view): self.put("x", view.index, view.gate)
    @classmethod
    def describe(cls, arrays): return ProbeResult(arrays, {"x": numbers(arrays, "x")})
"""
CHOSEN = "self.choose(hidden_states @ self.weight.T)"
DESCRIBED = 'ProbeResult(arrays, {"x": numbers(arrays, "x")})'
ROUTER = """import torch
from moebed.model.routers import GatedRouter, register
@register("broken")
class Broken(GatedRouter):
    def forward(self, hidden_states, experts, context=None):
        return self.choose(hidden_states @ self.weight.T)
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Imports a plug-in named broken with something replaced; forgotten afterwards."""
    monkeypatch.setenv(VARIABLE, "")

    def load(content, old, new):
        _forget()
        assert old in content
        (tmp_path / "broken.py").write_text(content.replace(old, new))
        load_plugins(["--plugins", str(tmp_path / "broken.py")])

    yield load
    _forget()


def test_a_probe_that_gives_something_else_is_one_line(broken):
    for old, new, words in (
        ('    question = "Which?"\n', "", "probe Broken has no question"),
        ("Need.WEIGHTS", "Need.WEIGHT", r"AttributeError: WEIGHT \(.*broken.py, line 6\)"),
        (
            "frozenset({Need.WEIGHTS})",
            "['weights']",
            r"probe 'broken': needs is \['weights'\]; write it such as frozenset",
        ),
        ("view): self", "view) self", r"SyntaxError: .*broken.py, line 8\)"),
    ):
        with pytest.raises(UserError, match=words):
            broken(PROBE, old, new)
    decoder = Decoder(ModelConfig(**SIZES))
    for old, new, words in (
        ("view.gate", "view.gate", r"a probe put 'x' of layer 0 as an array of shape \(4, 32\)"),
        ("return ProbeResult(arrays, {", "return None and ({", "probe broken: describe gives a NoneType"),
        ("view.gate", "1.0)  #", "probe broken: scalars has 'x' of type dict; it must be a number"),
        (DESCRIBED, "ProbeResult(arrays, [1])", "scalars is of type list; it must have each by its name"),
        (DESCRIBED, 'ProbeResult(arrays, {}, {"x": "one"})', "headlines has 'x' of type str; it must be a Headline"),
        (DESCRIBED, 'ProbeResult(arrays, figures={"x": 3})', "figures has 'x' of type int; it must be a function"),
    ):
        broken(PROBE, old, new)
        with pytest.raises(ConfigError, match=words):
            run_probes(walk(decoder, None, PROBES["broken"].needs), [PROBES["broken"]()])


def test_a_router_that_gives_something_else_is_one_line(broken):
    with pytest.raises(ConfigError, match=r"forward of Broken is to take \(self, hidden_states, experts"):
        broken(ROUTER, "(self, hidden_states, experts, context=None)", "(self, hidden_states)")
    for old, new, words in (
        ("return ", "", "router Broken: forward gives a NoneType; it must return a Routing"),
        (".T)", ".T[:, :3])", r"router_logits has shape \(8, 3\); of 8 tokens and 4 experts it must be \(8, 4\)"),
        (CHOSEN, f"({CHOSEN})._replace(topk_index=torch.ones(8, 2))", "topk_index is torch.float32 and topk_weight"),
        (CHOSEN, f"({CHOSEN})._replace(topk_index=torch.full((8, 2), 9))", "topk_index has numbers from 9 to 9; of 4"),
    ):
        broken(ROUTER, old, new)
        decoder = Decoder(ModelConfig(**SIZES, router="broken"))
        with pytest.raises(ConfigError, match=words):
            decoder(torch.zeros(2, 4, dtype=torch.int64))


def test_what_a_plugins_code_raises_is_one_line_and_with_v_its_traceback(broken, tmp_path, capsys):
    """Whichever command it is in; the line is that of the plug-in, though a library beneath it raised."""
    weights, asked = tmp_path / "model.ckpt", ["--out", str(tmp_path / "out"), "--probes", "broken"]
    config = ModelConfig(**SIZES)
    state = {f"decoder.{name}": tensor for name, tensor in Decoder(config).state_dict().items()}
    torch.save({"state_dict": state, "model_config": config.to_dict()}, weights)
    broken(PROBE, "view.gate)", "view.gate @ view.gate)")
    assert main(["probe", str(weights), *asked]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    where = f"plugin {tmp_path / 'broken.py'}, line 8, in update"
    assert f"moebed: error: {where}: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in said
    assert said.endswith("; -v shows how it came there")
    with pytest.raises(RuntimeError):
        main(["probe", str(weights), *asked, "-v", "--fresh"])


def test_two_files_of_one_name_are_both_imported(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("SEEN", "")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin.py").write_text(f"import os\nos.environ['SEEN'] += '{folder}'\n")
    both = f"{tmp_path}/a/twin.py,{tmp_path}/b/twin.py"
    try:
        for _ in range(2):
            load_plugins(["--plugins", both])
            assert os.environ["SEEN"] == "ab"
        record = plugins_record()
        assert len(record["twin.py"]) == 2
        assert record["twin.py"][0] != record["twin.py"][1]
    finally:
        _forget()


def test_plugins_are_imported_once_and_modules_by_name(tmp_path, monkeypatch):
    (tmp_path / "counted_plugin.py").write_text("import os\nos.environ['TIMES'] += 'x'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TIMES", "")
    monkeypatch.setenv(VARIABLE, "counted_plugin")
    assert load_plugins(["--a", "--plugins=counted_plugin", "b"]) == ["--a", "b"]
    assert load_plugins([]) == []

    assert (os.environ["TIMES"], os.environ[VARIABLE]) == ("x", "counted_plugin")


def test_options_of_a_router_of_ones_own(plugin, capsys):
    """Typed, in --help with their sentence, checked, and still found where they were once written."""
    load_plugins([f"--plugins={plugin}"])
    for options in ({"temperature": 0.5}, {"own": {"temperature": 0.5}}, {"d_low": 4, "own": {"temperature": 0.5}}):
        assert ModelConfig(**SIZES, router="cosine", router_options=options).router_options.temperature == 0.5
    with pytest.raises(ConfigError, match=r"router_options\.temperature is -1; it must be at least 0"):
        ModelConfig(**SIZES, router="cosine", router_options={"temperature": -1})
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.config.router_options.temperature TEMPERATURE What the cosines are divided by. (cosine)" in shown
    assert main(["fit", "--model.config.router_options.temperature", "warm"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_settings_of_one_name_keep_their_own_defaults():
    """What is not given is each router's own default, and what --help cannot show as one it shows as none."""

    @register("shy")
    class Shy(GatedRouter):
        @dataclass
        class Options(RouterOptions):
            """Settings."""

            seed: int = setting("Of the shyness.", 7)

    try:
        every = all_options()()
        assert every.seed is None
        shown = {name: ModelConfig(**SIZES, router=name, router_options=every) for name in ("shy", "hash")}
        assert {name: config.router_options.seed for name, config in shown.items()} == {"shy": 7, "hash": 0}
        assert "seed: Of the draw of the steps with competition. (competesmoe, competesmoe_v2)" in all_options().__doc__
    finally:
        del ROUTERS["shy"]


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="'softmax_topk' is SoftmaxTopK already"):
        register("softmax_topk")(Router)


def test_a_probe_of_a_probe_of_a_probe(tmp_path, monkeypatch):
    """Sources of sources come with it, each before who takes numbers from it."""
    seen = []

    def make(name, of):
        class Own(Probe):
            question = "?"
            needs = frozenset()
            sources = of

            def derive(self, found):
                seen.append((name, sorted(found)))

        Own.name = name
        monkeypatch.setitem(PROBES, name, Own)

    make("third", ("second",))
    make("second", ("first", "balance"))
    make("first", ("expert_outputs",))
    names = resolve_probes(["third"])
    assert sorted(names) == sorted(["expert_outputs", "first", "balance", "second", "third"])
    assert all(names.index(source) < names.index(name) for name in names for source in PROBES[name].sources)
    assert "third" in probes_for(["all"], with_text=True)
    assert "third" not in probes_for(["all"], with_text=False)
    ProbePass([PROBES[name]() for name in reversed(names)]).results()
    assert seen == [("first", ["expert_outputs"]), ("second", ["balance", "first"]), ("third", ["second"])]


def test_a_file_edited_within_a_second_is_not_what_it_was(tmp_path, monkeypatch):
    """Bytecode that Python keeps says the second and the size of its source, which may be the same of another."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "edited.py"
    try:
        for value in "12":
            path.write_text(f"import os\nos.environ['SEEN'] = '{value}'\n")
            os.utime(path, (1e9, 1e9))
            load_plugins(["--plugins", str(path)])
            assert os.environ["SEEN"] == value
            sys.modules.pop("moebed_plugin_edited")
    finally:
        os.environ.pop("SEEN", None)
