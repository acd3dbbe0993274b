"""TensorBoard itself, over HTTP, shows what the probes wrote."""

import io
import json
import logging
import urllib.parse
import urllib.request

import pytest
from PIL import Image
from probe_training import train
from tensorboard import program

from probes.running import store
from probes.running.callback import ProbeCallback


@pytest.fixture
def served(tmp_path):
    """A finished run of three probings, and a function that asks TensorBoard's HTTP interface about it."""
    train(tmp_path, [ProbeCallback(["balance", "norm_vs_score"], every_n_steps=2, num_sequences=2)], 4)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(tmp_path), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"])
    address = board.launch()

    def ask(path, query="", **more):
        asked = "&".join(filter(None, [query, urllib.parse.urlencode(more)]))
        with urllib.request.urlopen(f"{address}data/{path}?{asked}", timeout=60) as answer:
            return answer.read()

    return tmp_path, ask


@pytest.mark.drawn
def test_scalars_pictures_and_sentences_come_back(served):
    out, ask = served
    scalars = json.loads(ask("plugin/scalars/tags"))
    run = next(iter(scalars))
    wanted = {"layers/balance/max_violation/layer_01", "norm_vs_score/spearman", "probes_cost/balance_share",
              "probes_cost/share_of_wall_time"}  # fmt: skip
    assert wanted <= set(scalars[run])
    points = json.loads(ask("plugin/scalars/scalars", run=run, tag="layers/balance/max_violation/layer_01"))
    assert [step for _, step, _ in points] == [0, 2, 4]
    history = [line["scalars"]["balance/max_violation/layer_01"] for line in store.load_history(out)]
    assert [value for *_, value in points] == pytest.approx(history, rel=1e-6)

    pictures = json.loads(ask("plugin/images/tags"))[run]
    assert "balance/figures/load" in pictures
    [entry] = json.loads(ask("plugin/images/images", run=run, tag="balance/figures/load", sample=0))
    shown = Image.open(io.BytesIO(ask("plugin/images/individualImage", entry["query"])))
    drawn = Image.open(out / "figures" / "balance_load.png")
    assert shown.convert("RGB").tobytes() == drawn.convert("RGB").tobytes()

    sentences = json.loads(ask("plugin/text/text", run=run, tag="balance/max_violation/text_summary"))
    said = json.loads((out / "summary.json").read_text())["probes"]["balance"]["headlines"]["max_violation"]["sentence"]
    assert said in sentences[-1]["text"]
