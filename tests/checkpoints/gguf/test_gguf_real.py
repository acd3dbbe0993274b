"""A real GGUF file, SmolLM2-135M-Instruct in Q4_1: read as transformers reads it, upcycled as it is, and probed."""

import json

import numpy as np
import pytest
import torch
import transformers

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints.texts import CheckpointTokenizer
from moebed.cli import main
from tests.conftest import SHARED
from tests.real_model import NotToBeHad, real_gguf, real_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.shared("data/arxiv.txt", "data/wikipedia.txt")]


@pytest.fixture(scope="module")
def file():
    """The file; tests are skipped, in words, where it cannot be had."""
    try:
        return real_gguf()
    except NotToBeHad as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ids(file):
    """Real text by the file's own tokenizer (2, 128)."""
    tokenizer = CheckpointTokenizer(file)
    texts = [(SHARED / "data" / f"{name}.txt").read_text(encoding="utf-8")[:2000] for name in ("arxiv", "wikipedia")]
    return torch.tensor([tokenizer.encode(text)[:128] for text in texts])


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def off(found, wanted):
    """The largest difference of a logit, as a part of their spread."""
    return ((found - wanted).abs().max() / wanted.std()).item()


def test_logits_are_those_of_transformers_reading(file, ids):
    """transformers' weights, unpacked by code of its own, were written as bfloat16; ours are rounded to it as well."""
    folder = real_model()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decoder = load_decoder(file)
    print("off by", found := off(logits(decoder, ids), logits(theirs, ids)))
    assert found < 1e-4
    again = dict(load_decoder(folder).named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in decoder.named_parameters())


def test_text_is_cut_into_the_tokens_of_the_published_tokenizer(file):
    """Each digit stands alone, which transformers' reading of the file leaves out."""
    tokenizer = CheckpointTokenizer(file)
    known = {  # of the published tokenizer.json, as others' checks of it have them
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "\n": [198],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    for text, wanted in known.items():
        assert tokenizer.encode(text) == wanted
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = (SHARED / "data" / "wikipedia.txt").read_text(encoding="utf-8")[:20000]
    without_digits = "".join(letter for letter in text if not letter.isnumeric())
    assert tokenizer.encode(without_digits) == theirs(without_digits)["input_ids"]


def test_upcycled_straight_from_the_file(file, ids, tmp_path):
    out = tmp_path / "moe"
    assert main(["upcycle", str(file), "--out", str(out), "--method", "copy", "--num-experts", "4"]) == 0
    print("off by", found := off(logits(load_decoder(out), ids), logits(load_decoder(file), ids)))
    assert found < 1e-4
    text = [f"--domain={name}={SHARED / 'data' / name}.txt" for name in ("arxiv", "wikipedia")]
    arguments = ["--out", str(tmp_path / "probed"), "--domain-tokens", "512", "--sequence-length", "128"]
    probes = ["--probes", "matrix_similarity,norm_vs_score,domain_share,prediction", "--layers", "0,15,29"]
    assert main(["probe", str(out), "--reference-dense", str(file), *text, *arguments, *probes]) == 0
    with np.load(tmp_path / "probed" / "results" / "matrix_similarity.npz") as arrays:
        copies = arrays["matrix_cos/15/gate"]
    np.testing.assert_allclose(copies[:4, :4], 1.0, atol=1e-5)  # the packing's error is the same in all copies
    summary = json.loads((tmp_path / "probed" / "summary.json").read_text())
    (note,) = [note for note in summary["notes"] if "dequantised" in note]
    assert "expected relative error" in note


def test_probed_as_it_is_with_real_text(file, tmp_path):
    text = ["--domain", f"wiki={SHARED / 'data' / 'wikipedia.txt'}", "--domain-tokens", "512"]
    arguments = ["--out", str(tmp_path / "out"), "--probes", "prediction", "--memory-budget", "600MiB"]
    assert main(["probe", str(file), *text, *arguments]) == 0
    with np.load(tmp_path / "out" / "results" / "prediction.npz") as arrays:
        loss = arrays["loss"]
    assert np.isnan(loss).sum() == 2  # after the last token of a text
    print("mean loss, nats a token", mean := np.nanmean(loss))
    assert 1 < mean < 4


def test_it_is_described(file):
    checkpoint = Checkpoint.open(file)
    assert checkpoint.family.model_type == "llama"
    assert checkpoint.config.num_hidden_layers == 30
    (note,) = checkpoint.notes
    print(note)
    assert "Q4_1" in note
