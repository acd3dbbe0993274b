"""What takes several passes: checkpoints followed in order, experts removed, single tokens changed; and stopped."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from checkpoint_files import random_decoder, write
from test_pretrained_text import Reads, make_text

from moebed.checkpoints import write_checkpoint
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.views.interventions import assigned_weights
from moebed.views.layer import LayerView, Need
from moebed.views.live import walk
from probes.figures.drawing import to_png
from probes.keep_k import KeepK
from probes.observed_vs_needed import ObservedVsNeeded
from probes.random_routes import RandomRoutes
from probes.registry import PROBES
from probes.running import store
from probes.running.driver import needs_of, run_probes


@pytest.fixture
def quick(monkeypatch):
    """No pictures and no page."""
    monkeypatch.setattr("probes.running.callback.ProbeCallback._draw", lambda *arguments, **options: None)
    monkeypatch.setattr("probes.report.page.write_report", lambda folders, path: path)


def write_three(folder):
    """Checkpoints of one model whose routers move: the first layer's at once, the second's in the end."""
    decoder, decoders = random_decoder(num_experts_per_tok=2), {}
    for number, name in enumerate(("early", "later", "last")):
        with torch.no_grad():
            if number:
                router = decoder.layers[number - 1].mlp.router
                router.weight.copy_(router.weight.roll(1, dims=0))
        write_checkpoint(decoder, "mixtral", folder / name, torch.float32)
        decoders[name] = random_decoder(num_experts_per_tok=2)
        decoders[name].load_state_dict(decoder.state_dict())
    return decoders


def chosen(decoder, text, layer):
    views = [view for view in walk(decoder, text, frozenset({Need.ROUTING})) if isinstance(view, LayerView)]
    return assigned_weights(views[layer].routing) != 0


def test_choices_are_followed_over_the_checkpoints_that_are_given(tmp_path, quick, monkeypatch, capsys):
    decoders, text = write_three(tmp_path), make_text(20, 20, 20)
    np.save(tmp_path / "ids.npy", text.input_ids.numpy())

    def probe(*more, out="out"):
        asked = ["probe", str(tmp_path / "last"), "--out", str(tmp_path / out), "--probes", "saturation"]
        return main([*asked, "--input-ids", str(tmp_path / "ids.npy"), "--earlier", *more])

    early, later = str(tmp_path / "early"), str(tmp_path / "later")
    assert probe(early, later) == 0
    arrays = store.load_arrays(tmp_path / "out", "saturation")
    assert arrays["step_names"].tolist() == ["early", "later", "last"]
    for layer in range(3):
        sets = [chosen(decoders[name], text, layer) for name in ("early", "later", "last")]
        wanted = [float((one & sets[-1]).sum() / sets[-1].sum()) for one in sets]
        assert arrays[f"saturation/{layer}"] == pytest.approx(wanted)
        steps = [float((one & other).sum() / one.sum()) for one, other in pairwise(sets)]
        assert arrays[f"saturation_previous/{layer}"][1:] == pytest.approx(steps)
    assert arrays["saturation/0"][0] < 0.9  # moved at once
    assert arrays["saturation/0"][1] == 1
    assert arrays["saturation_previous/1"][2] < 0.9  # moved in the end
    result = PROBES["saturation"].describe(arrays)
    assert "as at checkpoint later, the probing before" in result.headlines["previous_to_now"].sentence
    assert "training so far" not in result.headlines["settled_at"].sentence
    to_png(result.figures["over_steps"]())
    reads = Reads(monkeypatch)
    assert probe(early, later) == 0
    assert not reads  # all is kept
    write_checkpoint(decoders["last"], "mixtral", tmp_path / "other" / "later", torch.float32)
    assert probe(early, str(tmp_path / "other" / "later"), "--fresh") == 0
    assert store.load_arrays(tmp_path / "out", "saturation")["saturation_previous/1"][2] == 1
    capsys.readouterr()
    assert probe(early, early) == 2
    assert "two checkpoints are called early" in capsys.readouterr().err.splitlines()[-1]
    assert main(["probe", str(tmp_path / "last"), "--out", str(tmp_path / "no"), "--earlier", early]) == 2
    assert "--earlier needs text" in capsys.readouterr().err.splitlines()[-1]


def test_keep_k_that_is_stopped_comes_to_the_same_numbers(tmp_path, quick, monkeypatch):
    """In a layer, in one of the passes that go through the weights again, and before what it found was kept."""
    write(tmp_path / "model", num_experts_per_tok=2)
    np.save(tmp_path / "ids.npy", make_text(*[20] * 6).input_ids.numpy())

    def probe(out):
        return main(["probe", str(tmp_path / "model"), "--out", str(tmp_path / out), "--probes", "keep_k",
                     "--input-ids", str(tmp_path / "ids.npy"), "--memory-budget", "400kB"])  # fmt: skip

    assert probe("whole") == 0
    update, head, riders = KeepK.update, KeepK.update_head, PretrainedMoE._riders
    passes, shown = [], []

    def in_a_layer(self, view):
        if view.index == 2:
            raise KeyboardInterrupt
        update(self, view)

    def in_a_pass(self, text, interventions, planned):
        passes.append(len(interventions))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return riders(self, text, interventions, planned)

    def in_the_end(self, view):
        head(self, view)
        raise KeyboardInterrupt

    stops = {"update": (KeepK, in_a_layer, [2]), "_riders": (PretrainedMoE, in_a_pass, []),
             "update_head": (KeepK, in_the_end, [])}  # fmt: skip
    for name, (kind, stop, left) in stops.items():
        with monkeypatch.context() as patched:
            patched.setattr(kind, name, stop)
            with pytest.raises((SystemExit, KeyboardInterrupt)):
                probe(name)
            assert not store.arrays_path(tmp_path / name, "keep_k").exists()
            patched.setattr(kind, name, {"_riders": riders, "update_head": head}.get(name, update))
            patched.setattr(KeepK, "update", lambda self, view: (shown.append(view.index), update(self, view)))
            shown.clear()
            assert probe(name) == 0
        assert shown == left
        whole, other = (store.load_arrays(tmp_path / out, "keep_k") for out in ("whole", name))
        assert whole.keys() == other.keys()
        assert any(key.startswith("keep_loss/") for key in whole)
        for key, value in whole.items():
            np.testing.assert_array_equal(other[key], value, err_msg=f"{name} {key}")
    assert passes[2] < passes[1]  # one pass of several was done


def test_single_tokens_of_a_checkpoint_change_as_those_of_a_live_model(tmp_path):
    decoder, text = write(tmp_path, num_experts_per_tok=2), make_text(20, 14, 17, 9)

    def probed():
        found = [ObservedVsNeeded(), RandomRoutes()]
        found[0].options = found[0].Options(tokens=40)
        found[1].options = found[1].Options(tokens=30, routes=3, layers="1")
        return found

    probes = probed()
    live = run_probes(walk(decoder, text, needs_of(probes)), probes)
    model, probes = PretrainedMoE(str(tmp_path), text=text), probed()
    told = {one.name: one for each in probes for one in each.interventions(model.config)}
    model.prepare([], needs_of(probes), interventions=list(told.values()))
    try:
        streamed = run_probes(model.views(text, needs_of(probes)), probes)
    finally:
        model.close()
    for name, result in live.items():
        assert result.arrays.keys() == streamed[name].arrays.keys()
        for key in ("rise", "observed", "route_rise", "high_low_d", "percentile", "loss", "token"):
            for full in (full for full in result.arrays if full.split("/")[0] == key):
                np.testing.assert_allclose(streamed[name].arrays[full], result.arrays[full], atol=2e-5, rtol=1e-3)
        assert np.abs(result.arrays["rise/2" if name == "observed_vs_needed" else "route_rise/1"]).max() > 1e-3
        assert "route_rise/2" not in result.arrays
