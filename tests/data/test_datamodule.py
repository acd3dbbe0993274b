"""The data module as a run uses it: built once, opened at once, checked against the model, with its baseline."""

import gzip
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moebed.data.datamodule import TextDataModule
from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import TokenizerConfig, load_tokenizer
from moebed.errors import ConfigError, UserError

SMALL = [SourceConfig("math", max_bytes=40_000)]


def test_build_once_then_open_without_the_source(make_data: Callable, tmp_path: Path, capsys) -> None:
    make_data().prepare_data()
    assert "tokenized math: " in capsys.readouterr().err
    data = make_data()
    data.setup("fit")
    assert capsys.readouterr().err == ""
    assert data.domains == ["math", "stories"]


def test_two_builds_give_the_same_bytes(make_data: Callable, tmp_path: Path) -> None:
    contents = []
    for cache in ("one", "two"):
        data = make_data(tokenizer=TokenizerConfig("bpe", vocab_size=320), cache_dir=str(tmp_path / cache))
        data.prepare_data()
        files = sorted(path for path in (tmp_path / cache).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / cache): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2 + 2 * 8


def _build(cache: Path, summaries) -> None:
    data = TextDataModule([SourceConfig("math", max_bytes=300_000)], cache_dir=str(cache))
    data.setup()
    summaries.put(str(data.summary()))


def test_two_processes_build_the_same_cache(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")  # which imports nothing anew
    summaries = forked.Queue()
    processes = [forked.Process(target=_build, args=(tmp_path, summaries)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert summaries.get() == summaries.get() != ""
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["math", "tokenizer"]


def test_summary_adds_up(make_data: Callable) -> None:
    data = make_data()
    data.setup()
    for row, store in zip(data.summary(), data.stores, strict=True):
        assert row.validation_bytes == (store.folder / "validation.txt").stat().st_size
        assert row.documents is not None
        # With bytes as tokens: one EOS a document and one opening token a split are all that is not text.
        extra = row.train_tokens + row.validation_tokens - row.train_bytes - row.validation_bytes
        assert extra == row.documents + 2
        assert row.bytes_per_token == pytest.approx(1 - extra / (row.train_tokens + row.validation_tokens))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("windows", [None, 4])
def test_gzip_and_the_validation_windows_speak_of_the_same_bytes(make_data: Callable, kind: str, windows) -> None:
    data = make_data(tokenizer=TokenizerConfig(kind, vocab_size=320), max_validation_windows=windows)
    data.setup()
    sizes = torch.zeros(2, dtype=torch.int64)
    for batch in data.val_dataloader():
        sizes.index_add_(0, batch["domain"], batch["label_bytes"].sum(1).long())
    texts = [
        (store.folder / "validation.txt").read_bytes()[:size] for store, size in zip(data.stores, sizes, strict=True)
    ]
    assert [len(text) for text in texts] == sizes.tolist()
    bits = [8 * len(gzip.compress(text, 9)) for text in texts]
    result = data.gzip_bits_per_byte()
    assert result["math"] == bits[0] / len(texts[0])
    assert result["stories"] == bits[1] / len(texts[1])
    assert result["all"] == sum(bits) / sizes.sum().item()
    if windows is None:
        assert texts == [(store.folder / "validation.txt").read_bytes() for store in data.stores]


def test_probe_batch_is_fixed_and_even(make_data: Callable) -> None:
    data, again = make_data(), make_data()
    data.setup()
    again.setup()
    batch = data.probe_batch(6)
    assert torch.equal(batch["domain"].bincount(), torch.tensor([3, 3]))
    assert batch["labels"].shape == (6, 32)
    assert (batch["labels"] >= 0).all()
    assert all(torch.equal(batch[key], again.probe_batch(6)[key]) for key in batch)
    assert not torch.equal(batch["labels"], data.probe_batch(6, split="train")["labels"])
    with pytest.raises(UserError, match=r"probe batch of 9999 sequences .* has only"):
        data.probe_batch(9999)


def test_vocabulary_and_tokenizer_beside_the_run(make_data: Callable, tmp_path: Path) -> None:
    data = make_data(tokenizer=TokenizerConfig("bpe", vocab_size=320))
    data.setup()
    data.check_vocabulary(320)
    with pytest.raises(ConfigError, match=r"tokenizer has 320 ids but the model's vocab_size is 319: set model.config"):
        data.check_vocabulary(319)
    data.save_tokenizer(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").fingerprint() == data.tokenizer.fingerprint()
    for batch in data.val_dataloader():
        assert batch["input_ids"].max() < 320


def test_a_tokenizer_too_large_for_the_model_is_refused_before_text_is_tokenized(make_data: Callable, capsys) -> None:
    data = make_data(tokenizer=TokenizerConfig("bytes"))
    data.model_vocab_size = 256
    with pytest.raises(ConfigError, match=r"tokenizer has 257 ids but the model's vocab_size is 256"):
        data.prepare_data()
    assert "tokeniz" not in capsys.readouterr().err


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    one = "as all its text is one document, and a document is in one split (document_separator cuts it)"
    for text, cause in (("A short text.", f" {one}"), ("A short text.\n\nAnd another.", "")):
        (tmp_path / "a.txt").write_text(text)
        source = SourceConfig("tiny", kind="files", path=str(tmp_path / "a.txt"), document_separator="\n\n")
        data = TextDataModule([source], TokenizerConfig("bytes"), cache_dir=str(tmp_path / "cache"))
        said = f"training tokens do not fill one sequence of 256 + 1{cause}; give more text"
        with pytest.raises(UserError, match=re.escape(said)):
            data.setup()


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache folder"):
        TextDataModule(SMALL, cache_dir=str(tmp_path / "file" / "cache")).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length is 0"),
        ({"batch_size": -1}, "data.batch_size is -1"),
        ({"max_validation_windows": 0}, "data.max_validation_windows is 0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction is 1.0"),
        ({"seed": -3}, "data.seed is -3"),
        ({"sources": SMALL * 2}, "domains of different names"),
        ({"sources": []}, "one or more domains"),
    ],
)
def test_mistakes_found_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextDataModule(**arguments)


def test_default_sources_are_the_embedded_domains() -> None:
    assert TextDataModule().domains == ["code", "prose", "math"]
