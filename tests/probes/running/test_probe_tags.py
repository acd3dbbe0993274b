"""What a log is made of: groups that a person can survey, however many layers there are, and a kind for each tag."""

import re

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from probe_training import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from moebed.training.loggers import EventLog, layout_of, log_numbers, log_texts
from moebed.training.routing_log import MOST_LAYERS, StepRouting, spread
from moebed.views.layer import Need
from probes.contract import Headline, Probe, ProbeResult, per_layer
from probes.questions import QUESTIONS
from probes.registry import DEFAULT_PROBES, PROBES
from probes.running import tags
from probes.running.callback import ProbeCallback
from probes.running.run_folder import read_curves
from probes.running.writing import log_results

MOST_GROUPS = 20
LAYERED = ("max_violation", "router_entropy")  # of a training step
EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the default probes, probed three times, and the tags of its events by kind."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, [ProbeCallback(every_n_steps=2, num_sequences=4)], 4)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=EVERYTHING).Reload()
    return folder, events, {kind: events.Tags()[kind] for kind in EVERYTHING}


def test_there_are_few_groups(run):
    """The command line adds those of its own: run, val."""
    _, _, found = run
    groups = {tag.partition("/")[0] for kind in found.values() for tag in kind} - {"custom_scalars__config__"}
    assert groups == {*DEFAULT_PROBES, "answers", "layers", "train", "probes_cost"}
    assert len(groups | {"run", "val"}) <= MOST_GROUPS


@pytest.mark.parametrize("depth", [4, 64])
def test_there_are_few_groups_with_every_probe_there_is(depth, tmp_path, monkeypatch):
    """Plug-ins included; in the custom-scalars dashboard as well."""
    names = [*PROBES, *(f"own_{need.value}" for need in Need)]
    for need in Need:
        monkeypatch.setitem(PROBES, f"own_{need.value}", type("Own", (Probe,), {"needs": frozenset({need})}))
    results = {
        name: ProbeResult({}, per_layer("q", dict.fromkeys(range(depth), 1.0)), {"q": Headline(1.0, "So.")})
        for name in names
    }
    log = EventLog(tmp_path)
    trainer = Trainer(logger=log, accelerator="cpu", enable_progress_bar=False)
    log_results(trainer, results, {"forward_seconds": 1.0}, 1)
    log_numbers(trainer, {"val/loss": 1.0, "train/loss": 1.0, "layers/train/max_violation/layer_00": 1.0}, 1)
    log_texts(trainer, "run", {"run/config": "So."}, 1)
    log.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance=EVERYTHING).Reload()
    logged = {tag for kind in EVERYTHING for tag in events.Tags()[kind]} - {"custom_scalars__config__"}
    logged |= {tag for name in names for tag in tags.picture_tags(name, "q")}
    assert {tags.scalar_tag(name, f"q/layer_{layer:02d}") for name in names for layer in range(depth)} <= logged
    groups = {tag.partition("/")[0] for tag in logged}
    assert {"layers", "probes_cost", "run", "train", "val", *DEFAULT_PROBES} < groups
    assert len(groups | {"answers"}) <= MOST_GROUPS
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert len(layout.category) <= MOST_GROUPS
    assert sum(len(category.chart) for category in layout.category) == len(names) + 1


def test_a_group_of_a_probe_has_no_layer_in_it(run):
    _, _, found = run
    by_layer = [tag for kind in found.values() for tag in kind if re.search(r"layer_\d", tag)]
    assert len(by_layer) > 50
    assert all(tag.startswith("layers/") for tag in by_layer)


def test_a_tag_is_of_one_kind(run):
    """TensorBoard takes the first event of a tag for the kind of all: it does not draw numbers that a picture hides."""
    _, _, found = run
    assert not set(found["scalars"]) & set(found["images"])
    assert "domain_share/divergence" in found["scalars"]
    assert "domain_share/figures/divergence" in found["images"]


def test_every_quantity_of_layers_is_a_chart(run):
    """The layout that TensorBoard shows is the last one; each chart finds its mean and a line a layer."""
    _, events, found = run
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert layout.category[0].title == "train, by layer"
    assert [category.closed for category in layout.category] == [False] + [True] * (len(layout.category) - 1)
    drawn = set()
    for category in layout.category:
        for chart in category.chart:
            matched = [tag for tag in found["scalars"] if any(re.match(line, tag) for line in chart.multiline.tag)]
            group = category.title.removesuffix(", by layer")
            assert f"{group}/{chart.title}" in matched  # the mean
            layers = [tag for tag in matched if tag.startswith(f"layers/{group}/{chart.title}/layer_")]
            assert len(layers) == len(matched) - 1 >= 1
            drawn |= set(matched)
    assert {tag for tag in found["scalars"] if tag.startswith("layers/")} <= drawn


def test_pictures_and_sentences_come_in_the_order_of_the_questions(run):
    _, _, found = run
    for kind in ("images", "tensors"):
        numbers = [tag[8] for tag in sorted(found[kind]) if tag.startswith("answers/")]
        assert numbers == sorted(numbers)
        assert set(numbers) == {"1", "4"}  # those that the default probes answer
    said = tags.sentences({"norm_vs_score": ProbeResult({}, headlines={"spearman": Headline(0.5, "So.", (0.4, 0.6))})})
    assert said["answers/1_norm"].startswith(f"**{QUESTIONS[0].text}**\n\nSo. (95 %: 0.4 to 0.6)\n\n*Published:*")
    assert said["norm_vs_score/spearman"] == "So."


def test_questions_name_what_probes_have():
    """The pictures by name; what is looked for and never found would be missed by nobody."""
    for question in QUESTIONS:
        for name in (*question.headlines, *question.pictures):
            assert name.partition("/")[0] in PROBES
        assert {name.partition("/")[0] for name in question.pictures} <= set(question.probes)


def test_a_report_has_no_curves_of_the_probes_twice(run):
    folder, _, _ = run
    curves = read_curves(folder)
    assert {tag.rpartition("/")[0] for tag in curves} == {"train", *(f"layers/train/{q}" for q in LAYERED)}


def test_former_tags_are_read_as_the_present_ones():
    assert tags.present_tag("probes/balance/cv/layer_07") == tags.scalar_tag("balance", "cv/layer_07")
    assert tags.present_tag("probes/balance/cv") == tags.scalar_tag("balance", "cv")
    for former in ("prediction/loss/math", "probes/prediction/loss/math"):
        assert (
            tags.present_tag(former) == tags.scalar_tag("prediction", "loss/math") == "predictions/prediction/loss/math"
        )
    assert tags.present_tag("layers/activations/a/layer_07") == "layers/outputs/activations/a/layer_07"
    assert tags.present_tag("probes/once/a/layer_07") == "layers/once/a/layer_07"  # of a plug-in that is not at hand
    assert tags.present_tag("config") == "run/config"
    for tag in ("train/loss", "layers/balance/cv/layer_07", "probes_cost/balance_seconds", "run/config"):
        assert tags.present_tag(tag) == tag


def test_what_is_logged_of_a_step_is_bounded():
    layers, experts = list(range(3, 67)), 64
    counts = torch.ones(64, experts)
    counts[5, 0], counts[5, 1] = 0.0, 9.0
    routing = StepRouting.of(layers, [experts] * 64, counts.flatten().numpy(), torch.linspace(1, 2, 64).numpy())
    found = routing.by_layer()
    assert len(found) == 2 * MOST_LAYERS
    assert {"layers/train/max_violation/layer_03", "layers/train/router_entropy/layer_66"} <= found.keys()
    assert routing.violation[8] == pytest.approx(9 / (71 / 64) - 1)
    numbers = routing.numbers()
    assert numbers["train/idle_experts"] == 1
    assert numbers["train/max_violation_worst"] == routing.violation[8]
    assert numbers["train/router_entropy"] == pytest.approx(1.5)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 64])
def test_the_layers_shown_are_spread(count):
    chosen = spread(count, MOST_LAYERS)
    assert len(chosen) == min(count, MOST_LAYERS)
    assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_layers_of_different_width_are_taken_apart():
    routing = StepRouting.of([0, 2], [1, 3], torch.tensor([4.0, 1, 0, 2]).numpy(), torch.zeros(2).numpy())
    assert {layer: count.tolist() for layer, count in routing.counts.items()} == {0: [4], 2: [1, 0, 2]}
    assert routing.violation == {0: 0, 2: 1}


def test_the_layout_grows_and_is_written_only_then(tmp_path):
    log = EventLog(tmp_path)
    for step, quantity in enumerate(("cv", "cv", "dead")):
        log.log_metrics({f"layers/balance/{quantity}/layer_00": 1.0, "epoch": 0.0}, step)
    log.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance=EVERYTHING).Reload()
    layouts = [Layout.FromString(e.tensor_proto.string_val[0]) for e in events.Tensors("custom_scalars__config__")]
    assert layouts == [layout_of(["balance/cv"]), layout_of(["balance/dead", "balance/cv"])]
    assert "epoch" not in events.Tags()["scalars"]


def test_numbers_go_to_every_logger_under_their_step(tmp_path):
    csv = CSVLogger(tmp_path, name="", version="csv")
    trainer = Trainer(logger=[EventLog(tmp_path), csv], accelerator="cpu", enable_progress_bar=False)
    log_numbers(trainer, {f"balance/q{number}": float(number) for number in range(1200)}, 7)
    csv.save()
    header, row = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["balance/q1199"] == "1199.0"
    assert "7" in row.split(",")
