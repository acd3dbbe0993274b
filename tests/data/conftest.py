"""Small sources and a data module factory, all with a cache of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebed.data.datamodule import TextDataModule
from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import TokenizerConfig


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., TextDataModule]:
    """Makes a data module of two small domains; keyword arguments override its own."""

    def make(**overrides: Any) -> TextDataModule:
        arguments: dict[str, Any] = {
            "sources": [SourceConfig("math", max_bytes=60_000), stories(tmp_path)],
            "tokenizer": TokenizerConfig("bytes"),
            "sequence_length": 32,
            "batch_size": 4,
            "validation_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        }
        return TextDataModule(**arguments | overrides)

    return make


def stories(folder: Path, documents: int = 60, **options: Any) -> SourceConfig:
    """A JSON lines source of short numbered documents, each different from the others."""
    path = folder / "stories.jsonl"
    if not path.exists():
        texts = [f"Story {i}: " + f"once, {i * i} cats met {i} döner stands. " * (1 + i % 7) for i in range(documents)]
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return SourceConfig("stories", kind="files", path=str(path), **options)


@pytest.fixture
def streaming_stories(tmp_path: Path) -> SourceConfig:
    """The stories as a data set that is streamed."""
    pytest.importorskip("datasets")
    path = stories(tmp_path).path
    return SourceConfig("stream", kind="hub", path="json", data_files=path, streaming=True)
