"""A store holds each document once, on one side, with its exact bytes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from moebed.data.sources import Source, SourceConfig
from moebed.data.store import DomainStore, _reported, build_domain, gzip_size, is_validation
from moebed.data.tokenizer import BytesTokenizer, Encoded
from moebed.errors import UserError

TEXTS = [f"Document {i} says “{i * 7}” and ends. " * (i % 5 + 1) for i in range(120)] + ["Twice."] * 3


def _source(folder: Path, texts: list[str] = TEXTS, **options: object) -> Source:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(SourceConfig("texts", kind="files", path=str(path), **options))  # type: ignore[arg-type]


def _build(folder: Path, fraction: float = 0.2, **options: object) -> DomainStore:
    return build_domain(_source(folder, **options), BytesTokenizer(), folder / "cache", fraction, 300)


def _documents(store: DomainStore, split: str) -> list[str]:
    stream = getattr(store, split)
    pieces = np.split(np.array(stream.tokens), stream.document_starts)
    assert pieces[0].tolist() == [256]
    assert all(piece[-1] == 256 for piece in pieces)
    return [BytesTokenizer().decode(piece) for piece in pieces[1:]]


def test_splits_are_disjoint_and_hold_everything(tmp_path: Path) -> None:
    store = _build(tmp_path)
    train, validation = _documents(store, "train"), _documents(store, "validation")
    assert set(train).isdisjoint(validation)
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if not is_validation(text, 0.2)]
    assert 10 < len(validation) < 40
    assert (train + validation).count("Twice.") == 3


def test_index_and_bytes_agree_with_the_text(tmp_path: Path) -> None:
    store = _build(tmp_path)
    for split, stream in (("train", store.train), ("validation", store.validation)):
        entry = store.index["splits"][split]
        documents = _documents(store, split)
        assert stream is not None
        assert entry["documents"] == len(stream.document_starts) == len(documents)
        assert entry["tokens"] == len(stream) == 1 + sum(len(text.encode()) + 1 for text in documents)
        assert entry["bytes"] == stream.token_bytes.sum() == sum(len(text.encode()) for text in documents)
        assert (stream.token_bytes[stream.tokens == 256] == 0).all()
    assert (store.folder / "validation.txt").read_text() == "".join(_documents(store, "validation"))


def test_a_larger_fraction_keeps_what_was_in_validation() -> None:
    small = [text for text in TEXTS if is_validation(text, 0.1)]
    assert small
    assert all(is_validation(text, 0.3) for text in small)


def test_changes_that_matter_build_anew_and_others_do_not(tmp_path: Path) -> None:
    store = _build(tmp_path)
    folders = {store.folder, _build(tmp_path, weight=3.0).folder}
    # A file written again has another time stamp, so even the same text is read again.
    folders |= {_build(tmp_path, fraction=0.3).folder, _build(tmp_path, max_bytes=2000).folder}
    assert len(folders) == 4
    before = {path.name for path in (tmp_path / "cache").iterdir()}
    source = Source(SourceConfig("texts", kind="files", path=str(tmp_path / "texts.jsonl"), max_bytes=2000, weight=2.0))
    build_domain(source, BytesTokenizer(), tmp_path / "cache", 0.2, 300)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == before


@pytest.mark.parametrize("windows", [None, 1, 3])
def test_validation_text_is_what_the_windows_predict(tmp_path: Path, windows: int | None) -> None:
    store = _build(tmp_path)
    length = 50
    count = store.validation.num_windows(length, windows)
    predicted = store.validation.tokens[1 : 1 + count * length]
    text = store.validation_text(length, windows)
    assert text == bytes(predicted[predicted < 256].astype(np.uint8))
    assert gzip_size(text) == len(gzip.compress(text, 9))
    if windows is None:
        assert text == (store.folder / "validation.txt").read_bytes()


def test_a_token_of_more_than_64_kB(tmp_path: Path) -> None:
    class Words(BytesTokenizer):
        def encode_documents(self, documents: list[str]) -> list[Encoded]:
            words = [text.split(" ") for text in documents]
            return [(np.arange(len(w)), np.array([len(x) + (i > 0) for i, x in enumerate(w)])) for w in words]

        def fingerprint(self) -> str:
            return "words"

    texts = ["short one", f"long {'x' * 70_000} end", "after"] * 2
    store = build_domain(_source(tmp_path, texts), Words(), tmp_path / "cache", 1e-9, 300)
    assert store.train is not None
    assert store.train.token_bytes.tolist() == [0, *([5, 4, 0, 4, 70_001, 4, 0, 5, 0] * 2)]


def test_an_empty_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'texts' has no text"):
        _build(tmp_path, texts=["", "  \n"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_store_says_which_folder_to_delete(tmp_path: Path) -> None:
    store = _build(tmp_path)
    tokens = store.folder / "train.tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"cached tokens in {store.folder} are damaged .*; delete that folder"):
        DomainStore("texts", store.folder)


def test_what_was_tokenized_is_told_in_bytes_of_three_digits(capsys):
    assert list(_reported("math", ["\u00e9" * 700, "x"])) == ["\u00e9" * 700, "x"]
    assert capsys.readouterr().err.startswith("tokenized math: 2 documents, 1.4 kB in ")
