"""The tokenizer out of a GGUF file's metadata, against the one that the metadata were made from."""

import json

import pytest
import tokenizers
import transformers
from gguf_files import write_gguf
from tokenizers import models, pre_tokenizers, trainers

from moebed.checkpoints.companions import copy_tokenizer
from moebed.checkpoints.gguf.tokenizer import GgufTokenizer
from moebed.checkpoints.texts import CheckpointTokenizer
from moebed.errors import UserError

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2}  # fmt: skip
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces,\n\ttabs and 1234 digits; don't they're",
    "naïve café 漢字 🙂 x",
    "a",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def trained(pattern, size=400):
    """A byte-level BPE on a few sentences, split by a pattern."""
    backend = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "the fox and the dog, the naïve dog 12 1234 123456"] * 5, trainer)
    return backend


def metadata_of(backend, pre):
    found = json.loads(backend.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<|end|>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in found["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_bpe_gives_the_same_ids(folder, tmp_path, pre):
    """Its splits are those of transformers' own tokenizers of these names."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    backend = trained(GGUF_PRE_TOKENIZER_SPLITS.get(pre, gpt2))
    metadata = {**metadata_of(backend, pre), "tokenizer.ggml.add_bos_token": False}
    found = GgufTokenizer(write_gguf(folder, tmp_path / "model.gguf", metadata=metadata))
    for text in TEXTS:
        assert found.encode(text) == backend.encode(text).ids
        assert found.decode(found.encode(text)) == text
    assert found.encode("a<|end|>") == [*backend.encode("a").ids, 0]


def test_digits_of_smollm_stand_alone(folder, tmp_path):
    backend = trained(r"\p{N}+|\P{N}+")
    metadata = metadata_of(backend, "smollm")
    assert "12" in metadata["tokenizer.ggml.tokens"]
    found = GgufTokenizer(write_gguf(folder, tmp_path / "model.gguf", metadata=metadata))
    assert [found.decode([number]) for number in found.encode("1234")] == ["1", "2", "3", "4"]


def test_a_text_begins_as_the_file_says(folder, tmp_path):
    backend = trained(r"\s+|\S+")
    for asked, pre, begins in ((True, "gpt-2", True), (None, "gpt-2", False), (None, "llama-bpe", True)):
        metadata = {**metadata_of(backend, pre), "tokenizer.ggml.add_bos_token": asked}
        found = GgufTokenizer(write_gguf(folder, tmp_path / "model.gguf", metadata=metadata))
        assert (found.encode("a")[0] == 0) is begins


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "f", "o", "x", "▁t",
          "he", "▁the", "▁f", "ox", "▁fox", "th", "the"]  # fmt: skip


def pieces():
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [0.0 if kind != 1 else -float(number) for number, kind in enumerate(kinds)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_merges_the_highest_score_first_and_has_bytes_for_the_rest(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "model.gguf", metadata=pieces())
    found = CheckpointTokenizer(path)
    said = [PIECES[number] for number in found.encode("the fox é")]
    assert said == ["<s>", "▁the", "▁fox", "▁", "<0xC3>", "<0xA9>"]
    assert [PIECES[number] for number in found.encode_plain("the fox")] == ["▁the", "▁fox"]
    assert found.prefix_id == 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("the fox", "fox the the", "hex é"):
        assert found.encode(text) == theirs(text)["input_ids"]
    assert found.texts([PIECES.index("▁fox"), PIECES.index("x"), len(PIECES)]) == ("fox", "x", "")


def test_it_is_written_so_that_transformers_loads_it(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "model.gguf", metadata=pieces())
    (tmp_path / "out").mkdir()
    assert copy_tokenizer(path, tmp_path / "out") == ("auto", "")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("the fox é")["input_ids"] == GgufTokenizer(path).encode("the fox é")
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "has no tokenizer"),
        ({**pieces(), "tokenizer.ggml.model": "t5"}, "is of kind 't5'"),
        ({**pieces(), "tokenizer.ggml.scores": [0.0]}, "has no score for each token"),
        ({**pieces(), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd"}, "splits text as 'odd'"),
        ({**pieces(), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}, "has merges of tokens"),
        ({**pieces(), "tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be an array of strings"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_one_line(folder, tmp_path, metadata, words):
    path = write_gguf(folder, tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(UserError, match=words) as caught:
        CheckpointTokenizer(path)
    assert str(path) in str(caught.value)
    (tmp_path / "out").mkdir()
    kind, note = copy_tokenizer(path, tmp_path / "out")
    assert kind is None
    assert words in note
