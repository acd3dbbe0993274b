"""Probes that take hidden states and outputs apart, on streamed checkpoints: a live model's numbers; going on."""

import numpy as np
import pytest
from checkpoint_files import write
from test_pretrained_text import CASES, make_text

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.views.live import walk
from probes.contract import ArrayName
from probes.figures.drawing import to_rgb
from probes.registry import BY_NAME_ONLY, PROBES
from probes.running import store
from probes.running.driver import ProbePass, needs_of, run_probes
from tests.conftest import ORACLES

NAMES = ("routing_ladder", "expert_lens", "control_content")


def made():
    return [PROBES[name]() for name in NAMES]


def streamed(folder, text, **options):
    model, probes = PretrainedMoE(str(folder), text=text, **options), made()
    try:
        return run_probes(model.views(text, needs_of(probes)), probes)
    finally:
        model.close()


def test_they_run_where_asked_for():
    assert set(NAMES) <= set(BY_NAME_ONLY)


@pytest.mark.parametrize("case", ["shared, a dense layer", "tied"])
def test_a_streamed_checkpoint_gives_the_numbers_of_a_live_model(case, tmp_path):
    decoder, text = write(tmp_path, **CASES[case]), make_text(*[24] * 3)
    probes = made()
    live = run_probes(walk(decoder, text, needs_of(probes)), probes)
    found = streamed(tmp_path, text, memory_budget="260kB")
    for name, result in live.items():
        assert result.headlines
        assert found[name].arrays.keys() == result.arrays.keys(), name
        for key, value in result.arrays.items():
            other = found[name].arrays[key]
            if value.dtype.kind == "f":
                # Half floats of what is kept, and smoothing chosen on held-out text, come between.
                np.testing.assert_allclose(other, value, rtol=2e-3, atol=2e-3, err_msg=f"{name} {key}")
            else:
                np.testing.assert_array_equal(other, value, err_msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.shared("oracles")
@pytest.mark.parametrize("name", ["mixtral", "deepseekmoe", "grok-1"])
def test_the_oracles(name):
    """Of random weights nothing is found that is not there: words are no expert's own, logits are not raised."""
    text = make_text(*[40] * 8, vocab_size=PretrainedMoE(str(ORACLES / name)).config.vocab_size)
    results = streamed(ORACLES / name, text)
    for result in results.values():
        assert result.headlines
        for build in result.figures.values():
            to_rgb(build())
    before, rho = (results[one].headlines[key].value for one, key in
                   (("routing_ladder", "share_input_before"), ("expert_lens", "cause_rho")))  # fmt: skip
    print(f"{name}: share_input_before {before:.2f}, cause_rho {rho:.2f}")
    low, high = results["expert_lens"].headlines["dla_specific"].interval
    assert low < 0 < high
    assert abs(results["routing_ladder"].headlines["share_position"].value) < 0.02
    assert all(abs(v) < 0.05 for k, v in results["routing_ladder"].scalars.items() if k.endswith("_shuffled"))


def test_a_stopped_pass_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    write(tmp_path / "model", num_experts_per_tok=2)
    np.save(tmp_path / "ids.npy", make_text(*[16] * 6).input_ids.numpy())
    monkeypatch.setattr("probes.running.callback.ProbeCallback._draw", lambda *arguments, **options: None)
    monkeypatch.setattr("probes.report.page.write_report", lambda folders, path: path)

    cheap = NAMES[1:]

    def probe(out):
        return main(["probe", str(tmp_path / "model"), "--out", str(tmp_path / out), "--probes", ",".join(cheap),
                     "--input-ids", str(tmp_path / "ids.npy")])  # fmt: skip

    assert probe("whole") == 0
    original = PROBES["control_content"].update

    def stop_at_layer_2(self, view):
        if view.index == 2:
            raise KeyboardInterrupt
        original(self, view)

    with monkeypatch.context() as patched:
        patched.setattr(PROBES["control_content"], "update", stop_at_layer_2)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            probe("out")
    assert probe("out") == 0
    for name in cheap:
        whole, other = (store.load_arrays(tmp_path / out, name) for out in ("whole", "out"))
        assert whole.keys() == other.keys()
        for key, value in whole.items():
            np.testing.assert_array_equal(other[key], value, err_msg=f"{name} {key}")


def test_what_is_kept_of_a_token_is_what_is_said(tmp_path):
    """No hidden states, nor outputs: all that is kept of each token and layer while the pass goes on."""
    sizes = {"num_experts": 12, "num_experts_per_tok": 3, "hidden_size": 256}
    decoder, text, probes = write(tmp_path, **sizes), make_text(*[24] * 3), made()
    one_pass, tokens = ProbePass(probes), len(text.token_ids)
    for view in walk(decoder, text, needs_of(probes)):
        one_pass.show(view)
    for probe in probes:
        for layer in (1, 2):
            mine = [array for name, array in probe.arrays.items() if ArrayName.of(name).layer == layer]
            kept = sum(array.nbytes for array in mine if tokens in array.shape[:2])
            said = probe.token_bytes(decoder.config, layer)
            assert 0 < kept <= tokens * (said + 2 * decoder.config.layer(layer).num_experts_per_tok), probe.name
            assert said < 4 * decoder.config.hidden_size
