"""Tokens of one domain on disk: split by document, tokenized once, memory-mapped.

A domain's folder holds, for each split ``S`` of train and validation:

- ``S.tokens.bin``: ids, uint16 or uint32: an opening BOS (or EOS), then every document followed by EOS;
- ``S.bytes.bin``: bytes of text that each token accounts for, uint16 or uint32; special tokens have none;
- ``S.domains.bin``: where the text says the domain of each token, that domain, uint16; an EOS has its document's last;
- ``S.documents.npy``: position of each document's first token, int64;

and ``validation.txt``, the validation documents' text, byte for byte what those tokens account for, and ``index.json``.
"""

import gzip
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moebed.data.sources import Source
from moebed.data.tokenizer import Tokenizer
from moebed.errors import UserError
from moebed.machine.cache import find_or_build, fingerprint
from moebed.machine.provenance import moebed_version
from moebed.machine.units import human

_BATCH_BYTES = 1 << 20
_INDEX = "index.json"


def is_validation(document: str, validation_fraction: float) -> bool:
    """Says which split a document is in, by a hash of its text alone: equal documents are always on one side."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


@dataclass(frozen=True)
class TokenStream:
    """One split of one domain.

    Attributes:
        tokens: Ids ``(N,)``, memory-mapped.
        token_bytes: Bytes of text of each token ``(N,)``, memory-mapped.
        document_starts: Position of each document's first token ``(D,)``.
        token_domains: Domain of each token ``(N,)``, memory-mapped, where the text says it.
    """

    tokens: np.ndarray
    token_bytes: np.ndarray
    document_starts: np.ndarray
    token_domains: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of tokens, the opening one included."""
        return len(self.tokens)

    def num_windows(self, sequence_length: int, maximum: int | None = None) -> int:
        """Windows it takes to predict every token but the first, or the first ``maximum`` of them."""
        needed = -(-(len(self) - 1) // sequence_length)
        return needed if maximum is None else min(needed, maximum)


class DomainSummary(NamedTuple):
    """What a domain holds; training numbers are None where it is streaming."""

    domain: str
    documents: int | None
    train_tokens: int | None
    validation_tokens: int
    train_bytes: int | None
    validation_bytes: int
    bytes_per_token: float


class DomainStore:
    """A finished domain folder, opened.

    Args:
        name: The domain.
        folder: What :func:`build_domain` returned.

    Raises:
        UserError: If the folder is damaged.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        try:
            self.index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.validation = self._open("validation")
            self.train = self._open("train") if "train" in self.index["splits"] else None
        except (OSError, ValueError, KeyError) as error:
            cause = " ".join(str(error).split())
            raise UserError(f"the cached tokens in {folder} are damaged ({cause}); delete that folder") from error

    def _open(self, split: str) -> TokenStream:
        entry = self.index["splits"][split]
        tokens = np.memmap(self.folder / f"{split}.tokens.bin", dtype=entry["token_dtype"], mode="r")
        token_bytes = np.memmap(self.folder / f"{split}.bytes.bin", dtype=entry["bytes_dtype"], mode="r")
        if not len(tokens) == len(token_bytes) == entry["tokens"]:
            raise ValueError(f"{split} has {len(tokens)} tokens where its index says {entry['tokens']}")
        path = self.folder / f"{split}.domains.bin"
        token_domains = np.memmap(path, dtype=np.uint16, mode="r") if entry.get("has_domains") else None
        return TokenStream(tokens, token_bytes, np.load(self.folder / f"{split}.documents.npy"), token_domains)

    def validation_text(self, sequence_length: int, max_windows: int | None = None) -> bytes:
        """Returns the UTF-8 text that the validation windows, or only the first ``max_windows``, predict."""
        stream = self.validation
        end = 1 + stream.num_windows(sequence_length, max_windows) * sequence_length
        size = int(stream.token_bytes[:end].sum(dtype=np.int64))
        with (self.folder / "validation.txt").open("rb") as file:
            return file.read(size)

    def summary(self) -> DomainSummary:
        """Returns its documents, tokens and bytes in each split, and bytes per token."""
        train, validation = self.index["splits"].get("train"), self.index["splits"]["validation"]
        both = [split for split in (train, validation) if split]
        ratio = sum(split["bytes"] for split in both) / sum(split["tokens"] for split in both)
        documents = train["documents"] + validation["documents"] if train else None
        tokens, size = (train["tokens"], train["bytes"]) if train else (None, None)
        return DomainSummary(self.name, documents, tokens, validation["tokens"], size, validation["bytes"], ratio)


def gzip_size(text: bytes) -> int:
    """Returns the bytes that ``gzip -9`` makes of a text."""
    return len(gzip.compress(text, compresslevel=9, mtime=0))


def build_domain(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    validation_fraction: float,
    streaming_validation_tokens: int,
) -> DomainStore:
    """Finds a domain's tokens in the cache, or makes them.

    Args:
        source: The domain's text. Of a streaming source only validation documents are stored.
        tokenizer: The tokenizer.
        cache: The cache folder.
        validation_fraction: Chance of a document to be in the validation split.
        streaming_validation_tokens: Tokens after which a streaming source's validation split is complete.

    Returns:
        The store.

    Raises:
        UserError: If the source has no text, cannot be read, or the cache cannot be written.
    """
    config = source.config
    identity = source.identity() | {"tokenizer": tokenizer.fingerprint(), "validation_fraction": validation_fraction}
    if config.streaming:
        identity["validation_tokens"] = streaming_validation_tokens

    def build(folder: Path) -> None:
        splits = ("validation",) if config.streaming else ("train", "validation")
        writers = {split: _SplitWriter(folder, split, tokenizer, config.has_token_domains) for split in splits}
        for batch in _batches(_reported(config.name, source.stored_documents())):
            for split, writer in writers.items():
                writer.append(
                    [text for text in batch if is_validation(text, validation_fraction) == (split == "validation")]
                )
            if config.streaming and writers["validation"].tokens > streaming_validation_tokens:
                break
        if not any(writer.documents for writer in writers.values()):
            raise UserError(
                f"data source {config.name!r} has no text: every document is empty, or there is none; "
                "choose another file or text_field"
            )
        made_by = {"moebed": moebed_version(), "data": [source.content()]}
        index = {
            "identity": identity,
            "made_by": made_by,
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    return DomainStore(config.name, find_or_build(cache, f"{config.name}-{fingerprint(identity)}", build))


class _SplitWriter:
    """Appends encoded documents to one split's files."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, has_domains: bool = False) -> None:
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._token_dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._bytes_dtype: np.dtype = np.dtype(np.uint16)
        self._tokens_file = (folder / f"{split}.tokens.bin").open("wb")
        self._bytes_file = (folder / f"{split}.bytes.bin").open("wb")
        self._text_file = (folder / "validation.txt").open("wb") if split == "validation" else None
        self._domains_file = (folder / f"{split}.domains.bin").open("wb") if has_domains else None
        self._starts: list[int] = []
        self.tokens = self.bytes = 0
        # The opening token lets every token of text be predicted: no byte of the split is left out.
        opening = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        self._write(np.array([opening]), np.zeros(1, dtype=np.int64))
        self._write_domains(np.zeros(1))

    @property
    def documents(self) -> int:
        return len(self._starts)

    def append(self, documents: list[str]) -> None:
        end_id, end_bytes = np.array([self._tokenizer.eos_id]), np.zeros(1, dtype=np.int64)
        for text, (ids, lengths) in zip(documents, self._tokenizer.encode_documents(documents), strict=True):
            if len(ids) == 0:
                continue  # a tokenizer may make nothing of a text, and then nothing predicts its bytes
            self._starts.append(self.tokens)
            self._write(np.concatenate([ids, end_id]), np.concatenate([lengths, end_bytes]))
            if self._domains_file is not None:
                self._write_domains(with_end(self._tokenizer.token_domains(text)))
            if self._text_file is not None:
                self._text_file.write(text.encode())

    def _write_domains(self, domains: np.ndarray) -> None:
        if self._domains_file is not None:
            self._domains_file.write(domains.astype(np.uint16).tobytes())

    def _write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        if lengths.max(initial=0) > np.iinfo(self._bytes_dtype).max:
            self._widen()
        self._tokens_file.write(ids.astype(self._token_dtype).tobytes())
        self._bytes_file.write(lengths.astype(self._bytes_dtype).tobytes())
        self.tokens += len(ids)
        self.bytes += int(lengths.sum())

    def _widen(self) -> None:
        """Rewrites the byte lengths in 32 bits: a token may stand for more than 64 kB, such as one unknown word."""
        self._bytes_file.close()
        path = self._folder / f"{self._split}.bytes.bin"
        written = np.fromfile(path, dtype=self._bytes_dtype)
        self._bytes_dtype = np.dtype(np.uint32)
        self._bytes_file = path.open("wb")
        self._bytes_file.write(written.astype(self._bytes_dtype).tobytes())

    def finish(self) -> dict[str, Any]:
        for file in (self._tokens_file, self._bytes_file, self._text_file, self._domains_file):
            if file is not None:
                file.close()
        np.save(self._folder / f"{self._split}.documents.npy", np.array(self._starts, dtype=np.int64))
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "token_dtype": self._token_dtype.name,
            "bytes_dtype": self._bytes_dtype.name,
            **({} if self._domains_file is None else {"has_domains": True}),
        }


def with_end(domains: np.ndarray) -> np.ndarray:
    """Domains of a document's tokens ``(N,)``, and of the EOS that ends it: ``(N + 1,)``."""
    return np.append(domains, domains[-1:])


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text.encode())
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reported(name: str, documents: Iterable[str]) -> Iterator[str]:
    """Passes documents on and says on stderr how far it is: now and then, and at the end."""
    started = shown = time.monotonic()
    size = count = 0
    for text in documents:
        yield text
        count += 1
        size += len(text.encode())
        # A terminal shows a line that changes; a log gets a line rarely.
        if (now := time.monotonic()) - shown > (0.5 if sys.stderr.isatty() else 15):
            shown = now
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"tokenizing {name}: {human(size, 'B')}, {now - started:.0f} s", end=end, file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    print(f"tokenized {name}: {count} documents, {human(size, 'B')} in {seconds:.1f} s", file=sys.stderr, flush=True)
