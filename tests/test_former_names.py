"""What people keep from before modules were moved: a run's config.yaml is read, a plug-in is told the new name."""

from pathlib import Path

import pytest
import yaml

from moebed.cli import main
from moebed.former_names import FORMER, present_name, with_present_names
from moebed.study.resolving import resolve

ROOT = Path(__file__).resolve().parents[1]


def is_there(module):
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("former", FORMER)
def test_the_former_name_is_free_and_the_present_one_a_module(former):
    assert not is_there(former)
    assert is_there(FORMER[former])


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_config_has_present_names_where_it_names_classes_alone(quote):
    text = f"- class_path: {quote}moebed.callbacks.StepFile{quote}\n  init_args: {{path: moebed.callbacks/x}}\n"
    assert with_present_names(text) == text.replace("moebed.callbacks.StepFile", "moebed.training.callbacks.StepFile")
    kept = '{"class_path": "probes.ProbeCallback", "note": "probes.callback"}'
    assert with_present_names(kept) == kept
    assert present_name("moebed.callbacks_of_mine.X") == "moebed.callbacks_of_mine.X"


def test_the_config_of_a_run_from_before_is_read(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_experts": 0, "intermediate_size": 32}
    callbacks = [
        {"class_path": "moebed.callbacks.StepFile", "init_args": {"path": str(tmp_path / "step")}},
        {"class_path": "probes.callback.ProbeCallback", "init_args": {"probes": ["balance"]}},
        {"class_path": "probes.ProbeCallback"},
    ]
    recipe = {"trainer": {"callbacks": callbacks, "precision": "32-true"}, "model": {"config": sizes}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = resolve(["--config", str(tmp_path / "config.yaml")]).content["trainer"]["callbacks"]
    names = ["moebed.training.callbacks.StepFile", "probes.running.callback.ProbeCallback", "probes.ProbeCallback"]
    assert [callback["class_path"] for callback in found] == names


def test_a_plugin_with_a_former_name_is_told_the_present_one(tmp_path, capsys):
    (tmp_path / "old.py").write_text("from moebed.routers import register\n", encoding="utf-8")
    assert main(["size", "--plugins", str(tmp_path / "old.py"), "x.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No module named 'moebed.routers'; it is moebed.model.routers now" in line
