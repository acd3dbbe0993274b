"""A GGUF file of Mixtral 8x7B's size in Q4_K, 26 GB, of which only some layers take room on disk.

python tests/checkpoints/gguf/large_gguf.py FILE LAYER [LAYER ...]
"""

import os
import sys
from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np
from gguf_files import to_q4_k

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 4096, 14336, 8, 32, 32000
KEYS = 1024  # rows of keys, and of values
Q4_K = gguf.GGMLQuantizationType.Q4_K
F32 = gguf.GGMLQuantizationType.F32


def shapes():
    """(name, shape, type) of every tensor, as llama.cpp's converter orders them."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN), Q4_K
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        yield f"{block}attn_norm.weight", (HIDDEN,), F32
        yield f"{block}ffn_norm.weight", (HIDDEN,), F32
        yield f"{block}ffn_gate_inp.weight", (EXPERTS, HIDDEN), F32
        for name, rows in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("output", HIDDEN)):
            yield f"{block}attn_{name}.weight", (rows, HIDDEN), Q4_K
        for name, size in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            yield f"{block}ffn_{name}_exps.weight", (EXPERTS, *size), Q4_K
    yield "output_norm.weight", (HIDDEN,), F32
    yield "output.weight", (VOCABULARY, HIDDEN), Q4_K


def write_large_gguf(path: Path, filled: Collection[int]) -> int:
    """Write it; layers that are not filled are zeros, and holes in the file.

    Returns:
        Its size in bytes, holes included.
    """
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": LAYERS, "context_length": 32768, "embedding_length": HIDDEN, "feed_forward_length": WIDTH,
             "attention.head_count": 32, "attention.head_count_kv": 8, "expert_count": EXPERTS, "expert_used_count": 2,
             "vocab_size": VOCABULARY}  # fmt: skip
    for name, value in sizes.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e6)
    writer.add_uint32("general.file_type", 15)
    places, offset = {}, 0
    for name, shape, kind in shapes():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
        places[name] = offset, count, kind
        offset += -(-count // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    os.truncate(path, start + offset)
    generator = np.random.default_rng(0)
    pool = to_q4_k(generator.standard_normal((1 << 14, 256), dtype=np.float32) * 0.02).reshape(-1, 144)
    with path.open("r+b") as file:
        for name, (place, count, kind) in places.items():
            if name.startswith("blk.") and int(name.split(".")[1]) in filled:
                file.seek(start + place)
                if kind == F32:
                    file.write((0.02 * generator.standard_normal(count // 4)).astype(np.float32).tobytes())
                while kind == Q4_K and count:  # no two stretches alike
                    blocks = np.roll(pool, int(generator.integers(len(pool))), axis=0)[: count // 144]
                    file.write(blocks.tobytes())
                    count -= blocks.nbytes
    return start + offset


if __name__ == "__main__":
    print(write_large_gguf(Path(sys.argv[1]), [int(layer) for layer in sys.argv[2:]]))
