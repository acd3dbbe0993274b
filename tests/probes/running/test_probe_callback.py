"""ProbeCallback: when it probes, what it writes, and that training does not notice."""

import json
import logging

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from probe_training import Windows, train, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moebed.errors import ConfigError, UserError
from probes.registry import DEFAULT_PROBES, PROBES
from probes.running import store
from probes.running.callback import ProbeCallback
from probes.running.tags import picture_tags

FEW = ["balance", "gate_similarity"]


def probed_steps(out):
    return [line["step"] for line in store.load_history(out)]


def test_training_with_probes_is_bit_identical(tmp_path):
    plain = weights(train(tmp_path / "plain", [], 4))
    probed = weights(
        train(tmp_path / "probed", [ProbeCallback(every_n_steps=2, num_sequences=2, figures_every_n_steps=4)], 4)
    )
    assert probed_steps(tmp_path / "probed") == [0, 2, 4]
    assert plain.keys() == probed.keys()
    assert all(torch.equal(plain[key], probed[key]) for key in plain)


@pytest.mark.drawn
def test_events_hold_the_tags_and_the_pictures(tmp_path):
    train(tmp_path, [ProbeCallback(every_n_steps=2, num_sequences=2)], 4)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    expected = {"balance/max_violation", "layers/balance/max_violation/layer_01", "router_state/margin",
                "layers/norm_vs_score/spearman/layer_00", "layers/matrix_similarity/mean_cos_up/layer_01",
                "gate_similarity/mean_cos", "routing/topk_mass", "probes_cost/balance_seconds",
                "probes_cost/forward_seconds", "probes_cost/share_of_wall_time"}  # fmt: skip
    assert expected <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("layers/balance/cv/layer_00")] == [0, 2, 4]
    assert 0 < events.Scalars("probes_cost/share_of_wall_time")[-1].value < 1
    arrays = store.load_arrays(tmp_path, "balance")
    assert events.Scalars("layers/balance/cv/layer_00")[-1].value == pytest.approx(float(arrays["cv/0"]))
    results = {name: PROBES[name].describe(store.load_arrays(tmp_path, name)) for name in DEFAULT_PROBES}
    drawn = [(name, figure) for name, result in results.items() for figure in result.figures]
    pictures = {tag for name, figure in drawn for tag in picture_tags(name, figure)}
    assert len(pictures) >= len(DEFAULT_PROBES)
    assert pictures == set(tags["images"])
    assert {
        "balance/figures/load",
        "norm_vs_score/figures/rank_counts",
        "answers/1_norm/figures/rank_counts",
    } <= pictures
    image = events.Images("balance/figures/load")
    assert [event.step for event in image] == [4]
    assert image[0].encoded_image_string.startswith(b"\x89PNG")
    assert image[0].width > 300


def test_results_on_disk(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = train(tmp_path, [ProbeCallback(every_n_steps=0, num_sequences=3)], 3)
    assert probed_steps(tmp_path) == [0, 3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["step"] == 3
    assert list(summary["probes"]) == list(DEFAULT_PROBES)
    for name in DEFAULT_PROBES:
        for figure in PROBES[name].describe(store.load_arrays(tmp_path, name)).figures:
            assert (tmp_path / "figures" / f"{name}_{figure}.png").read_bytes().startswith(b"\x89PNG")
    routing = store.load_arrays(tmp_path, "routing")
    assert routing["sequence_start"].tolist() == [0, 7, 19]
    assert routing["domain_names"].tolist() == list(Windows.domains)
    gate = store.load_arrays(tmp_path, "gate_similarity")["gate_cos/1"]
    weight = trainer.lightning_module.decoder.layers[1].mlp.router.weight.detach()
    np.testing.assert_allclose(gate, torch.cosine_similarity(weight[:, None], weight[None], -1), atol=1e-6)
    assert sum("of the time since the start" in record.message for record in caplog.records) == 1


def test_accumulated_batches_are_probed_once(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("probes.running.callback.run_probes", lambda *a: runs.append(1) or {})
    callback = ProbeCallback(FEW, every_n_steps=1, at_start=False, at_end=False, figures_every_n_steps=1)
    drawn = []
    monkeypatch.setattr(callback, "_draw", lambda trainer, results, step: drawn.append(step))
    monkeypatch.setattr(callback, "_log", lambda *a: None)
    train(tmp_path, [callback], 3, accumulate_grad_batches=4)
    assert len(runs) == 3
    assert drawn == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"at_start": False, "every_n_steps": 2}, [2, 4, 5]),
        ({"at_end": False, "every_n_steps": 2}, [0, 2, 4]),
        ({"every_n_steps": 0}, [0, 5]),
        ({"every_n_steps": 5}, [0, 5]),
    ],
)
def test_when_it_probes(tmp_path, options, steps):
    train(tmp_path, [ProbeCallback(FEW, num_sequences=1, **options)], 5)
    assert probed_steps(tmp_path) == steps


def test_figures_at_steps_and_at_the_end(tmp_path):
    train(tmp_path, [ProbeCallback(["balance"], every_n_steps=2, num_sequences=1, figures_every_n_steps=4)], 6)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("balance/figures/load")] == [0, 4, 6]


def test_a_resumed_run_probes_nothing_twice(tmp_path):
    def callbacks():
        keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        return [ProbeCallback(FEW, every_n_steps=2, num_sequences=1, at_end=False), keep]

    whole = weights(train(tmp_path / "run", callbacks(), 7, enable_checkpointing=True))
    assert probed_steps(tmp_path / "run") == [0, 2, 4, 6]
    before = store.load_history(tmp_path / "run")
    callback = callbacks()
    started = []
    original = callback[0]._probe
    callback[0]._probe = lambda trainer, *a, **k: (started.append(trainer.global_step), original(trainer, *a, **k))
    resumed = train(tmp_path / "run", callback, 8, tmp_path / "checkpoints" / "step=4.ckpt", enable_checkpointing=True)
    assert started == [6, 8]
    assert probed_steps(tmp_path / "run") == [0, 2, 4, 6, 8]
    assert store.load_history(tmp_path / "run")[:3] == before[:3]
    assert resumed.global_step == 8
    assert whole.keys() == weights(resumed).keys()


def test_a_fresh_run_in_an_old_folder_forgets_its_history(tmp_path):
    store.append_history(tmp_path, {"step": 3})
    train(tmp_path, [ProbeCallback(FEW, every_n_steps=4, at_start=False, at_end=False)], 2)
    assert probed_steps(tmp_path) == []


def test_out_is_where_it_says(tmp_path):
    train(tmp_path / "run", [ProbeCallback(FEW, num_sequences=1, out=str(tmp_path / "elsewhere"))], 1)
    assert (tmp_path / "elsewhere" / "results" / "balance.npz").exists()
    assert not (tmp_path / "run" / "results").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": ["gate_similarty"]}, "unknown probe 'gate_similarty'; did you mean 'gate_similarity'"),
        ({"every_n_steps": -1}, "every_n_steps is -1"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"figures_every_n_steps": 0}, "figures_every_n_steps is 0"),
    ],
)
def test_mistakes_are_told_at_once(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        ProbeCallback(**options)
    assert "\n" not in str(error.value)


def test_text_of_padding_alone_is_an_error(tmp_path, monkeypatch):
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=int),
        "labels": torch.full((1, 4), -100),
        "domain": torch.zeros(1, dtype=torch.long),
    }
    monkeypatch.setattr(Windows, "probe_batch", lambda self, n: batch)
    with pytest.raises(UserError, match="holds no tokens"):
        train(tmp_path, [ProbeCallback(FEW)], 1)
