"""Safetensors headers that say what cannot be: one line each, in little memory."""

import copy
import json
import random
import struct
import tracemalloc

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moebed.checkpoints import Checkpoint
from moebed.checkpoints.files import open_safetensors
from moebed.errors import UserError

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "num_local_experts": 4,
         "num_experts_per_tok": 2}  # fmt: skip
HARD = (-1, 0, 1, 3, 2**31, 2**40, 2**63, 10**30, 1.5, True, None, "4", [], {}, [[1]], "F32")


def pieces(content):
    """Header and data of a file."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data, length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def mutated(content, generator):
    """A file with something of its header replaced: lengths, counts, offsets, types; or bytes of it."""
    header, data = pieces(content)
    kind = generator.randrange(8)
    name = generator.choice([key for key in header if key != "__metadata__"])
    if kind == 0:
        return joined(header, data, generator.choice([0, 1, 2**20, 2**32, 2**63, 2**64 - 1]))
    if kind == 1:
        header[name][generator.choice(["shape", "dtype", "data_offsets"])] = generator.choice(HARD)
    elif kind == 2:
        header[name]["shape"][generator.randrange(len(header[name]["shape"]))] = generator.choice(HARD)
    elif kind == 3:
        header[name]["data_offsets"][generator.randrange(2)] = generator.choice(HARD)
    elif kind == 4:  # where another one lies
        other = generator.choice([key for key in header if key not in ("__metadata__", name)])
        header[name] = copy.deepcopy(header[other])
    elif kind == 5:
        header[generator.choice([name, "one more"])] = generator.choice([*HARD, {"dtype": "F64"}])
    elif kind == 6:
        return joined(header, data[: generator.randrange(len(data))])
    else:
        text = bytearray(json.dumps(header).encode())
        for _ in range(4):
            text[generator.randrange(len(text))] = generator.randrange(256)
        return joined(bytes(text), data)
    return joined(header, data)


def test_a_hundred_mutated_files(tmp_path):
    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    path, generator = tmp_path / "model.safetensors", random.Random(3)
    content, refused, strange = path.read_bytes(), 0, []
    tracemalloc.start()
    for number in range(100):
        path.write_bytes(changed := mutated(content, generator))
        try:
            Checkpoint.open(tmp_path)
            if changed != content:
                strange.append((number, "opened"))
        except UserError as error:
            refused += 1
            if "\n" in str(error):
                strange.append((number, str(error)))
        except Exception as error:  # noqa: BLE001  that is what is looked for
            strange.append((number, repr(error)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print("refused", refused, "peak", peak)
    assert not [one for one in strange if one[1] != "opened"]
    assert refused > 80
    assert peak < 60e6


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[" * 100_000, "no whole safetensors header"),
        (b'{"a": ' * 100_000, "no whole safetensors header"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "no whole safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}, "no whole safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, "no whole safetensors header"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "no whole safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "no whole safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, "4 bytes, which is not F32"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**50]}}, "is cut short: tensor a"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4]}}, "4 bytes, which is not U8"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes, which is not F16"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "is cut short: tensor a"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, "bytes but its header describes"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(joined(header, bytes(4)))
    with pytest.raises(UserError, match=words) as caught:
        open_safetensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_tensors_over_each_other_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    header, data = pieces(path.read_bytes())
    header["b"]["data_offsets"] = [8, 24]
    path.write_bytes(joined(header, data[:24]))
    with pytest.raises(UserError, match="tensors a and b lie over each other"):
        open_safetensors(path)


def test_empty_tensors_lie_nowhere(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(0), "c": torch.ones(2)}, tmp_path / "x.safetensors")
    assert set(open_safetensors(tmp_path / "x.safetensors")) == {"a", "b", "c"}
