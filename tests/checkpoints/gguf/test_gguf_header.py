"""The header of a GGUF file: nothing in it is believed before the file's size has been asked."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers
from gguf_files import write_gguf

from moebed.checkpoints import Checkpoint
from moebed.checkpoints.gguf import header
from moebed.checkpoints.gguf.header import read_header
from moebed.checkpoints.gguf.types import FILE_TYPES, TYPES
from moebed.errors import UserError

MUTATE = Path(__file__).with_name("open_mutated.py")
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "num_local_experts": 4,
         "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small Mixtral with a tokenizer, packed."""
    folder = tmp_path_factory.mktemp("whole")
    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "folder")
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"<{n}>" for n in range(40)],
              "tokenizer.ggml.scores": [float(-n) for n in range(40)]}  # fmt: skip
    return write_gguf(folder / "folder", folder / "whole.gguf", "Q8_0", metadata=tokens)


def test_types_are_those_of_the_gguf_package():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: (kind.name, kind.block, kind.num_bytes) for number, kind in TYPES.items()} == theirs
    called = {int(kind): re.sub("^(MOSTLY|ALL)_", "", kind.name) for kind in gguf.constants.LlamaFileType}
    called.pop(1024)  # not stated in the file
    assert called == FILE_TYPES


@pytest.mark.parametrize("number", [number for number, kind in TYPES.items() if kind.dtype is not None])
def test_every_type_that_is_read_can_be_unpacked(number):
    kind = TYPES[number]
    rows = np.zeros((3, 2 * kind.num_bytes), np.uint8)
    found = gguf.dequantize(rows, gguf.GGMLQuantizationType(number))
    assert found.shape == (3, 2 * kind.block)


def test_values_and_tensors_are_those_that_the_gguf_package_reads(whole):
    found, theirs = read_header(whole), gguf.GGUFReader(whole)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value = field.contents()
            if isinstance(value, list):
                assert found.array(name, text=isinstance(value[0], str)) == value
            elif isinstance(value, float):
                assert np.float32(found.values[name]) == np.float32(value)
            else:
                assert found.values[name] == value
    for tensor in theirs.tensors:
        info = found.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)


@pytest.mark.parametrize("width", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_whole_numbers_of_any_width_are_read(tmp_path, width):
    """Files differ in the width of one and the same key."""
    path = small(tmp_path, lambda writer: getattr(writer, f"add_{width}")("llama.block_count", 2))
    assert read_header(path).size("llama.block_count") == 2


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_tensors_begin_where_the_file_aligns_them(tmp_path, alignment):
    path = small(tmp_path, lambda writer: writer.add_custom_alignment(alignment))
    found, (theirs,) = read_header(path).tensors["token_embd.weight"], gguf.GGUFReader(path).tensors
    assert found.offset == theirs.data_offset
    assert found.offset % alignment == 0


def test_numbers_are_what_was_written_and_sizes_are_some(tmp_path):
    def write(writer):
        writer.add_float32("epsilon", 1e-5)
        writer.add_float32("base", float("inf"))
        writer.add_bool("yes", True)
        writer.add_uint32("none", 0)

    found = read_header(small(tmp_path, write))
    assert found.get("epsilon", float) == 1e-5
    assert found.get("yes", bool) is True
    for ask, words in (
        (lambda: found.get("base", float), "base is inf; it must be a number"),
        (lambda: found.get("yes", int), "yes is True; it must be a whole number"),
        (lambda: found.size("none"), "none is 0, which is no size of a model"),
    ):
        with pytest.raises(UserError, match=words):
            ask()


@pytest.mark.parametrize(
    ("limit", "most", "words"),
    [("_MOST_STRING_BYTES", 99, "a string of"), ("_LARGEST_HEADER", 2000, "beyond byte 2000")],
)
def test_a_header_larger_than_any_is_refused(whole, monkeypatch, limit, most, words):
    monkeypatch.setattr(header, limit, most)
    with pytest.raises(UserError, match=words):
        read_header(whole)


def small(folder, write):
    """A file of one tensor, and of what ``write`` has a writer of the gguf package add."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    write(writer)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return folder / "model.gguf"


def changed(path, target, place, form, *values):
    """The file with numbers written over at a place."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, *values)
    target.write_bytes(content)
    return target


def place_of(path, text):
    return path.read_bytes().index(text) + len(text)


@pytest.mark.parametrize(
    ("where", "form", "value", "words"),
    [
        (4, "<I", 1, "GGUF of version 1; versions 2 and 3 are read"),
        (4, ">I", 3, "big-endian"),
        (8, "<Q", 1 << 60, "it announces 1152921504606846976 tensors"),
        (16, "<Q", 1 << 60, "it announces 1152921504606846976 keys"),
        (8, "<Q", 100_000, "it announces 100000 tensors"),  # fewer than there may be, and more than have room
        (16, "<Q", 10_000, "it announces 10000 keys"),
        (24, "<Q", 1 << 60, "it holds a string of 1152921504606846976 bytes"),
        (b"general.architecture", "<I", 99, "it holds a value of type 99"),
        (b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0", "<Q", 1 << 60, "announces 1152921504606846976 strings"),
        (b"tokenizer.ggml.scores\x09\0\0\0\x06\0\0\0", "<Q", 1 << 62, "it goes on beyond byte"),
        (b"tokenizer.ggml.tokens\x09\0\0\0", "<I", 9, "it holds an array of type 9"),
        (b"blk.0.attn_q.weight", "<I", 77, "blk.0.attn_q.weight has 77 dimensions"),
        (b"blk.0.attn_q.weight\x02\0\0\0", "<Q", 0, "blk.0.attn_q.weight has shape [32, 0]"),
        (b"blk.0.attn_q.weight\x02\0\0\0", "<Q", 31, "no whole blocks of Q8_0"),
        (
            b"blk.0.attn_q.weight" + struct.pack("<IQQ", 2, 32, 32),
            "<I",
            77,
            "as ggml's type 77, which is not",
        ),
        (b"blk.0.attn_q.weight\x02\0\0\0", "<Q", 1 << 39, "is cut short: tensor blk.0.attn_q.weight"),
    ],
)
def test_what_cannot_be_is_one_line(whole, tmp_path, where, form, value, words):
    place = where if isinstance(where, int) else place_of(whole, where)
    path = changed(whole, tmp_path / "bad.gguf", place, form, value)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_inp.weight", "blk.0.attn_k.weight", "output_norm.weight"],
)
def test_a_missing_tensor_is_called_as_the_file_calls_it(whole, tmp_path, name):
    path, content = tmp_path / "missing.gguf", whole.read_bytes()
    path.write_bytes(content.replace(name.encode(), name.replace("weight", "wright").encode(), 1))
    with pytest.raises(UserError) as caught:
        Checkpoint.open(path)
    assert str(caught.value) == f"missing.gguf: tensor {name} is missing; its header asks for it"


def test_experts_of_a_tensor_each_are_as_many_as_the_router_has(whole, tmp_path):
    """Elsewhere the tensor of all of them says it."""
    folder, metadata = whole.parent / "folder", {"llama.expert_count": 5}
    path = write_gguf(folder, tmp_path / "m.gguf", each_expert=True, metadata=metadata)
    with pytest.raises(UserError, match="expert_count is 5 but a router has 4 rows; the file is damaged"):
        Checkpoint.open(path)


def test_tensors_over_each_other_are_refused(whole, tmp_path):
    found = read_header(whole)
    first, second = sorted(found.tensors.values(), key=lambda info: info.offset)[:2]
    start = first.offset
    after = place_of(whole, second.name.encode()) + 4 + 8 * len(second.shape) + 4
    path = changed(whole, tmp_path / "bad.gguf", after, "<Q", first.offset - start)
    with pytest.raises(UserError, match="lie over each other"):
        Checkpoint.open(path)


@pytest.mark.parametrize("cut", [0, 3, 12, 30, 200, 5000, -1])
def test_a_file_that_is_cut_is_said_to_be(whole, tmp_path, cut):
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"download it again") as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


def test_a_hundred_mutated_headers(whole, tmp_path):
    """Numbers of the header are replaced; each file is opened, or refused in one line, in little memory."""
    done = subprocess.run([sys.executable, MUTATE, whole, tmp_path, "100"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert not found["strange"]
    assert found["opened"] + found["refused"] == 100
    assert found["refused"] > 60
    assert found["grown"] < 60e6
