"""What a study's runs and the token cache belong to: settings, code, versions, and what the text's files hold."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from moebed.data.sources import Source, SourceConfig
from moebed.plugins import VARIABLE, load_plugins
from moebed.study.recipe import read_recipe
from moebed.study.runs import plan_study
from tests.twice.test_commands_twice import _study


def _hashes(study: Path, out: Path) -> dict[str, str]:
    return {name: run.hash for name, run in plan_study(read_recipe(study), out).runs.items()}


def _edit(path: Path) -> None:
    """Change a letter: the size and the time stay."""
    times, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def study(run_recipe, tmp_path) -> Path:
    content = yaml.safe_load(run_recipe.read_text(encoding="utf-8"))
    text = tmp_path / "text.txt"
    text.write_bytes((run_recipe.parent / "text.txt").read_bytes())
    content["data"]["sources"][0]["path"] = str(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    return _study(tmp_path, recipe)


def test_a_study_knows_its_text_by_what_it_holds(study, tmp_path):
    first = _hashes(study, tmp_path / "out")
    assert _hashes(study, tmp_path / "elsewhere") == first
    _edit(tmp_path / "text.txt")
    second = _hashes(study, tmp_path / "out")
    assert all(second[name] != value for name, value in first.items())


def test_a_study_knows_its_versions_and_plugins(study, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    first = _hashes(study, tmp_path / "out")
    plugin, beside = tmp_path / "mine.py", tmp_path / "beside_mine.py"
    beside.write_text("VALUE = 1\n", encoding="utf-8")
    plugin.write_text("import beside_mine\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        load_plugins(["--plugins", str(plugin)])
        found = [first, _hashes(study, tmp_path / "out")]
        _edit(beside)
        found.append(_hashes(study, tmp_path / "out"))
        monkeypatch.setattr("moebed.machine.provenance.moebed_version", lambda: "another")
        found.append(_hashes(study, tmp_path / "out"))
    finally:
        for name in ("moebed_plugin_mine", "beside_mine"):
            sys.modules.pop(name, None)
    name = next(iter(first))
    assert len({hashes[name] for hashes in found}) == 4


def test_the_token_cache_knows_its_text_by_what_it_holds(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a text of some words\n" * 5000, encoding="utf-8")
    source = Source(SourceConfig("words", "files", path=str(path)))
    before = source.identity(), source.content()
    assert (source.identity(), source.content()) == before
    _edit(path)
    assert source.identity() != before[0]
    assert source.content() != before[1]
