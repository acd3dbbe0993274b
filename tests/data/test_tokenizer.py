"""Byte lengths are exact for any text, decoding gives the text back, and training is deterministic."""

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moebed.data.corpus import embedded_documents
from moebed.data.tokenizer import (
    AutoTokenizer,
    BpeTokenizer,
    BytesTokenizer,
    Tokenizer,
    TokenizerConfig,
    _without_long_words,
    byte_lengths_of,
    load_tokenizer,
    train_bpe,
)
from moebed.errors import ConfigError, UserError

TEXT = list(embedded_documents("math", 30_000)) + ["Ünïcode – 漢字 🙂 text.\n\n  Twice: Ünïcode – 漢字 🙂 text."] * 5
BPE = train_bpe(TEXT, 400)
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=any_text)
@example(text="a<|endoftext|>b")
@example(text="🙂" * 3 + " \n\t漢字  ")
@settings(max_examples=150, deadline=None)
def test_bytes_are_exact_and_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    [(ids, lengths)] = tokenizer.encode_documents([text])
    assert lengths.sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert ids.max() < tokenizer.vocab_size
    # Not only the sum: each token's own bytes.
    assert len(ids) == len(lengths)
    assert lengths.min() >= 1


@pytest.fixture(scope="module", params=["byte_level", "normalized"])
def auto(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    """Tokenizers like published ones: one trims offsets and splits characters, one rewrites the text."""
    folder = tmp_path_factory.mktemp(request.param)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    alphabet: list[str] = []
    if request.param == "byte_level":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFKD(), tokenizers.normalizers.StripAccents(), tokenizers.normalizers.Strip()]
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(TEXT, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return AutoTokenizer(folder)


def test_auto_byte_lengths_sum_to_the_text(auto: AutoTokenizer) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab 漢🙂é\u0301ﬁ\n0</s>", k=rng.randint(1, 60))) for _ in range(300)]
    for text, (ids, lengths) in zip(texts, auto.encode_documents(texts), strict=True):
        assert len(ids) == len(lengths)
        assert lengths.sum() == (len(text.encode()) if len(ids) else 0)
        assert (lengths >= 0).all()
        assert auto.eos_id not in ids
    assert auto.bos_id is not None


def test_auto_survives_a_round_trip_through_a_folder(auto: AutoTokenizer, tmp_path: Path) -> None:
    auto.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, AutoTokenizer)
    assert (loaded.eos_id, loaded.bos_id, loaded.vocab_size) == (auto.eos_id, auto.bos_id, auto.vocab_size)
    assert loaded.encode("What is 7 + 15?") == auto.encode("What is 7 + 15?") != []
    assert loaded.fingerprint() == auto.fingerprint()


def test_characters_split_across_tokens_count_once() -> None:
    # Three tokens of one 4-byte character, then a trimmed space and a letter, then text that no token covers.
    lengths = byte_lengths_of("🙂 a!", [(0, 1), (0, 1), (0, 1), (2, 3)])
    assert lengths.tolist() == [4, 0, 0, 3]
    # Out of order, as after a normalizer that moves characters: no byte is counted twice or taken back.
    assert byte_lengths_of("abcd", [(0, 1), (2, 3), (1, 2), (3, 4)]).tolist() == [1, 2, 0, 1]
    assert byte_lengths_of("x" * 100_000, [(0, 100_000)]).tolist() == [100_000]
    assert byte_lengths_of("abc", []).tolist() == []


def test_bpe_training_is_deterministic_and_follows_the_text() -> None:
    again, other = train_bpe(list(TEXT), 400), train_bpe(TEXT[:20], 400)
    assert again.fingerprint() == BPE.fingerprint() != other.fingerprint()
    assert BPE.vocab_size == 400
    assert len(BPE.encode(TEXT[0])) < 0.7 * len(TEXT[0])


def test_saved_tokenizers_load_again(tmp_path: Path) -> None:
    for tokenizer in (BPE, BytesTokenizer()):
        folder = tmp_path / type(tokenizer).__name__
        tokenizer.save(folder)
        loaded = load_tokenizer(folder)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode("Solve 3*x = 9 for x.") == tokenizer.encode("Solve 3*x = 9 for x.")


def test_a_saved_bpe_opens_in_transformers(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("Add 12 and 3.", add_special_tokens=False) == BPE.encode("Add 12 and 3.")
    assert theirs.eos_token_id == BPE.eos_id


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"cannot load tokenizer .*nowhere"):
        AutoTokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").write_text('{"moebed_kind": "bpe"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="needs at least 257"):
        TokenizerConfig(vocab_size=256)
    with pytest.raises(ConfigError, match="needs a path"):
        TokenizerConfig("auto")


def test_bpe_token_bytes_agree_with_decoding() -> None:
    assert isinstance(BPE, BpeTokenizer)
    ids, lengths = BPE.encode_documents(["What is the tens digit of 8347?"])[0]
    assert lengths.tolist() == [len(BPE.decode([i])) for i in ids]
    assert lengths.dtype == ids.dtype == np.int64


@pytest.mark.timeout(60)
def test_one_long_word_does_not_hold_up_training() -> None:
    """Uncut, the time grows with the square of a word's length; ordinary text is not touched."""
    draw = random.Random(0)
    ordinary = [" ".join(f"w{draw.randrange(300)}" for _ in range(80)) for _ in range(60)]
    genome = "".join(draw.choices("acgt", k=60_000))
    cut = list(_without_long_words([*ordinary, genome, " " * 2000]))
    assert cut[:60] == ordinary
    assert "".join(cut[60:]) == genome + " " * 2000
    assert max(map(len, cut[60:])) == 512
    tokenizer = train_bpe([*ordinary, genome], 400)
    assert tokenizer.decode(tokenizer.encode(genome)) == genome
