"""Streaming sources: packed as they come, resumed to the token, without validation documents, shared by ranks."""

import gc
import json
import threading
import time
import weakref
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moebed.data.datamodule import TextDataModule
from moebed.data.loader import PackedLoader, whole_loader_state
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
    pytest.importorskip("datasets")
    return SourceConfig("stream", kind="hub", path="json", data_files=files, streaming=True)


def _packer(config: SourceConfig, rank: int = 0, batch_size: int = 1, world_size: int = 1) -> StreamPacker:
    rows = range(rank * batch_size, (rank + 1) * batch_size)
    return StreamPacker(Source(config), BytesTokenizer(), 64, 0.2, rows, batch_size * world_size)


def _loader(config: SourceConfig, batch_size: int, rank: int = 0, world_size: int = 1) -> PackedLoader:
    packer = _packer(config, rank, batch_size, world_size)
    return PackedLoader([packer], np.ones(1), 64, batch_size, rank=rank, world_size=world_size)


def _texts(stream: DocumentStream, count: int) -> list[str]:
    return [document.text for document in islice(stream, count)]


def test_documents_come_again_and_resume_anywhere(config: SourceConfig) -> None:
    stream = DocumentStream(Source(config))
    assert _texts(stream, 200) == (TEXTS * 3)[:200]
    for place in (0, 3, 50, 89, 90, 130):
        stream = DocumentStream(Source(config))
        assert len(_texts(stream, place)) == place
        resumed = DocumentStream(Source(config))
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert _texts(resumed, 5) == (TEXTS * 3)[place : place + 5]


def test_rows_are_dealt_every_document_once_a_pass_and_another_the_next(config: SourceConfig) -> None:
    rows = [DocumentStream(Source(config), range(row, row + 1), 4) for row in range(4)]
    dealt = [list(islice(stream, 60)) for stream in rows]
    for passes in range(2):
        of_pass = [document for row in dealt for document in row if document.place[0] == passes]
        assert sorted(document.text for document in of_pass) == sorted(TEXTS)
    number = dict(zip(TEXTS, [*range(50), *range(51, 91)], strict=True))  # there is an empty one between the files
    for row, documents in enumerate(dealt):
        assert {document.row for document in documents} == {row}
        assert [(number[d.text] + d.place[0]) % 4 for d in documents] == [row] * 60


def test_windows_are_the_training_documents_end_to_end(config: SourceConfig) -> None:
    packer = _packer(config)
    windows = [packer.next_window(0) for _ in range(20)]
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
        packer.next_window(0)
    resumed = _packer(config)
    resumed.load_state_dict(packer.state_dict())
    for _ in range(150):  # past the end of the source
        for ours, theirs in zip(packer.next_window(0), resumed.next_window(0), strict=True):
            assert (ours == theirs).all()


def test_ranks_share_a_stream_and_the_global_batch_does_not_depend_on_them(config: SourceConfig) -> None:
    wanted = list(islice(_loader(config, 12), 40))
    for world_size in (2, 3, 4):
        ranks = [islice(_loader(config, 12 // world_size, rank, world_size), 40) for rank in range(world_size)]
        for whole, *parts in zip(wanted, *ranks, strict=True):
            assert all(torch.equal(whole[key], torch.cat([part[key] for part in parts])) for key in whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [(4, 1), (2, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 4), (4, 2), (2, 2)))],
)
def test_ranks_that_continue_may_be_more_or_fewer(config: SourceConfig, before: int, after: int) -> None:
    wanted = list(islice(_loader(config, 8), 60))
    for place in (0, 1, 7, 30):
        states = []
        for rank in range(before):
            loader = _loader(config, 8 // before, rank, before)
            assert len(list(islice(loader, place))) == place
            states.append(loader.state_dict())
        state = json.loads(json.dumps(whole_loader_state(states)))
        for rank in range(after):
            loader = _loader(config, 8 // after, rank, after)
            loader.load_state_dict(state)
            own = slice(rank * 8 // after, (rank + 1) * 8 // after)
            for whole, part in zip(wanted[place:], islice(loader, 60 - place), strict=True):
                assert all(torch.equal(whole[key][own], part[key]) for key in whole)


def test_a_loader_that_nobody_has_waits_for_no_thread(config: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be collected in a thread that begins, under the lock that an ending one needs."""
    loader, joined, join = _loader(config, 2), [], threading.Thread.join

    def noted(thread: threading.Thread, timeout: float | None = None) -> None:
        joined.append(thread.name)
        join(thread, timeout)

    batches = iter(loader)
    next(batches)
    reader = loader._reader
    assert reader is not None
    monkeypatch.setattr(threading.Thread, "join", noted)
    collected = weakref.ref(loader)
    del loader, batches
    for _ in range(500):  # what it reads ahead still has it
        gc.collect()
        if collected() is None:
            break
        time.sleep(0.01)
    monkeypatch.undo()
    assert collected() is None
    assert not [name for name in joined if name.startswith("stream")]
    with pytest.raises(RuntimeError, match="after shutdown"):
        reader.submit(int)


def test_another_global_batch_goes_on_after_the_document_furthest_read(config: SourceConfig) -> None:
    loader = _loader(config, 2)
    assert len(list(islice(loader, 12))) == 12
    state = loader.state_dict()
    furthest = state["streams"]["0"]["furthest"]
    resumed = _loader(config, 3)
    with pytest.warns(UserWarning, match="has 3 sequences and had 2"):
        resumed.load_state_dict(state)
    first = next(iter(resumed))["input_ids"][0].tolist()
    documents = [*TEXTS[:50], "", *TEXTS[50:]]
    row_0 = [
        text
        for n, text in enumerate(documents)
        if n >= furthest["read"] and (n + furthest["passes"]) % 3 == 0 and text and not is_validation(text, 0.2)
    ]
    assert bytes(id for id in first if id < 256).decode().startswith(row_0[0][:40])


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
        return PackedLoader([_packer(config, 0, 2)], np.ones(1), 64, 2, tracked=True)

    threads, wanted = set(), loader()
    fill = StreamPacker.next_window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamPacker, "next_window", lambda *p: threads.add(threading.current_thread().name) or fill(*p))
        first = iter(wanted)
        batches = [next(first) for _ in range(8)]
    assert threads == {"stream_0"}
    for batch in batches[:3]:
        assert wanted.take(batch) is batch
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
        list(islice(_loader(source, 2), 100))
