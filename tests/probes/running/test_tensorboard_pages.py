"""TensorBoard in a browser: a person finds each dashboard, few groups, layers as lines of one chart, the answers first.

Pictures of what was seen lie in pytest's temporary folder; ``tests/probes/report/screenshots.py`` makes more.
"""

import logging

import pytest
from probe_training import train
from tensorboard import program

from moebed.study.hparams import write_hparams
from probes.registry import BY_NAME_ONLY, DEFAULT_PROBES
from probes.running.callback import ProbeCallback
from probes.running.tags import LOOKED_AT
from tests.browser import Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium, which is not installed"),
]
GROUPS = {*DEFAULT_PROBES, "answers", "layers", "train", "probes_cost"}
STUDY = {
    "arms": {
        arm: {
            "total_parameters": 1000,
            "settings": {"model.config.router": arm},
            "runs": {
                str(seed): {"status": "finished", "loss": loss + seed, "headlines": {}, "bits_per_byte": None}
                for seed in (1, 2)
            },
        }
        for arm, loss in (("softmax", 3.0), ("random", 4.0))
    }
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that opens a dashboard of a run and a study, waits until it says something, and gives its lines."""
    folder = tmp_path_factory.mktemp("logged")
    train(folder, [ProbeCallback(every_n_steps=2, num_sequences=4)], 4)
    write_hparams(STUDY, folder)
    yield from board_of(folder)


@pytest.fixture(scope="module")
def opened_with_all(tmp_path_factory):
    """The same of a run of every probe there is."""
    folder = tmp_path_factory.mktemp("logged_all")
    train(folder, [ProbeCallback(["all", *BY_NAME_ONLY], at_start=False, every_n_steps=0, num_sequences=4)], 1)
    yield from board_of(folder)


def board_of(folder):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"])
    address = board.launch()
    with Browser(1500, 6000) as browser:

        def lines(dashboard, awaited):
            browser.open("about:blank")
            browser.open(f"{address}#{dashboard}")
            for _ in range(150):
                found = browser.lines()
                if any(awaited in line for line in found):
                    break
                browser.evaluate("new Promise(done => setTimeout(done, 200))")
            browser.screenshot(folder / "seen" / f"{dashboard}.png")
            return found

        yield lines


def test_the_groups_are_few_and_begin_with_the_answers(opened):
    lines = opened("scalars", "probes_cost")
    groups = [line for line in lines if line in GROUPS]
    assert groups == sorted(GROUPS)
    assert len(groups) <= 20


def test_the_groups_stay_few_with_every_probe_there_is(opened_with_all):
    """Saturation, which answers after the second probing, is a group of its own as well."""
    known = {*GROUPS, *LOOKED_AT}
    lines = opened_with_all("scalars", "weights")
    groups = [line for line in lines if line in known]
    assert groups == sorted(known - {"routing", "saturation"} | ({"routing", "saturation"} & set(groups)))
    assert len(known) <= 18  # and run, val
    layers = [line for line in opened_with_all("custom_scalars", "weights") if line.endswith(", by layer")]
    assert {f"{group}, by layer" for group in LOOKED_AT} <= set(layers)
    assert len(layers) <= 20


def test_layers_are_lines_of_one_chart(opened):
    lines = opened("custom_scalars", "Matches")
    assert lines.index("train, by layer") < lines.index("balance, by layer")
    chart = lines.index("max_violation")
    assert "Matches (3)" in lines[chart : chart + 80]  # two layers, and their mean


def test_pictures_come_in_the_order_of_the_questions(opened):
    lines = opened("images", "answers/4_domains/figures/share_first")
    pictures = [line for line in lines if "/figures/" in line]
    assert pictures[0].startswith("answers/1_norm/figures/")
    assert [line for line in pictures if line.startswith("answers/")] == pictures[:4]


def test_a_study_is_in_the_hparams_dashboard(opened):
    lines = opened("hparams", "random")
    assert {"arm", "softmax", "model.config.router", "loss"} <= set(lines)
