"""Text for a checkpoint: its own tokenizer, presets, ids, domains; and what is wrong with them, in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.checkpoints.text_options import TextOptions
from moebed.checkpoints.texts import PAPER_CHOSEN, PAPER_SHORT, read_texts
from moebed.cli import main
from moebed.data.tokenizer import BytesTokenizer
from moebed.errors import ConfigError, UserError
from probes.running import store
from tests.conftest import SHARED

WIKITEXT = SHARED / "data" / "wikitext103_test.csv"
BOS = 256


def add_tokenizer(folder: Path, bos: bool = True) -> None:
    """A byte-level tokenizer, an id a byte, with a BOS as Mixtral's has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": BOS, "</s>": BOS + 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "model", vocab_size=258, max_position_embeddings=1500, num_experts_per_tok=2)
    add_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def read(checkpoint, **options):
    return PretrainedMoE(str(checkpoint), text=TextOptions(**options))


def test_the_papers_inputs(checkpoint, tmp_path):
    rows = [" \n", " = Heading = \n", *(f" line {i} of the text . \n" for i in range(12))]
    (tmp_path / "wiki.txt").write_text("".join(rows))
    text = read(checkpoint, text=["paper-short", "paper-chosen", f"paper-long={tmp_path / 'wiki.txt'}"]).text
    assert len(text.input_ids) == 12
    assert text.sequence_start.tolist()[:2] == [0, 1 + len(PAPER_SHORT)]  # BOS, and a token a byte
    assert set(text.token_ids[text.sequence_start].tolist()) == {BOS}
    assert "".join(text.token_text[1 : 1 + len(PAPER_SHORT)]) == PAPER_SHORT
    assert 45 <= len(PAPER_CHOSEN.split()) <= 70
    start = int(text.sequence_start[2])
    assert "".join(text.token_text[start + 1 :]).startswith("line 0 of the text .<s>line 1")


@pytest.mark.shared("data/wikitext103_test.csv")
def test_the_papers_long_input_from_the_test_set(checkpoint):
    text = read(checkpoint, text=[f"paper-long={WIKITEXT}"], sequence_length=2).text
    assert len(text.input_ids) == 10
    said = "".join(text.token_text)
    assert said.startswith("<s>B of the Bang was a sculpture by Thomas Heatherwick")
    assert " = " not in said
    assert 800 < len(said.split()) < 1000  # words; about 1100 tokens of Mixtral


def test_files_are_sequences_and_ids_may_be_many(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("defgh")
    np.save(tmp_path / "one.npy", np.arange(7, dtype=np.int32))
    np.save(tmp_path / "two.npy", np.arange(8).reshape(2, 4))
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    ids = [str(tmp_path / name) for name in ("one.npy", "two.npy")]
    text = read(checkpoint, text=files, input_ids=ids).text
    assert text.token_mask.sum(1).tolist() == [4, 6, 7, 4, 4]
    assert text.sequence_start.tolist() == [0, 4, 10, 17, 21]
    assert text.token_ids[10:].tolist() == [*range(7), *range(8)]
    assert text.domains == ("text",)


def test_domains_are_cut_into_documents_evenly_over_the_file(checkpoint, tmp_path):
    documents = [f"document {i:03d} " + "x" * 3000 for i in range(50)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"{i} short"}) + "\n" for i in range(3)))
    model = read(checkpoint, domain=[f"a={tmp_path / 'a.txt'}", f"b={tmp_path / 'b.jsonl'}"], sequence_length=64,
                 domain_tokens=640)  # fmt: skip
    text = model.text
    assert text.domains == ("a", "b")
    assert text.domain.tolist() == [0] * 10 + [1] * 3
    assert text.token_mask.sum(1)[:10].tolist() == [64] * 10
    said = ["".join(text.token_text[64 * row : 64 * row + 13]) for row in (0, 9)]
    assert said == ["<s>document 000", "<s>document 049"]
    assert any("10 of 50 documents" in note for note in model.notes)


def test_the_command_reads_the_text_field_that_it_is_told(checkpoint, tmp_path, capsys):
    """As an option and in a file; and the one line where records have no such field."""
    records = "".join(json.dumps({"id": f"id {i}", "body": f"the text of document {i}"}) + "\n" for i in range(3))
    (tmp_path / "mine.jsonl").write_text(records, encoding="utf-8")
    options = ["--domain", f"mine={tmp_path / 'mine.jsonl'}", "--probes", "routing"]
    (tmp_path / "probe.yaml").write_text("text_field: id\n", encoding="utf-8")
    for number, (given, wanted) in enumerate(
        {("--text-field", "body"): "the text of document 0", ("--config", str(tmp_path / "probe.yaml")): "id 0"}.items()
    ):
        out = tmp_path / f"out_{number}"
        assert main(["probe", str(checkpoint), "--out", str(out), *options, *given]) == 0
        arrays = store.load_arrays(out, "routing")
        first, second = arrays["sequence_start"][:2]
        assert "".join(arrays["token_text"][first + 1 : second]) == wanted  # after the BOS
        assert len(arrays["sequence_start"]) == 3
    line = fails(capsys, checkpoint, *options)
    assert "no column 'text'" in line
    assert "--text-field" in line
    assert line.endswith("id, body")
    assert "is a folder; give one file" in fails(capsys, checkpoint, "--domain", f"mine={tmp_path}")
    assert "it is a folder; give the files in it" in fails(capsys, checkpoint, "--text", str(tmp_path))


def test_a_runs_own_tokenizer_is_found_above_its_checkpoint(tmp_path):
    decoder = write(tmp_path / "unused", vocab_size=258)
    state = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    torch.save({"model_config": decoder.config.to_dict(), "state_dict": state}, path)
    with pytest.raises(UserError, match="tokenizer"):
        read(path, text=["paper-short"])
    BytesTokenizer().save(tmp_path / "run" / "tokenizer")
    text = read(path, text=["paper-short"]).text
    assert text.token_ids.tolist() == list(PAPER_SHORT.encode())


def test_a_tokenizer_further_up_is_no_run_s_own(tmp_path):
    decoder = write(tmp_path / "unused", vocab_size=258)
    state = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    for folder in (tmp_path / "deep" / "run" / "checkpoints", tmp_path / "deep" / "run" / "moved"):
        folder.mkdir(parents=True)
        torch.save({"model_config": decoder.config.to_dict(), "state_dict": state}, folder / "last.ckpt")
    BytesTokenizer().save(tmp_path / "deep" / "tokenizer")
    BytesTokenizer().save(tmp_path / "tokenizer")
    for folder in ("checkpoints", "moved"):
        with pytest.raises(UserError, match="has no tokenizer/ of the run"):
            read(tmp_path / "deep" / "run" / folder / "last.ckpt", text=["paper-short"])


def fails(capsys, checkpoint, *options):
    """The one line of an error; nothing is left behind."""
    capsys.readouterr()
    out = checkpoint.parent / "out"
    assert main(["probe", str(checkpoint), "--out", str(out), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    assert len(lines) == 1
    assert not (out / "summary.json").exists()
    return lines[0]


def test_faults(checkpoint, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("x" * 1600)
    (tmp_path / "good.txt").write_text("good")
    np.save(tmp_path / "large.npy", np.array([1, 258]))
    np.save(tmp_path / "negative.npy", np.array([1, -1]))
    np.save(tmp_path / "floats.npy", np.array([1.5]))
    np.save(tmp_path / "none.npy", np.zeros(0, np.int64))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")

    def said(option, name):
        return fails(capsys, checkpoint, option, str(tmp_path / name))

    assert "holds no text" in said("--text", "empty.txt")
    assert "1601 tokens but the model has 1500 positions" in said("--text", "long.txt")
    assert "no such file" in said("--text", "missing.txt")
    assert "token id 258 but the model's embedding has 258 rows" in said("--input-ids", "large.npy")
    assert "token id -1" in said("--input-ids", "negative.npy")
    assert "must be integers" in said("--input-ids", "floats.npy")
    assert "must be integers" in said("--input-ids", "none.npy")
    assert "cannot be read" in said("--input-ids", "broken.npy")
    assert "NAME=FILE" in fails(capsys, checkpoint, "--domain", "x")
    assert "no such file" in fails(capsys, checkpoint, "--domain", "x=missing.txt")
    assert "holds no text" in fails(capsys, checkpoint, "--domain", f"x={tmp_path / 'empty.txt'}")
    twice = ["--domain", f"x={tmp_path / 'good.txt'}"] * 2
    assert "two domains called x" in fails(capsys, checkpoint, *twice)
    assert "needs text" in fails(capsys, checkpoint, "--probes", "routing")
    assert "needs text" in fails(capsys, checkpoint, "--save-logits")
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails(capsys, checkpoint, "--device", "cuda")
    assert "while it trains" in fails(capsys, checkpoint, "--text", "paper-short", "--probes", "saturation")
    with pytest.raises(ConfigError, match="at least 2"):
        TextOptions(sequence_length=1)


def test_a_tokenizer_that_does_not_belong_to_the_model(tmp_path, capsys):
    write(tmp_path / "model", vocab_size=100)
    assert "put its tokenizer.json there" in fails(capsys, tmp_path / "model", "--text", "paper-short")
    add_tokenizer(tmp_path / "model")
    assert "the tokenizer does not belong" in fails(capsys, tmp_path / "model", "--text", "paper-short")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    line = fails(capsys, tmp_path / "model", "--text", "paper-short")
    assert "tokenizer" in line


def test_a_budget_too_small_for_the_text_says_what_is_needed(checkpoint, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.zeros((50, 600), np.int64))
    line = fails(capsys, checkpoint, "--input-ids", str(tmp_path / "ids.npy"), "--memory-budget", "1MiB")
    assert "memory_budget" in line


def test_one_token(checkpoint, tmp_path):
    np.save(tmp_path / "one.npy", np.array([5]))
    out = tmp_path / "out"
    names = "prediction,routing,repeats,balance"
    options = ["--input-ids", str(tmp_path / "one.npy"), "--probes", names]
    assert main(["probe", str(checkpoint), "--out", str(out), *options]) == 0
    probes = json.loads((out / "summary.json").read_text())["probes"]
    assert "nothing to predict" in probes["prediction"]["notes"][0]
    assert store.load_arrays(out, "routing")["router_probs/0"].shape == (1, 6)


def test_no_tokenizer_is_needed_for_ids(tmp_path):
    write(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3]))
    text, notes = read_texts(TextOptions(input_ids=[str(tmp_path / "ids.npy")]), tmp_path / "model",
                             PretrainedMoE(str(tmp_path / "model")).config)  # fmt: skip
    assert text.token_text == ()
    assert notes == []
