"""`moebed probe` given twice, killed and continued, and with other arguments into the same folder."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.cli import main
from moebed.machine.mapped import checksums
from probes.contract import ArrayName
from probes.registry import PROBES
from probes.running import store
from probes.running.checkpoint_pass import CheckpointPass
from probes.running.choosing import probes_for
from probes.running.run_folder import read_run
from tests.twice.conftest import kept_bytes, write_ids, write_model

ALL = ",".join(probes_for(["all", "logits"], True))
FEW = "balance,vocabulary,prediction,gate_similarity"
PLUGIN = """
import numpy as np
from moebed.views.layer import Need
from probes.contract import Headline, Probe, ProbeResult
from probes.registry import PROBES, register

PROBES.pop("mine", None)

@register
class Mine(Probe):
    name = "mine"
    question = "How large are the weights of the first choices?"
    needs = frozenset({Need.ROUTING, Need.PREDICTIONS})

    def update(self, view):
        if view.routing is not None:
            self.arrays[f"first/{view.index}"] = FACTOR * view.routing.topk_weight[:, 0].numpy()

    def update_head(self, head):
        self.arrays["loss"] = head.loss.numpy()

    @classmethod
    def describe(cls, arrays):
        found = [float(v.mean()) for k, v in arrays.items() if k.startswith("first/")]
        return ProbeResult(arrays, {}, {"first": Headline(sum(found), f"{sum(found):.6f} with {len(arrays)} arrays.")})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice")
    write_model(folder / "model")
    write_ids(folder / "ids.npy")
    write_ids(folder / "other.npy", seed=1)
    return folder


def probe(model: Path, out: Path, *options, probes: str = FEW, ids: str | None = "ids", name: str = "model") -> int:
    text = ["--input-ids", str(model / f"{ids}.npy")] if ids else []
    return main(["probe", str(model / name), "--out", str(out), "--probes", probes, *text, *map(str, options)])


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What a probing that was never stopped leaves, by its arguments."""
    found: dict[tuple, dict[str, bytes]] = {}

    def of(*options, **arguments) -> dict[str, bytes]:
        key = (*map(str, options), *sorted(arguments.items()))
        if key not in found:
            out = tmp_path_factory.mktemp("whole") / "out"
            probe(model, out, *options, **arguments)
            found[key] = kept_bytes(out)
        return found[key]

    return of


def shown(monkeypatch) -> list[int]:
    """The layers that are shown to probes from now on; -1 for the model's predictions."""
    seen: list[int] = []
    original = CheckpointPass.show

    def show(self, view):
        seen.append(getattr(view, "index", -1))
        original(self, view)

    monkeypatch.setattr(CheckpointPass, "show", show)
    return seen


@contextmanager
def stop_at(monkeypatch, place: int):
    """Be killed when a layer, or -1 for the predictions, is shown to a probe."""
    original = PROBES["balance"].update

    def update(self, view):
        if view.index == place:
            raise KeyboardInterrupt
        original(self, view)

    def update_head(self, head):
        if place == -1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PROBES["balance"], "update", update)
        patch.setattr(PROBES["balance"], "update_head", update_head)
        yield


def test_the_same_command_gives_the_same_bytes_and_reads_nothing(model, whole, tmp_path, monkeypatch, undrawn):
    assert probe(model, tmp_path, probes=ALL) == 0
    first = kept_bytes(tmp_path)
    assert first == whole(probes=ALL)
    assert len(first) == len(ALL.split(",")) + 1
    seen = shown(monkeypatch)
    monkeypatch.setattr(Checkpoint, "read_into", lambda *arguments: pytest.fail("read again"))
    assert probe(model, tmp_path, probes=ALL) == 0
    assert kept_bytes(tmp_path) == first
    assert seen == []


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow), 2, -1])
def test_killed_anywhere_and_continued_is_the_uninterrupted_one(model, whole, tmp_path, monkeypatch, undrawn, place):
    wanted = whole(probes=ALL)
    with stop_at(monkeypatch, place), pytest.raises((SystemExit, KeyboardInterrupt)):
        probe(model, tmp_path, probes=ALL)
    assert not (tmp_path / "summary.json").exists()
    seen = shown(monkeypatch)
    assert probe(model, tmp_path, probes=ALL) == 0
    assert seen == [0, 1, 2, -1][[0, 1, 2, -1].index(place) :]
    assert kept_bytes(tmp_path) == wanted
    assert not list((tmp_path / "results").rglob("stream.npz"))


def test_layers_left_out_before_are_looked_at(model, whole, tmp_path, monkeypatch, undrawn):
    """And what other arguments left in the folder changes no byte."""
    wanted, part = whole(probes=ALL), whole("--layers", "0,2", probes=ALL)
    assert probe(model, tmp_path, "--layers", "2", probes=ALL) == 0
    assert probe(model, tmp_path, probes=ALL) == 0
    assert kept_bytes(tmp_path) == wanted
    assert probe(model, tmp_path, "--layers", "0,2", probes=ALL) == 0
    assert kept_bytes(tmp_path) == part
    assert probe(model, tmp_path, probes=ALL) == 0
    assert kept_bytes(tmp_path) == wanted


def test_what_is_of_no_layer_stays_where_a_layer_is_shown_again(model, whole, tmp_path, undrawn):
    """One probe has the first layers, another none: the one sees them again, and what lay beside them stays."""
    both = "domain_share,balance"
    assert probe(model, tmp_path, "--layers", "0,1", probes="domain_share") == 0
    for _ in range(2):
        assert probe(model, tmp_path, probes=both) == 0
        assert kept_bytes(tmp_path) == whole(probes=both)


@pytest.mark.slow
def test_what_is_large_is_on_disk_once(model, tmp_path, monkeypatch, undrawn):
    """Here, whatever has more than 64 bytes: after a probing the results alone have it, and the next finds it there."""
    monkeypatch.setattr("moebed.machine.mapped.LARGE", 64)
    assert probe(model, tmp_path / "whole", probes=ALL) == 0
    out, wanted = tmp_path / "out", kept_bytes(tmp_path / "whole")
    seen = shown(monkeypatch)
    for _ in range(2):
        assert probe(model, out, probes=ALL) == 0
        assert kept_bytes(out) == wanted
        moved = 0
        for name in ALL.split(","):
            results = checksums(out / "results" / f"{name}.npz")
            for path in out.glob(f"results/.partial/*/{name}-*/*.npz"):
                own = {key for key in checksums(path) if path.stem == "head" or ArrayName.of(key).layer is not None}
                assert not [key for key in own if results.get(key) == checksums(path)[key]], (name, path)
                with np.load(path) as file:
                    moved += "in_results" in file.files
        assert moved > 20
    assert seen == [0, 1, 2, -1]
    assert probe(model, out, "--layers", "2", probes=ALL) == 0
    assert probe(model, out, probes=ALL) == 0
    assert kept_bytes(out) == wanted
    (out / "results" / "activations.npz").unlink()
    (out / "results" / "logits.npz").write_bytes(b"no archive")
    assert probe(model, out, probes=ALL) == 0
    assert kept_bytes(out) == wanted


def test_other_text_types_and_probes_into_the_same_folder(model, whole, tmp_path, monkeypatch, undrawn):
    for options, arguments in (
        ((), {}),
        ((), {"ids": "other"}),
        (("--dtype", "bfloat16"), {}),
        ((), {"ids": None, "probes": "gate_similarity,matrix_similarity"}),
        ((), {"probes": "vocabulary"}),
        ((), {"probes": FEW + ",norm_vs_score"}),
        ((), {}),
    ):
        assert probe(model, tmp_path, *options, **arguments) == 0
        wanted, found = whole(*options, **arguments), kept_bytes(tmp_path)
        assert {name: found[name] for name in wanted} == wanted, (options, arguments)


def test_a_layer_that_cannot_be_read_is_missing_each_time(model, tmp_path, capsys, undrawn):
    write_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][3, 5] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    write_ids(tmp_path / "ids.npy")
    said, bytes_kept = [], []
    for _ in range(3):
        assert probe(tmp_path, tmp_path / "out", probes=FEW + ",matrix_similarity") == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")])
        bytes_kept.append(kept_bytes(tmp_path / "out"))
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 1
    assert "layer 1" in said[0][0]
    assert "experts.2.w1.weight" in said[0][0]
    assert bytes_kept[0] == bytes_kept[1] == bytes_kept[2]
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][3, 5] = 0.1
    save_file(tensors, path, {"format": "pt"})
    assert probe(tmp_path, tmp_path / "out", probes=FEW + ",matrix_similarity") == 0
    assert probe(tmp_path, tmp_path / "fresh", probes=FEW + ",matrix_similarity") == 0
    assert kept_bytes(tmp_path / "out") == kept_bytes(tmp_path / "fresh")


def test_an_error_of_the_disk_that_passes_is_made_good(model, whole, tmp_path, monkeypatch, undrawn):
    """Layer 1's weights could not be read once: it is shown later, and the others are not."""
    wanted, original = whole(probes=ALL), Checkpoint.read_into

    def fail(self, part, out):
        if part.name.startswith("model.layers.1.block_sparse_moe.experts.0.w1"):
            raise OSError(5, "Input/output error")
        original(self, part, out)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_into", fail)
        assert probe(model, tmp_path, probes=ALL) == 2
    seen = shown(monkeypatch)
    assert probe(model, tmp_path, probes=ALL) == 0
    assert seen[0] == 1
    assert kept_bytes(tmp_path) == wanted


@pytest.fixture
def plugin(tmp_path):
    """A plug-in's file, which this process knows under its name as the command line would."""
    path = tmp_path / "my_probe.py"

    def write(factor: int) -> None:
        path.write_text(f"FACTOR = {factor}\n{PLUGIN}", encoding="utf-8")
        sys.modules.pop("moebed_plugin_my_probe", None)

    yield path, write
    PROBES.pop("mine", None)
    sys.modules.pop("moebed_plugin_my_probe", None)
    os.environ.pop("MOEBED_PLUGINS", None)


def test_an_edited_plugin_gives_new_numbers_and_leaves_the_others(model, plugin, tmp_path, monkeypatch, undrawn):
    path, write = plugin
    options, names, out = ["--plugins", path], "balance,expert_outputs,mine", tmp_path / "out"
    write(1)
    with stop_at(monkeypatch, 1), pytest.raises((SystemExit, KeyboardInterrupt)):
        probe(model, out, *options, probes=names)
    assert probe(model, out, *options, probes=names) == 0
    assert probe(model, tmp_path / "fresh", *options, probes=names) == 0
    first = kept_bytes(out)
    assert first == kept_bytes(tmp_path / "fresh")
    write(2)
    ran = []
    monkeypatch.setattr(PROBES["balance"], "update", lambda self, view: ran.append(view.index))
    assert probe(model, out, *options, probes=names) == 0
    second = kept_bytes(out)
    assert ran == []  # of it, all was kept
    assert second["balance.npz"] == first["balance.npz"]
    one = np.load(tmp_path / "fresh" / "results" / "mine.npz")["first/1"]
    np.testing.assert_array_equal(store.load_arrays(out, "mine")["first/1"], 2 * one)


def test_fresh_computes_all_anew(model, tmp_path, monkeypatch, undrawn):
    assert probe(model, tmp_path) == 0
    first, seen = kept_bytes(tmp_path), shown(monkeypatch)
    assert probe(model, tmp_path, "--fresh") == 0
    assert seen == [0, 1, 2, -1]
    assert kept_bytes(tmp_path) == first


def test_what_is_of_something_else_is_left_out_and_named(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("probes.running.callback.ProbeCallback._draw", lambda *arguments, **options: None)
    assert probe(model, tmp_path, probes="balance,vocabulary,gate_similarity") == 0
    capsys.readouterr()
    assert probe(model, tmp_path, probes="balance", ids="other") == 0
    said = capsys.readouterr().err
    assert "results/ also holds vocabulary, which are left out" in said
    run = read_run(tmp_path)
    assert set(run.results) == {"balance", "gate_similarity"}  # the latter looks at weights, whatever the text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "results/ also holds vocabulary, which are left out" in page
    assert "Do experts own token ids?" not in page
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_two_runs_checkpoints_of_one_size_are_two(tmp_path, capsys, undrawn):
    paths = []
    for seed, name in enumerate(("one", "two")):
        decoder = write_model(tmp_path / f"unused{seed}", seed=seed)
        paths.append(tmp_path / name / "checkpoints" / "last.ckpt")
        paths[-1].parent.mkdir(parents=True)
        state = {f"decoder.{key}": value for key, value in decoder.state_dict().items()}
        torch.save({"model_config": decoder.config.to_dict(), "state_dict": state}, paths[-1])
        os.utime(paths[-1], ns=(1, 1))
    assert paths[0].stat().st_size == paths[1].stat().st_size
    arguments = ["--out", str(tmp_path / "out"), "--probes", "gate_similarity"]
    assert main(["probe", str(paths[0]), *arguments]) == 0
    before = kept_bytes(tmp_path / "out")
    capsys.readouterr()
    assert main(["probe", str(paths[1]), *arguments]) == 2
    assert "holds the results of one/last.ckpt" in capsys.readouterr().err
    assert kept_bytes(tmp_path / "out") == before
    paths[0].write_bytes(paths[1].read_bytes())  # the first run went on: same size, and here the same time
    os.utime(paths[0], ns=(1, 1))
    assert main(["probe", str(paths[0]), *arguments]) == 0
    assert kept_bytes(tmp_path / "out") != before
    named = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["provenance"]["model"]
    assert list(named["files"]) == ["last.ckpt"]


def test_sigterm_within_a_layer_ends_the_probing_and_keeps_what_is_finished(model, tmp_path):
    path = tmp_path / "slow.py"
    slow = "import time\n" + PLUGIN.replace(
        "        if view.routing", "        if view.index: time.sleep(60)\n        if view.routing"
    )
    path.write_text(f"FACTOR = 1\n{slow}", encoding="utf-8")
    command = [sys.executable, "-m", "moebed.cli", "probe", str(model / "model"), "--out", str(tmp_path / "out"),
               "--probes", "balance,mine", "--input-ids", str(model / "ids.npy"), "--plugins", str(path)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(1200):
        if list(tmp_path.rglob("layer_00.npz")):
            break
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    before = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143, said
    assert time.monotonic() - before < 15
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert len(list(tmp_path.rglob("layer_00.npz"))) == 2
