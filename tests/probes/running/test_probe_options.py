"""Settings of probes, from the command line and from a recipe: what is kept belongs to them."""

import json

import numpy as np
import pytest
import torch
import yaml

from moebed.checkpoints.whole import write_checkpoint
from moebed.cli import main
from probes.running import store
from probes.running.callback import ProbeCallback


@pytest.fixture
def asked(make_decoder, tmp_path):
    """Arguments of a command on a small checkpoint and text, without settings."""
    folder = write_checkpoint(make_decoder(num_experts=8), "moebed", tmp_path / "model", torch.float32)
    np.save(tmp_path / "ids.npy", np.arange(40) % 60)
    text = ["--input-ids", str(tmp_path / "ids.npy"), "--probes", "traffic,balance"]
    return ["probe", str(folder), "--out", str(tmp_path / "out"), *text]


def test_settings_on_the_command_line_and_what_is_kept_of_others(asked, tmp_path, capsys):
    found = {}
    for ranks in (2, 8, 2):
        settings = ["--probe-option", f"traffic.ranks={ranks}", "--probe-option", "traffic.ranks_per_node=1"]
        assert main([*asked, *settings]) == 0
        arrays = store.load_arrays(tmp_path / "out", "traffic")
        assert arrays["layout"].tolist() == [ranks, 1]
        assert arrays["assignments/0"].shape == (ranks, ranks)
        assert arrays["assignments/0"].sum() == 80
        found.setdefault(ranks, arrays["assignments/0"])
        assert np.array_equal(found[ranks], arrays["assignments/0"])
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert list(summary["probes"]) == ["traffic", "balance"]
        assert summary["provenance"]["options"] == {"traffic": {"ranks": ranks, "ranks_per_node": 1}}
    assert "left out" not in capsys.readouterr().err


def test_settings_in_a_file(asked, tmp_path):
    for number, options in enumerate(({"traffic": {"ranks": 2}}, ["traffic.ranks=2"])):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"probe_option": options}))
        assert main([*asked, "--config", str(path)]) == 0
        assert store.load_arrays(tmp_path / "out", "traffic")["layout"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("traffic.rnks=2", "traffic has no option 'rnks'; did you mean 'ranks'?"),
        ("traffic.ranks=many", "ranks is 'many'; it must be such as 4"),
        ("traffic=2", "probe_option 'traffic=2' is none; write PROBE.NAME=VALUE"),
        ("capacity.ranks=2", "capacity has no option 'ranks'; it has none"),
        ("keep_k.one_of=2", "options are given for 'keep_k', which does not run"),
    ],
)
def test_wrong_ones_are_one_line_and_leave_nothing(asked, tmp_path, capsys, option, words):
    assert main([*asked, "--probe-option", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_recipe_s_callback_has_them_checked_at_once():
    from moebed.errors import ConfigError

    ProbeCallback(["traffic"], options={"traffic": {"ranks": 2}})
    with pytest.raises(ConfigError, match="ranks_per_node 3"):
        ProbeCallback(["traffic"], options={"traffic": {"ranks_per_node": 3}})
