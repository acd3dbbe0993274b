"""Curves through training of the probes that compare experts: logged at each probing, the same in every place."""

import json

import pytest
from probe_training import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from probes.running import store
from probes.running.callback import ProbeCallback
from probes.running.tags import scalar_tag

WANTED = {
    "matrix_similarity": ["mean_cos_up", "mean_cos_gate", "mean_cos_down"],
    "neuron_similarity": ["mean_cos_up", "mean_cos_gate", "mean_cos_down"],
    "neuron_matching": ["mean_cos_up", "mean_gain_gate", "mean_gain_down"],
    "gate_projection": ["r2_up", "r2_gate", "r2_down"],
    "weight_vs_output": ["r_up", "r_mean_gate", "r_reordered_down"],
    "layer_diversity": ["diversity_matrix_up", "diversity_outputs"],
}


def test_experts_are_followed_through_training(tmp_path):
    train(tmp_path, [ProbeCallback(list(WANTED), every_n_steps=2, num_sequences=2, at_end=False)], 4)
    history = store.load_history(tmp_path)
    assert [line["step"] for line in history] == [0, 2, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    summary = json.loads((tmp_path / "summary.json").read_text())["probes"]
    for probe, quantities in WANTED.items():
        assert summary[probe]["headlines"], probe
        for quantity in quantities:
            for tag in (f"{probe}/{quantity}", f"{probe}/{quantity}/layer_01"):
                curve = [line["scalars"][tag] for line in history]
                assert len(set(curve)) == 3, tag  # training moves it
                points = events.Scalars(scalar_tag(probe, tag.removeprefix(f"{probe}/")))
                assert [point.step for point in points] == [0, 2, 4]
                assert [point.value for point in points] == pytest.approx(curve, rel=1e-6)
