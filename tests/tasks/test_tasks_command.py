"""``moebed tasks`` over a small trained model, with lm-eval's own loop; skipped where lm-eval is not installed."""

import json
import math

import numpy as np
import pytest
import torch
import yaml

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.cli import main
from tests.small_run import small_recipe, write_recipe

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'moebed[tasks]'")
END = 256  # of the bytes tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["fit", "--config", str(write_recipe(folder, small_recipe(folder)))]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def ids_of(text):
    return list(text.encode())


def directly(decoder, context, continuation):
    """Sum of ln p of a continuation's bytes, one forward pass of the sequence alone."""
    ids = torch.tensor([ids_of(context) + ids_of(continuation)])
    with torch.no_grad():
        logits = decoder(ids).logits[0].double().log_softmax(-1)
    first = len(ids_of(context))
    return sum(float(logits[at - 1, ids[0, at]]) for at in range(first, ids.shape[1]))


def test_accuracy_is_that_of_a_direct_computation(checkpoint, tmp_path):
    from moebed.tasks.files import items

    arguments = ["--tasks", "moebed_agreement,moebed_addition", "--limit", "20", "--probes", "none"]
    assert main(["tasks", str(checkpoint), "--out", str(tmp_path), *arguments]) == 0
    found = json.loads((tmp_path / "run_summary.json").read_text())
    decoder = load_decoder(Checkpoint.open(checkpoint)).eval()
    for name in ("agreement", "addition"):
        right = 0
        for item in list(getattr(items, name)()["test"])[:20]:
            sums = [directly(decoder, item["query"], f" {choice}") for choice in item["choices"]]
            right += int(np.argmax(sums)) == item["label"]
        assert found[f"tasks/moebed_{name}/acc"] == right / 20
        assert found[f"tasks/moebed_{name}/items"] == 20


def test_perplexity_of_a_text_is_that_of_a_direct_computation(checkpoint, tmp_path):
    file = tmp_path / "words.txt"
    text = "The cat sat on the mat. It was late, and nobody came."
    file.write_text(text, encoding="utf-8")
    assert main(["tasks", str(checkpoint), "--out", str(tmp_path / "out"), "--text", f"words={file}"]) == 0
    found = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    decoder = load_decoder(Checkpoint.open(checkpoint)).eval()
    ids = torch.tensor([[END, *ids_of(text)]])
    with torch.no_grad():
        logits = decoder(ids).logits[0].double().log_softmax(-1)
    bits = -sum(float(logits[at, ids[0, at + 1]]) for at in range(len(text))) / math.log(2) / len(text)
    assert found["tasks/words/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_use_of_experts_adds_up_by_task(checkpoint, tmp_path):
    """Counts of each task are K times the tokens that its text has, as a forward pass counts them."""
    names = ["moebed_recall", "moebed_agreement"]
    assert main(["tasks", str(checkpoint), "--out", str(tmp_path), "--tasks", ",".join(names), "--limit", "6"]) == 0
    arrays = np.load(tmp_path / "results" / "domain_share.npz")
    decoder = load_decoder(Checkpoint.open(checkpoint)).eval()
    for number, name in enumerate(names):
        lines = (tmp_path / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        assert len(texts) == 6 * (4 if name == "moebed_recall" else 2)
        for layer in decoder.config.moe_layers:
            counts = torch.zeros(decoder.config.layer(layer).num_experts)
            for text in texts:
                with torch.no_grad():
                    routing = decoder(torch.tensor([ids_of(text)[:256]])).routings[layer]
                counts += torch.bincount(routing.topk_index.flatten(), minlength=len(counts))
            found = arrays[f"count_any/{layer}"][arrays["domain"] == number].sum(axis=0)
            np.testing.assert_array_equal(found, counts)
            assert found.sum() == 2 * sum(min(256, len(ids_of(text))) for text in texts)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "domain_share" in summary["probes"]
    assert "tasks/moebed_recall/acc" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_generated_is_greedy_and_ends_before_what_ends_it(checkpoint):
    from lm_eval.api.instance import Instance

    from moebed.checkpoints.texts import CheckpointTokenizer
    from moebed.tasks.adapter import DecoderLM

    decoder = load_decoder(Checkpoint.open(checkpoint)).eval()
    ids = ids_of("the cat")
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(decoder(torch.tensor([ids])).logits[0, -1].argmax()))
    whole = bytes(number for number in ids[7:] if number < END).decode("utf-8", "replace")
    model = DecoderLM(decoder, CheckpointTokenizer(checkpoint))

    def generated(until):
        options = {"until": until, "max_gen_toks": 6}
        return model.generate_until([Instance("generate_until", {}, ("the cat", options), 0, ("one", 0, 1))])[0]

    assert generated([]) == whole
    assert whole
    assert generated([whole[-1]]) == whole.split(whole[-1])[0]
    assert list(model.texts["one"]) == ["the cat"]


def test_a_second_run_goes_on_where_the_first_one_stopped(checkpoint, tmp_path, capsys):
    arguments = ["tasks", str(checkpoint), "--out", str(tmp_path), "--limit", "5", "--probes", "none", "--tasks"]
    assert main([*arguments, "moebed_recall"]) == 0
    first = (tmp_path / "tasks" / "moebed_recall.json").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "moebed_recall,moebed_addition"]) == 0
    assert "moebed_recall: finished already" in capsys.readouterr().err
    assert (tmp_path / "tasks" / "moebed_recall.json").read_bytes() == first
    arguments[5] = "4"
    assert main([*arguments, "moebed_recall"]) == 0
    assert (tmp_path / "tasks" / "moebed_recall.json").read_bytes() != first


def test_nobody_hears_that_a_folder_is_no_repository_of_git(checkpoint, tmp_path, monkeypatch, capfd):
    """lm-eval asks git for a commit, which says "fatal" where there is none."""
    monkeypatch.chdir(tmp_path)
    options = ["--tasks", "moebed_addition", "--limit", "2", "--probes", "none"]
    assert main(["tasks", str(checkpoint), "--out", str(tmp_path / "out"), *options]) == 0
    assert "fatal" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs --tasks A,B or --text NAME=FILE"),
        (["--tasks", "moebed_recal"], "did you mean 'moebed_recall'?"),
        (["--text", "words"], "write it as NAME=FILE"),
        (["--text", "words=nothing.txt"], "there is no such file"),
        (["--tasks", "moebed_recall", "--limit", "0"], "--limit is '0'; give a whole number of at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(checkpoint, tmp_path, capsys, arguments, said):
    assert main(["tasks", str(checkpoint), "--out", str(tmp_path / "out"), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error")]
    assert said in line


@pytest.mark.slow
def test_a_study_compares_arms_on_tasks(tmp_path, capsys):
    recipe = small_recipe(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    content = {
        "base": "base.yaml",
        "arms": {"one": {}, "other": {"model.optimizer.learning_rate": 0.01}},
        "seeds": [1, 2],
        "tasks": {"tasks": ["moebed_addition"], "limit": 6},
    }
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    out = tmp_path / "out"
    command = ["study", str(tmp_path / "try.yaml"), "--out", str(out), "--jobs", "2"]
    assert main(command) == 0
    study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    for arm, seed in (("one", 1), ("other", 2)):
        numbers = json.loads((out / "tasks" / arm / f"seed_{seed}" / "run_summary.json").read_text(encoding="utf-8"))
        found = study["arms"][arm]["runs"][str(seed)]["headlines"]["tasks/moebed_addition/acc"]
        assert found == {"step": [4], "value": [numbers["tasks/moebed_addition/acc"]]}
        assert not [name for name in study["arms"][arm]["runs"][str(seed)]["headlines"] if "stderr" in name]
    assert "tasks/moebed_addition/acc" in (out / "study.md").read_text(encoding="utf-8")
    # The second time nothing is evaluated again.
    before = {file: file.stat().st_mtime_ns for file in (out / "tasks").rglob("*.json")}
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "tasks").rglob("*.json")} == before
