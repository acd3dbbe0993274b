"""Streaming sources over ranks: each tokenizes what it trains on, and all together train on what one process would."""

import json
from itertools import chain

import numpy as np
import pytest
import yaml

from moebed.data.loader import PackedLoader
from moebed.data.sources import Source, SourceConfig
from moebed.data.streaming import StreamPacker
from moebed.data.tokenizer import BytesTokenizer
from tests.parallel.forked import call, run
from tests.parallel.parallel_runs import curves, fit, recipe

ROWS, LENGTH, BATCHES = 8, 64, 400
AHEAD = 16  # documents tokenized at once
DOCUMENTS = 4000


def _source(folder):
    rng = np.random.default_rng(0)
    path = folder / "documents.jsonl"
    texts = (f"{number} " + "word " * int(rng.integers(10, 50)) for number in range(DOCUMENTS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig("stream", kind="files", path=str(path), streaming=True)


class _Counting(BytesTokenizer):
    """Counts the tokens it makes, the end of each document among them."""

    made = 0

    def encode_documents(self, documents):
        encoded = super().encode_documents(documents)
        self.made += sum(len(ids) + 1 for ids, _ in encoded)
        return encoded


def _count(rank, world_size, source, out, place=None):
    tokenizer, read = _Counting(), Source.text_of
    parsed = [0]

    def text_of(source, record, *where):
        text = read(source, record, *where)
        parsed[0] += len(text.encode())
        return text

    Source.text_of = text_of
    batch_size = ROWS // world_size
    rows = range(rank * batch_size, (rank + 1) * batch_size)
    packer = StreamPacker(Source(source), tokenizer, LENGTH, 0.05, rows, ROWS)
    loader = PackedLoader([packer], np.ones(1), LENGTH, batch_size, rank=rank, world_size=world_size)
    if place is not None:
        loader.load_state_dict(json.loads(place.read_text()))
    batches = iter(loader)
    ids = [next(batches)["input_ids"].tolist() for _ in range(BATCHES)]
    state = loader.state_dict()
    batches.close()
    found = {"tokens": tokenizer.made, "parsed": parsed[0], "ids": ids, "state": state}
    (out / f"{rank}.json").write_text(json.dumps(found))


def _counted(folder, world_size, source, place=None):
    out = folder / f"{world_size}-{place is not None}"
    out.mkdir()
    call(_count, world_size, source, out, place)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(one["state"] == found[0]["state"] for one in found), "the state is that of all ranks"
    (out / "state.json").write_text(json.dumps(found[0]["state"]))
    batches = [list(chain(*parts)) for parts in zip(*(one["ids"] for one in found), strict=True)]
    return found, batches, out / "state.json"


def test_a_rank_tokenizes_and_parses_its_own_share(tmp_path):
    """What it trains on, and at most what lies in the rows that lag and in the batches that are read ahead."""
    source, wanted = _source(tmp_path), None
    print("\nranks, tokens trained on, tokenized and text parsed, by each")
    longest = 5 + 5 * 50
    for world_size in (1, 2, 4):
        found, batches, _ = _counted(tmp_path, world_size, source)
        rows = ROWS // world_size
        trained = rows * LENGTH * BATCHES
        # Documents are dealt in turn: a row lags by the deviation of the sum of its documents' lengths.
        documents = trained / rows / (5 * 30)
        lag = rows * 4 * 5 * 12 * documents**0.5
        print(world_size, trained, [(one["tokens"], one["parsed"]) for one in found])
        for one in found:
            most = trained + rows * LENGTH * 5 + AHEAD * longest + lag
            assert trained < one["tokens"] < most < 1.25 * trained
            assert one["parsed"] < most / 0.95 + longest * rows  # validation's documents are parsed to be known
        wanted = wanted or batches
        assert batches == wanted


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow), (2, 4)])
def test_ranks_that_talk_to_each_other_keep_the_places_of_all(tmp_path, before, after):
    source = _source(tmp_path)
    _, first, place = _counted(tmp_path, before, source)
    _, rest, _ = _counted(tmp_path, after, source, place)
    (tmp_path / "whole").mkdir()
    _, whole, place = _counted(tmp_path / "whole", 1, source)
    assert first == whole
    _, whole, _ = _counted(tmp_path / "whole", 1, source, place)
    assert rest == whole


def _recipe(folder, steps):
    path = recipe(folder, steps)
    content = yaml.safe_load(path.read_text())
    stream = {"name": "stream", "kind": "files", "path": _source(folder).path, "streaming": True}
    content["data"]["sources"] = [*content["data"]["sources"][:1], stream]
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("first", "second"), [("DDP-2", "1 process"), ("1 process", "EP-2"), ("FSDP2-2", "DDP-2")])
def test_a_streaming_run_is_the_same_in_every_layout_and_continued(tmp_path, first, second):
    path = _recipe(tmp_path, 20)
    run(*fit(path, tmp_path / "whole", "1 process"), tmp_path / "logs" / "whole")
    arguments, ranks = fit(path, tmp_path / "parts", first, "--trainer.max_steps", "10")
    run(arguments, ranks, tmp_path / "logs" / "first")
    arguments, ranks = fit(path, tmp_path / "parts", second, "--ckpt_path", "last")
    assert "continuing the run" in run(arguments, ranks, tmp_path / "logs" / "second")
    found, wanted = curves(tmp_path / "parts"), curves(tmp_path / "whole")
    for tag in ("train/loss", "val/bits_per_byte"):
        assert found[tag] == pytest.approx(wanted[tag], rel=1e-5), tag
