"""How fast weights are unpacked, beside reading them.

python tests/checkpoints/gguf/measure_unpacking.py [TYPE ...]

One expert's matrix of Mixtral's width, from the page cache, in one thread: seconds to read its bytes,
and to read and unpack them, in alternation; medians. A line a type: millions of numbers a second, and GB of the file.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_files import packed

from moebed.checkpoints.files import RawFile
from moebed.checkpoints.gguf.entries import entry_of
from moebed.checkpoints.gguf.header import read_header

SHAPE = (2048, 4096)
ROUNDS = 7


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(kind, folder):
    """(seconds to read, seconds to read and unpack, bytes)."""
    writer = gguf.GGUFWriter(folder / "one.gguf", "llama")
    values, raw = packed(np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32), kind)
    writer.add_tensor("one", values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = read_header(folder / "one.gguf").tensors["one"]
    file = RawFile(info.path)
    entry, memory = entry_of(file, info, SHAPE), bytearray(info.num_bytes)
    out = torch.empty(SHAPE, dtype=entry.dtype)
    both = lambda: file.read(info.offset, memoryview(memory)), lambda: entry.read(0, out)
    found = [[seconds(one) for one in both] for _ in range(ROUNDS + 1)][1:]
    return *(statistics.median(times) for times in zip(*found, strict=True)), info.num_bytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in sys.argv[1:] or ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "MXFP4"]:
            plain, whole, count = measure(kind, Path(scratch))
            numbers = SHAPE[0] * SHAPE[1] / 1e6
            print(
                f"{kind:6} {numbers / whole:6.0f} M numbers/s, {count / whole / 1e9:.2f} GB/s of the file; reading "
                f"alone {count / plain / 1e9:.2f} GB/s, {whole / plain:.1f} times less"
            )
