"""Streaming sources: packed as they come, resumed to the token, without validation documents, shared by ranks."""

import json
import threading
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moebed.data.datamodule import TextDataModule
from moebed.data.loader import PackedLoader
from moebed.data.sources import Source, SourceConfig
from moebed.data.store import is_validation
from moebed.data.streaming import DocumentStream, StreamPacker
from moebed.data.tokenizer import BytesTokenizer, TokenizerConfig
from moebed.errors import UserError

TEXTS = [f"Document {i} of {i * i} words – end. " * (i % 4 + 1) for i in range(90)]


@pytest.fixture(params=["files", "hub"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> SourceConfig:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, texts in zip(paths, (TEXTS[:50], ["", *TEXTS[50:]]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = [str(path) for path in paths]
    if request.param == "files":
        return SourceConfig("stream", kind="files", path=files, streaming=True)
    return SourceConfig("stream", kind="hub", path="json", data_files=files, streaming=True)


def _packer(config: SourceConfig) -> StreamPacker:
    return StreamPacker(Source(config), BytesTokenizer(), sequence_length=64, validation_fraction=0.2)


def test_documents_come_again_and_resume_anywhere(config: SourceConfig) -> None:
    stream = DocumentStream(Source(config))
    assert list(islice(stream, 200)) == (TEXTS * 3)[:200]
    for place in (0, 3, 50, 89, 90, 130):
        stream = DocumentStream(Source(config))
        assert len(list(islice(stream, place))) == place
        resumed = DocumentStream(Source(config))
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert list(islice(resumed, 5)) == (TEXTS * 3)[place : place + 5]


def test_windows_are_the_training_documents_end_to_end(config: SourceConfig) -> None:
    packer = _packer(config)
    windows = [packer.next_window() for _ in range(20)]
    tokens = np.concatenate([windows[0][0][:1], *(ids[1:] for ids, _ in windows)])
    expected = [256]
    for text in TEXTS:
        if not is_validation(text, 0.2):
            expected += [*text.encode(), 256]
    assert tokens.tolist() == expected[: len(tokens)]
    assert all((lengths == (ids < 256)).all() for ids, lengths in windows)
    assert all(a[0][-1] == b[0][0] for a, b in pairwise(windows))


def test_packer_state_resumes_to_the_token(config: SourceConfig) -> None:
    packer = _packer(config)
    for _ in range(37):
        packer.next_window()
    resumed = _packer(config)
    resumed.load_state_dict(packer.state_dict())
    for _ in range(150):  # past the end of the source
        for ours, theirs in zip(packer.next_window(), resumed.next_window(), strict=True):
            assert (ours == theirs).all()


def test_ranks_share_a_stream_without_overlap(config: SourceConfig) -> None:
    def loader(batch_size: int, rank: int, world_size: int) -> PackedLoader:
        return PackedLoader([_packer(config)], np.ones(1), 64, batch_size, rank=rank, world_size=world_size)

    whole = islice(loader(6, 0, 1), 4)
    for batches in zip(whole, *(islice(loader(2, rank, 3), 4) for rank in range(3)), strict=True):
        assert torch.equal(batches[0]["labels"], torch.cat([batch["labels"] for batch in batches[1:]]))


def test_data_module_streams_beside_a_finite_domain(config: SourceConfig, tmp_path: Path) -> None:
    def make() -> TextDataModule:
        data = TextDataModule(
            [SourceConfig("math", max_bytes=50_000), config],
            TokenizerConfig("bpe", vocab_size=300),
            sequence_length=32,
            batch_size=4,
            validation_fraction=0.2,
            max_validation_windows=5,
            cache_dir=str(tmp_path / "cache"),
        )
        data.setup()
        return data

    data = make()
    loader = data.train_dataloader()
    batches = list(islice(loader, 12))
    assert set(torch.cat([batch["domain"] for batch in batches]).tolist()) == {0, 1}
    resumed = make().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    for ours, theirs in zip(islice(loader, 8), islice(resumed, 8), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    validation = torch.cat([batch["domain"][batch["labels"][:, 0] >= 0] for batch in data.val_dataloader()])
    assert validation.tolist() == [0] * 5 + [1] * 5
    text = (data.stores[1].folder / "validation.txt").read_text()
    assert text
    assert text.startswith(next(document for document in TEXTS if is_validation(document, 0.2)))
    assert data.summary()[1].train_tokens is None
    assert set(data.gzip_bits_per_byte()) == {"math", "stream", "all"}
    with pytest.raises(UserError, match="split has only"):
        data.probe_batch(10_000, split="train")


def test_an_empty_stream_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n')
    stream = DocumentStream(Source(SourceConfig("s", kind="files", path=str(tmp_path / "a.jsonl"), streaming=True)))
    with pytest.raises(UserError, match="'s' has no text to stream"):
        next(stream)


def test_batches_are_read_ahead_in_a_thread_and_resume_where_training_is(config: SourceConfig) -> None:
    def loader() -> PackedLoader:
        return PackedLoader([_packer(config)], np.ones(1), 64, 2, tracked=True)

    threads, wanted = set(), loader()
    fill = StreamPacker.next_window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamPacker, "next_window", lambda p: threads.add(threading.current_thread().name) or fill(p))
        first = iter(wanted)
        batches = [next(first) for _ in range(8)]
    assert threads == {"stream_0"}
    for _ in range(3):
        wanted.mark_consumed()
    resumed = loader()
    resumed.load_state_dict(wanted.state_dict())
    for batch, other in zip(batches[3:], resumed, strict=False):
        assert torch.equal(batch["input_ids"], other["input_ids"])
    again = next(iter(wanted))  # begun anew while the first is still open
    assert torch.equal(again["input_ids"], batches[3]["input_ids"])


def test_what_goes_wrong_while_reading_ahead_is_raised_in_training(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:60]) + "{")
    source = SourceConfig("stream", kind="files", path=str(tmp_path / "a.jsonl"), streaming=True)
    with pytest.raises(UserError, match="line 61 is no JSON"):
        list(islice(PackedLoader([_packer(source)], np.ones(1), 64, 2), 100))
