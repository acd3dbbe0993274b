"""What a rank pays for a streamed document of its own and for one of another rank's, in MB of text a second.

python tests/data/measure_streaming.py
"""

import json
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from statistics import median

from moebed.data.corpus import embedded_documents
from moebed.data.sources import Source, SourceConfig
from moebed.data.tokenizer import train_bpe


def rate(size: int, work: Callable[[], object]) -> float:
    """MB a second, the median of five."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return size / median(seconds) / 1e6


if __name__ == "__main__":
    documents = list(embedded_documents("prose"))
    texts = [text[start : start + 2000] for text in documents for start in range(0, len(text), 2000)] * 4
    size = sum(len(text.encode()) for text in texts)
    tokenizer = train_bpe(documents, 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        source = Source(SourceConfig("texts", kind="files", path=str(path), streaming=True))
        print(f"passed over: {rate(size, lambda: sum(1 for _ in source.texts(repeat(False)))):.0f} MB/s")
        print(f"read: {rate(size, lambda: sum(1 for _ in source.texts())):.0f} MB/s")
        print(f"tokenized: {rate(size, lambda: tokenizer.encode_documents(texts)):.1f} MB/s")
