"""Tokenizers behind one small class: bytes, symbols of planted text, byte-level BPE trained on the corpus, or any fast
Hugging Face tokenizer.

Each says exactly how many bytes of text every token accounts for, so that bits per byte compare across tokenizers.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from moebed.data.planted import code_points
from moebed.errors import ConfigError, UserError

Encoded = tuple[np.ndarray, np.ndarray]
_END_OF_TEXT = "<|endoftext|>"
_BYTES_FILE = "moebed_bytes_tokenizer.json"
_SYMBOLS_FILE = "moebed_symbols_tokenizer.json"
_RUN = re.compile(r"(\S{512}|\s{512})")


@dataclass
class TokenizerConfig:
    """Which tokenizer to use.

    Args:
        kind: bytes (one token a byte), symbols (one token a symbol, where all sources are planted), bpe (byte-level BPE
            trained on the training documents) or auto (a fast Hugging Face tokenizer).
        vocab_size: Ids of a bpe tokenizer, its 256 bytes and its end-of-text token included.
        path: Folder or hub name of an auto tokenizer.
        train_bytes: Bytes of training text a bpe tokenizer is trained on, the same from each domain.
    """

    kind: Literal["bytes", "symbols", "bpe", "auto"] = "bpe"
    vocab_size: int = 4096
    path: str | None = None
    train_bytes: int = 6_000_000

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be built."""
        if self.kind == "bpe" and self.vocab_size < 257:
            raise ConfigError(
                f"data.tokenizer.vocab_size is {self.vocab_size}; a byte-level BPE needs at least 257 ids"
            )
        if self.kind == "auto" and not self.path:
            raise ConfigError("data.tokenizer: kind auto needs a path, a folder with a tokenizer or a name on the hub")
        if self.train_bytes < 1:
            raise ConfigError(f"data.tokenizer.train_bytes is {self.train_bytes}; it must be at least 1")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: Every id is below this.
        bos_id: Id that opens a sequence, if the tokenizer has one.
        eos_id: Id that ends a document.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int

    @abstractmethod
    def encode_documents(self, documents: list[str]) -> list[Encoded]:
        """Encodes documents without special tokens, also where the text spells one.

        Args:
            documents: Texts.

        Returns:
            For each document, ids ``(N,)`` int64 and byte lengths ``(N,)`` int64: the bytes of UTF-8 text that each
            token accounts for. They sum to the document's, unless the tokenizer makes no token of it at all.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special tokens are left out."""

    def says(self, one: int) -> str:
        """Returns what an id says by itself, the end of a document included; nothing of one that is no token."""
        return _END_OF_TEXT if one == self.eos_id else self.decode([one]) if one < self.vocab_size else ""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder, which is made if need be, for :func:`load_tokenizer`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a digest of everything that decides how text is encoded."""

    def token_domains(self, text: str) -> np.ndarray:
        """Returns the domain of each token of a text ``(N,)`` int64, where its characters tell.

        Raises:
            ConfigError: They tell the tokenizer nothing.
        """
        raise ConfigError(
            "data.sources has planted text whose domains switch, and only a tokenizer of symbols can tell them; set "
            "data.tokenizer.kind to symbols"
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without special tokens."""
        return self.encode_documents([text])[0][0].tolist()


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 ends a document."""

    vocab_size = 257
    eos_id = 256

    def encode_documents(self, documents: list[str]) -> list[Encoded]:
        ids = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in documents]
        return [(x, np.ones_like(x)) for x in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _BYTES_FILE).write_text(
            json.dumps({"kind": "bytes", "vocab_size": self.vocab_size}), encoding="utf-8"
        )

    def fingerprint(self) -> str:
        return "bytes"


class SymbolsTokenizer(Tokenizer):
    """An id for each symbol of a planted language, and the last one ends a document.

    The characters of such text tell the domain of each symbol. Where domains share an alphabet their ids do not.

    Args:
        domains: Domains of the language (D).
        symbols: Symbols of each (A).
        shared_alphabet: Whether a symbol has the same id in every domain.
    """

    def __init__(self, domains: int, symbols: int, shared_alphabet: bool) -> None:
        self._settings = {"domains": domains, "symbols": symbols, "shared_alphabet": shared_alphabet}
        self._characters = code_points(domains * symbols)
        self._symbols = symbols
        self._distinct = symbols if shared_alphabet else len(self._characters)
        self.eos_id = self._distinct
        self.vocab_size = self._distinct + 1

    def _places(self, text: str) -> np.ndarray:
        """Of each character, which of the language's it is ``(N,)`` int64."""
        found = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64) - int(self._characters[0])
        if len(strange := np.flatnonzero((found < 0) | (found >= len(self._characters)))):
            characters = f"{chr(self._characters[0])} to {chr(self._characters[-1])}"
            raise UserError(
                f"the character {text[strange[0]]!r} is none of the planted language; its {len(self._characters)} are "
                f"{characters}"
            )
        return found

    def encode_documents(self, documents: list[str]) -> list[Encoded]:
        places = [self._places(text) for text in documents]
        size = len(chr(self._characters[0]).encode())  # of all characters
        return [(x % self._distinct, np.full_like(x, size)) for x in places]

    def token_domains(self, text: str) -> np.ndarray:
        """Returns the planted domain of each token of a text ``(N,)`` int64."""
        return self._places(text) // self._symbols

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(self._characters[i]) for i in ids if i < self._distinct)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _SYMBOLS_FILE).write_text(json.dumps(self._settings), encoding="utf-8")

    def fingerprint(self) -> str:
        return f"symbols {sorted(self._settings.items())}"


class BpeTokenizer(Tokenizer):
    """Byte-level BPE; every byte is in its alphabet, so any text can be encoded and comes back unchanged.

    Args:
        backend: A ``tokenizers.Tokenizer`` made by :func:`train_bpe`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        backend.encode_special_tokens = True  # a text that spells the end-of-text token is text
        self.vocab_size = backend.get_vocab_size()
        vocabulary = backend.get_vocab()
        self.eos_id = vocabulary[_END_OF_TEXT]
        # In the byte-level alphabet one character is one byte, so a token's name tells its bytes exactly.
        self._token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in vocabulary.items():
            self._token_bytes[index] = len(token)
        self._token_bytes[self.eos_id] = 0

    def encode_documents(self, documents: list[str]) -> list[Encoded]:
        encodings = self._backend.encode_batch_fast(documents, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return [(x, self._token_bytes[x]) for x in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._backend.save(str(Path(folder) / "tokenizer.json"))
        # With this beside it, transformers' AutoTokenizer opens the folder too.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT}
        (Path(folder) / "tokenizer_config.json").write_text(
            json.dumps(config | {"moebed_kind": "bpe"}, indent=2), encoding="utf-8"
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()


class AutoTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer; no code that comes with it is run.

    Args:
        path: Folder or hub name.

    Raises:
        UserError: If it cannot be loaded, is not a fast one or has no end-of-sequence token.
    """

    def __init__(self, path: str | Path) -> None:
        import transformers  # heavy, and needed by this kind alone

        try:
            loaded: Any = transformers.AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False)
        except Exception as error:  # network, hub, file format: one cause, said in one line
            cause = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot load tokenizer {path} ({type(error).__name__}: {cause}); "
                "give the folder that its tokenizer.json lies in"
            ) from error
        if not loaded.is_fast:
            raise UserError(
                f"tokenizer {path} has no fast version (tokenizer.json), which exact bits per byte need; "
                "choose one that has, or kind bpe"
            )
        if loaded.eos_token_id is None:
            raise UserError(
                f"tokenizer {path} has no end-of-sequence token, which ends each document; "
                "choose one that has, or kind bpe"
            )
        self._loaded = loaded
        self._backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id = loaded.bos_token_id
        self.eos_id = loaded.eos_token_id
        self.vocab_size = max(loaded.get_vocab().values(), default=-1) + 1

    def encode_documents(self, documents: list[str]) -> list[Encoded]:
        encodings = self._backend.encode_batch(documents, add_special_tokens=False)
        return [
            (np.array(e.ids, dtype=np.int64), byte_lengths_of(text, e.offsets))
            for text, e in zip(documents, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        self._loaded.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        special = f"{self.bos_id} {self.eos_id} "
        return hashlib.sha256((special + self._backend.to_str()).encode()).hexdigest()


def byte_lengths_of(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Turns character offsets into bytes per token.

    Each token accounts for the text from the furthest end so far to its own end: what a tokenizer trims between tokens
    belongs to the token after it, and of the tokens that share a character the first has all its bytes. What is left at
    the end belongs to the last token.

    Args:
        text: The document.
        offsets: For each token, its ``(start, end)`` in characters.

    Returns:
        Byte lengths ``(N,)`` int64, summing to the document's UTF-8 bytes if there is a token.
    """
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.maximum.accumulate(np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
    ends[-1] = len(text)
    return np.diff(bytes_before[ends], prepend=0)


def train_bpe(documents: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Trains a byte-level BPE tokenizer; the same documents in the same order give the same tokenizer.

    Args:
        documents: Training text.
        vocab_size: Ids wanted; a small corpus may give fewer.

    Returns:
        The tokenizer.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_without_long_words(documents), trainer)
    return BpeTokenizer(backend)


def _without_long_words(documents: Iterable[str]) -> Iterator[str]:
    """Cuts runs of letters or of white space: the time of training grows with the square of the longest word."""
    for text in documents:
        yield from _RUN.split(text) if _RUN.search(text) else (text,)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Opens a tokenizer that :meth:`Tokenizer.save` wrote, or any folder with a fast Hugging Face tokenizer.

    Raises:
        UserError: If there is none.
    """
    folder = Path(folder)
    if (folder / _BYTES_FILE).is_file():
        return BytesTokenizer()
    if (settings := folder / _SYMBOLS_FILE).is_file():
        try:
            return SymbolsTokenizer(**json.loads(settings.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"cannot read the tokenizer {settings}: {' '.join(str(error).split())}; get the folder again"
            ) from error
    config = folder / "tokenizer_config.json"
    try:
        ours = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("moebed_kind") == "bpe"
        if ours:
            return BpeTokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"cannot read the tokenizer in {folder}: {' '.join(str(error).split())[:300]}; get the folder again"
        ) from error
    if not (folder / "tokenizer.json").is_file() and not config.is_file():
        raise UserError(f"no tokenizer in {folder}; put there one of tokenizer.json, {_BYTES_FILE} or {_SYMBOLS_FILE}")
    return AutoTokenizer(folder)
