"""The report: one file with all inside, from whatever a folder holds."""

import io
import json
import re
from html import escape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markupsafe import Markup
from PIL import Image
from probe_cases import all_needs, probe
from routed_cases import chosen_view, text_of
from torch.utils.tensorboard import SummaryWriter

from moebed.errors import UserError
from moebed.machine.tags import layer_tag
from moebed.views.live import walk
from probes.figures import drawing
from probes.questions import with_what_follows
from probes.registry import PROBES
from probes.report.charts import draw_curves, draw_history, layer_series
from probes.report.page import write_report
from probes.report.pictures import compact
from probes.report.units import unit_of
from probes.running import store
from probes.running.run_folder import read_curves

# Drawing all there are would take minutes; the driver's tests do it once.
SOME = ("balance", "routing", "matrix_similarity", "gate_projection")


class Balanced(HTMLParser):
    """Counts elements, and fails where one is closed that is not open."""

    VOID = ("img", "br", "meta", "input")

    def __init__(self):
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(path):
    page = Balanced()
    page.feed(path.read_text())
    assert page.open == []
    return page.count


def log(folder, tag, values, first=0):
    with SummaryWriter(str(folder)) as writer:
        for step, value in enumerate(values, start=first):
            writer.add_scalar(tag, value, step)


@pytest.fixture
def run(tmp_path, make_decoder, text):
    """A run folder with everything: two probings, events, config, final numbers."""
    folder = tmp_path / "a <run>"
    for step in (0, 10):
        torch.manual_seed(step)
        results = probe(walk(make_decoder(), text, all_needs()), *SOME)
        for name, result in results.items():
            store.save_arrays(folder, name, result.arrays)
        store.append_history(folder, store.history_line(step, results))
        store.save_summary(folder, step, results)
    log(folder / "tensorboard", "train/loss", np.linspace(4, 2, 100))
    log(folder / "tensorboard", "val/bits_per_byte", [3.0, 2.0])
    log(folder / "tensorboard", "speed/tokens_per_second", [10.0, 20.0, 30.0])
    (folder / "config.yaml").write_text("model: <tiny>\n")
    (folder / "run_summary.json").write_text(json.dumps({"gzip_bits_per_byte": 2.5, "parameters": 12345}))
    return folder


@pytest.mark.drawn
def test_one_run(run):
    path = write_report([run], run)
    assert path == run / "report.html"
    page = path.read_text().replace("&#34;", "&quot;").replace("&#39;", "&#x27;")  # as html.escape has them
    count = parse(path)
    pictures = sum(len(PROBES[name].describe(store.load_arrays(run, name)).figures) for name in SOME)
    # Losses, other curves, headlines and probes over steps; diversity over depth follows from the weights.
    assert count["img"] == pictures + 5
    pages = sum(len(PROBES[name].describe(store.load_arrays(run, name)).pages) for name in SOME)
    assert pages > 0
    links = re.findall(r'<details class="section" id="(.*?)" open>', page)
    assert links == ["answers", "training", "probes", "numbers", "configuration"]  # all but the papers' numbers
    assert re.findall(r'<a href="#(.*?)">', page.split("</nav>")[0]) == links
    for name in SOME:
        for headline in PROBES[name].describe(store.load_arrays(run, name)).headlines.values():
            assert escape(headline.sentence) in page
    assert "a &lt;run&gt;" in page
    assert "model: &lt;tiny&gt;" in page
    assert "12,345" in page
    assert "gzip_bits_per_byte" in page


HOSTILE = "<script>alert('&\"')</script>"


def test_what_came_from_outside_is_text(tmp_path, make_decoder):
    """Names of domains and runs, tokens, notes, tags, numbers, a config and an own first section's title."""
    text = text_of([[1, 2, 3], [3, 2, 1]], [0, 1], (HOSTILE, "b"), (HOSTILE, *"abcde"))
    results = probe([chosen_view([[0, 1], [0, 2], [1, 2], [0, 1], [0, 2], [1, 2]], 4, text)], "routing", "repeats")
    folders = [tmp_path / f"{number} <script>" for number in (1, 2)]
    for folder in folders:
        for name, result in results.items():
            store.save_arrays(folder, name, result.arrays)
        store.save_summary(folder, 0, results, {"name": HOSTILE, "model_type": HOSTILE}, [HOSTILE])
        log(folder, f"train/{HOSTILE}", [3.0, 1.0])
        (folder / "config.yaml").write_text(HOSTILE)
        (folder / "run_summary.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    path = write_report(folders, tmp_path / "report.html", {HOSTILE: Markup("<p>ours</p>")})
    count = parse(path)
    assert count["script"] == 2  # the page's own, and what it searches
    page = path.read_text()
    assert "<p>ours</p>" in page
    # Two titles, the numbers' one key; and of each run name and family, note, number, domain, token, config.
    assert page.count("&lt;script&gt;alert(") == 3 + 2 * 7
    (index,) = re.findall(r'<script type="application/json" id="index">(.*?)</script>', page, re.DOTALL)
    assert not set("<&") & set(index)
    assert [run["name"] for run in json.loads(index)] == ["1 <script>", "2 <script>"]


def test_nothing_is_fetched(run):
    page = write_report([run], run).read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    said = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"http|url\(|@import|fetch\(|XMLHttpRequest|import\(", said)


def test_runs_side_by_side(run, tmp_path):
    other = tmp_path / "other"
    log(other, "train/loss", [3.0, 1.0])
    path = write_report([run, other], tmp_path / "both.html")
    assert path == tmp_path / "both.html"
    page = path.read_text()
    parse(path)
    assert "repeat(2," in page
    assert page.count("Not probed.") == len(SOME) + 2  # and two questions, which its weights answer


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        log(tmp_path / parent / "run", "train/loss", [3.0, 1.0])
    page = write_report([tmp_path / "x" / "run", tmp_path / "y" / "run"], tmp_path).read_text()
    assert "<h1>x/run · y/run</h1>" in page


def test_events_alone_are_enough(tmp_path):
    log(tmp_path, "train/loss", [3.0, float("nan"), 1.0])
    assert parse(write_report([tmp_path], tmp_path))["img"] == 1


def test_probing_alone_is_enough(tmp_path, make_decoder, text):
    for name, result in probe(walk(make_decoder(), text, all_needs()), *SOME).items():
        store.save_arrays(tmp_path, name, result.arrays)
    assert "Training" not in write_report([tmp_path], tmp_path).read_text()


def test_of_a_step_written_twice_the_last_counts(tmp_path):
    log(tmp_path / "v0", "train/loss", [5, 4, 3, 2])
    log(tmp_path / "v1", "train/loss", [30, 20], first=2)
    assert read_curves(tmp_path) == {"train/loss": ([0, 1, 2, 3], [5, 4, 30, 20])}


def test_layers_of_a_quantity_become_curves():
    history = [
        {"step": step, "scalars": {f"balance/cv/{layer_tag(1)}": step + 0.5, "balance/cv": 9.0}} for step in (0, 5)
    ]
    assert layer_series(history) == {"balance/cv": {1: ([0, 5], [0.5, 5.5])}}


@pytest.mark.parametrize("made", [False, True])
def test_nothing_to_report_is_one_line(tmp_path, made):
    folder = tmp_path / "empty"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match="empty") as error:
        write_report([folder], tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_result_is_named_and_the_earlier_report_stays(run):
    path = write_report([run], run)
    before = path.read_bytes()
    (run / "results" / "balance.npz").write_bytes(b"PK\x03\x04nonsense")
    with pytest.raises(UserError, match=r"balance\.npz"):
        write_report([run], run)
    assert path.read_bytes() == before


def test_the_papers_questions_come_first_with_numbers_and_what_was_published(tmp_path, make_decoder, text):
    results = probe(walk(make_decoder(num_hidden_layers=3), text, all_needs()), "norm_vs_score", "domain_share",
                    "matrix_similarity", "neuron_similarity", "expert_outputs", "layer_diversity")  # fmt: skip
    for name in ("norm_vs_score", "domain_share", "layer_diversity"):
        store.save_arrays(tmp_path / "one", name, results[name].arrays)
    log(tmp_path / "two", "train/loss", [3.0, 1.0])
    path = write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    parse(path)
    page = path.read_text()
    found = page.split('id="training"', 1)[0]
    assert results["norm_vs_score"].headlines["spearman"].sentence in found
    low, _ = results["norm_vs_score"].headlines["spearman"].interval
    assert f"95 %: <b>{low:.4g} to " in found
    answers = re.findall(r'id="question-(.*?)".*?(?=id="question-|$)', found, re.DOTALL)
    assert answers == ["norm", "depth", "last_layer", "domains"]
    (norm,) = re.findall(r'id="question-norm".*?id="question-depth"', found, re.DOTALL)
    alt = 'alt="Does the router choose the experts whose outputs are large? (norm_vs_score: rank counts)"'
    for part in ("<p>The router", 'class="sure"', alt, "Published: Mixtral"):
        assert norm.count(part) == (2 if part == 'class="sure"' else 1), part  # two headlines
    assert page.count(alt) == 1  # nowhere else once more
    assert "cannot be told whether diversity" in found  # three layers are too few
    assert found.count("Published: ") == 4
    assert "weights stand for what they do" not in found  # not probed
    assert "2401.04088" in found


def test_it_says_how_large_what_was_probed_is(tmp_path):
    sizes = {"num_hidden_layers": 6, "num_experts": [0, 4, 8, 4, 4, 4], "num_experts_per_tok": 2}
    (tmp_path / "summary.json").write_text(json.dumps({"step": 3, "provenance": {"config": sizes}, "probes": {}}))
    (tmp_path / "run_summary.json").write_text(json.dumps({"parameters": 12345}))
    page = write_report([tmp_path], tmp_path).read_text()
    assert "probed last at step 3, 6 layers, 4 to 8 experts, 2 a token" in page


def test_it_says_how_much_text_was_seen(tmp_path):
    text = text_of([[1, 2, 3], [4, 5]], [0, 0], ("prose",))
    for name, result in probe([chosen_view([[0], [1], [2], [3], [0]], 4, text)], "routing").items():
        store.save_arrays(tmp_path, name, result.arrays)
    (tmp_path / "summary.json").write_text(json.dumps({"step": 3, "probes": {}}))
    assert "probed last at step 3, on 5 tokens of 2 texts" in write_report([tmp_path], tmp_path).read_text()


def test_numbers_of_a_second_run_say_how_far_they_are_from_the_first(tmp_path):
    for name, last in (("one", 2.0), ("two", 1.5)):
        log(tmp_path / name, "train/loss", [3.0, last])
        (tmp_path / name / "run_summary.json").write_text(json.dumps({"val/loss": last, "computed in": "float32"}))
    page = write_report([tmp_path / "one", tmp_path / "two"], tmp_path).read_text()
    assert '<td>val/loss</td><td class="number">2</td><td class="number">1.5 (-0.5)</td>' in page
    assert '<td>computed in</td><td class="number">float32</td><td class="number">float32</td>' in page


def test_weights_answer_how_diversity_goes_with_depth(tmp_path, make_decoder, text):
    """A run probes what experts answer only when asked; their weights it has compared already."""
    results = probe(walk(make_decoder(num_hidden_layers=6), text, all_needs()), "matrix_similarity",
                    "neuron_similarity", "expert_outputs", "layer_diversity")  # fmt: skip
    whole = results.pop("layer_diversity")
    store.save_arrays(tmp_path, "matrix_similarity", results["matrix_similarity"].arrays)
    found = with_what_follows({"matrix_similarity": results["matrix_similarity"]})["layer_diversity"]
    assert list(found.headlines) == ["rises_weights", "last_layer_weights"]
    for name, headline in found.headlines.items():
        assert headline.value == pytest.approx(whole.headlines[name].value, rel=1e-5)
    assert escape(found.headlines["rises_weights"].sentence).replace("&#x27;", "&#39;") in write_report(
        [tmp_path], tmp_path
    ).read_text(encoding="utf-8")
    assert with_what_follows(results | {"layer_diversity": whole})["layer_diversity"] is whole


@pytest.mark.drawn
def test_a_picture_in_few_colours_is_the_same_to_the_eye():
    figure = drawing.new_figure(9, 6, "heat map")
    values = np.random.default_rng(0).normal(size=(64, 64))
    drawing.heat_map(figure.subplots(), values, cmap="RdBu_r")
    before = drawing.to_png(figure)
    after = compact(before)
    assert len(after) < 0.75 * len(before)
    one, other = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int32) for png in (before, after))
    assert np.abs(one - other).mean() < 2.0
    assert compact(b"x" * 10) == b"x" * 10  # small ones are not looked at


def test_small_curves_say_what_they_are_in():
    tags = ["train/router_entropy", "val/loss/code", "train/grad_norm"]
    run = SimpleNamespace(name="one", curves={tag: ([1, 2], [0.5, 0.4]) for tag in tags})
    axes = draw_curves([run], tags).axes
    assert [ax.get_ylabel() for ax in axes] == ["nats", "nats a token", ""]
    assert {ax.get_xlabel() for ax in axes} == {"step"}


@pytest.mark.parametrize(
    ("quantity", "unit"),
    [
        ("prediction/loss/books", "nats a token"),
        ("prediction/accuracy", "share of tokens"),
        ("neuron_matching/mean_tau", "Kendall's tau"),
        ("neuron_matching/mean_gain_up/layer_00", "cosine"),
        ("control_content/control_share_raw", "share of the squared norm"),
        ("control_content/control_cos_next_shuffled", "cosine"),
        ("control_content/ids_per_path/layer_02", "ids of ten"),
        ("control_content/path_entropy", "nats"),
        ("router_coupling/up_energy_own_raw", "squared cosine"),
    ],
)
def test_a_quantity_that_is_not_of_its_probes_usual_unit_has_its_own(quantity, unit):
    assert unit_of(quantity) == unit


@pytest.mark.drawn
def test_a_panel_has_room_for_its_title_and_says_what_its_numbers_are_in():
    names = ("expert_geometry/subspace_distance_down", "matrix_similarity/mean_cos_down", "balance/dead", "x/rise")
    fig = draw_history({name: {0: ([0, 4], [0.1, 0.2])} for name in names}, 4)
    fig.draw_without_rendering()
    for ax in fig.axes:
        assert ax.title.get_window_extent().x0 >= 0
        assert ax.title.get_window_extent().x1 <= fig.bbox.width
    assert [ax.get_ylabel() for ax in fig.axes] == ["distance over √R", "cosine", "experts", ""]
