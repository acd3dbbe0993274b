"""``moebed bench routers``: equal FLOPs where it says so, and a table of every router asked for."""

import json

import pytest

from moebed.bench import routers, train
from moebed.bench.command import CHOICES
from moebed.cli import main
from moebed.model.flops import flops_per_token
from moebed.model.routers import ROUTERS
from tests.conftest import tiny_config


@pytest.mark.parametrize("size", ["A", "F", "B"])
def test_autonomy_has_the_flops_of_the_baseline(size):
    model = train.SIZES[size].model
    other = routers.config_with(model, "autonomy")
    assert flops_per_token(other, 256) == pytest.approx(flops_per_token(model, 256), rel=0.01)
    assert other.norm_topk_prob is False


def test_it_measures_what_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train.SIZES, "T", train.Size(tiny_config(vocab_size=64, moe_intermediate_size=96), 1, 16))
    monkeypatch.setitem(CHOICES["routers"], "--size", ("T",))
    options = ["--size", "T", "--router", "autonomy", "--router", "expert_norm", "--rounds", "1", "--steps", "1"]
    assert main(["bench", "routers", *options, "--json", str(tmp_path / "f.json")]) == 0
    rows = json.loads((tmp_path / "f.json").read_text())["results"][0]["rows"]
    assert [row["name"] for row in rows] == ["softmax_topk", "autonomy", "expert_norm"]
    assert rows[0]["over_baseline"] == [1.0, 1.0, 1.0]
    assert rows[2]["flops_ratio"] > 1.2
    assert "expert_norm" in capsys.readouterr().out
    assert main(["bench", "routers", "--router", "autonmy"]) == 2
    assert "unknown router 'autonmy'; did you mean 'autonomy'?" in capsys.readouterr().err


def test_a_router_of_a_plug_in_that_is_told_domains_is_not_measured(monkeypatch, capsys):
    """Its name alone does not tell; the text of the benchmark is random and has none."""
    monkeypatch.setitem(ROUTERS, "told", type("Told", (ROUTERS["oracle"],), {}))
    monkeypatch.setattr(routers, "run", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", "routers", "--router", "told"]) == 2
    assert "--router told: choose among softmax_topk" in capsys.readouterr().err
