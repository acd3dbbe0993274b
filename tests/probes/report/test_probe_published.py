"""The paper's numbers, and the table that lays ours beside them."""

import json

import torch
from output_cases import output_view
from probe_cases import probe
from routed_cases import chosen_view, text_of
from test_probe_static import view

from probes.registry import PROBES
from probes.report.page import write_report
from probes.running import store
from probes.running.published import PUBLISHED, paper_model, published


def test_models_are_told_by_their_config():
    assert paper_model("mixtral", 32, 4096) == "Mixtral 8x7B"
    assert paper_model("mixtral", 56, 6144) == "Mixtral 8x22B"
    assert paper_model("deepseek", 28, 2048) == "DeepSeekMoE-16B"
    assert paper_model("grok-1", 64, 6144) == "Grok-1"
    assert paper_model("mixtral", 2, 64) is None
    assert paper_model(None, None, None) is None


def test_tables():
    assert published("gate_projection/r2_gate", "Mixtral 8x7B").low == 0.33
    assert published("neuron_matching/mean_tau", "DeepSeekMoE-16B").low == -0.0002
    assert published("matrix_similarity/mean_cos_up", "Mixtral 8x7B").text == "0.2 to 0.4"
    assert published("neuron_matching/mean_tau", "Mixtral 8x22B") is None
    assert published("neuron_matching/mean_tau", None) is None
    assert published("repeats/repeat_first_layer_15", "Mixtral 8x7B").text == "0.236 to 0.284"
    assert published("repeats/repeat_any_layer_31", "Mixtral 8x7B").high == 0.536
    assert published("repeats/repeat_any_layer_30", "Mixtral 8x7B") is None
    assert published("activations/frac_above_1e-3", "Grok-1").low == 0.253


def test_every_number_belongs_to_a_headline():
    names = {key.split("/")[0] for table in PUBLISHED.values() for key in table}
    text = text_of([[1, 2, 3]], [0], ("a",))
    routed, run = ("repeats",), ("activations",)
    results = probe([view(4, reference=12)], *(name for name in names if name not in routed + run))
    results |= probe([chosen_view([[0, 1], [0, 2], [1, 2]], 4, text, layer) for layer in range(32)], *routed)
    results |= probe([output_view(torch.ones(2, 3, 4), [[0]] * 3)], *run)
    for table in PUBLISHED.values():
        for key in table:
            name, headline = key.split("/")
            assert headline in results[name].headlines, key


def write_run(folder, model):
    results = probe([view(4)], "gate_projection", "neuron_matching")
    for name, result in results.items():
        store.save_arrays(folder, name, result.arrays)
    store.save_summary(folder, 0, results)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "model": model}))


def test_the_report_lays_them_side_by_side(tmp_path):
    write_run(tmp_path / "a", {"model_type": "deepseek", "num_hidden_layers": 28, "hidden_size": 2048})
    write_run(tmp_path / "b", {"model_type": "deepseek", "num_hidden_layers": 2, "hidden_size": 64})
    page = write_report([tmp_path / "a"], tmp_path / "a").read_text()
    assert "Beside the paper" in page
    assert "DeepSeekMoE-16B" in page
    assert "-0.0002" in page
    assert "layers 1, 5, ..., 25, 27" in page
    assert page.count("average r² over layers") == 6
    assert "Beside the paper" not in write_report([tmp_path / "b"], tmp_path / "b").read_text()
    assert "neuron_matching" in PROBES
