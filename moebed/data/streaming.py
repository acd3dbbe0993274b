"""Sources too large to store: documents are tokenized as training needs them; the place in the stream is state."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from moebed.data.sources import Source, encodable
from moebed.data.store import is_validation
from moebed.data.tokenizer import Tokenizer
from moebed.errors import UserError

_DOCUMENTS_AT_ONCE = 16


class DocumentStream:
    """A source's documents over and over, from where it was left.

    A hub data set goes on at its own ``state_dict``; other kinds are read again up to the same document.

    Args:
        source: The source.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._dataset = source.load_dataset(streaming=True) if source.config.kind == "hub" else None
        self._passes = self._read = self._used = 0
        self._iterator: Iterator[str] | None = None

    def __iter__(self) -> Iterator[str]:
        """The stream itself."""
        return self

    def __next__(self) -> str:
        """Returns the next non-empty document; raises UserError if a whole pass has none."""
        while True:
            if self._iterator is None:
                self._iterator = self._open()
            text = next(self._iterator, None)
            if text is None:
                if self._used == 0:
                    raise UserError(f"data source {self._source.config.name!r} has no text to stream")
                self._passes, self._read, self._used, self._iterator = self._passes + 1, 0, 0, None
                if self._dataset is not None:
                    self._dataset = self._source.load_dataset(streaming=True)
                continue
            self._read += 1
            if text.strip():
                self._used += 1
                return encodable(text)

    def _open(self) -> Iterator[str]:
        if self._dataset is None:
            return islice(self._source.documents(), self._read, None)
        return self._source.texts_of(self._dataset)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place after the document last returned, as plain data."""
        dataset = None if self._dataset is None else copy.deepcopy(self._dataset.state_dict())
        return {"passes": self._passes, "read": self._read, "used": self._used, "dataset": dataset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place that ``state_dict`` returned."""
        self._passes, self._read, self._used = state["passes"], state["read"], state["used"]
        if self._dataset is not None:
            self._dataset = self._source.load_dataset(streaming=True)
            self._dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._iterator = None


class StreamPacker:
    """Windows of one streaming domain, in the order of its training documents.

    Args:
        source: The source.
        tokenizer: The tokenizer.
        sequence_length: Window stride (S); a window has S + 1 tokens.
        validation_fraction: Documents that :func:`is_validation` puts into the validation split are passed over.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, sequence_length: int, validation_fraction: float) -> None:
        self._stream = DocumentStream(source)
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._validation_fraction = validation_fraction
        opening = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        self._tokens = np.array([opening], dtype=np.int64)
        self._bytes = np.zeros(1, dtype=np.int64)

    def next_window(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next window's ids and byte lengths, both ``(S + 1,)`` int64."""
        size = self._sequence_length + 1
        while len(self._tokens) < size:
            self._fill()
        window = self._tokens[:size].copy(), self._bytes[:size].copy()
        # The last token of a window is the first, not predicted there, of the next.
        self._tokens, self._bytes = self._tokens[size - 1 :], self._bytes[size - 1 :]
        return window

    def _fill(self) -> None:
        texts = list(islice(self._stream, _DOCUMENTS_AT_ONCE))
        kept = [text for text in texts if not is_validation(text, self._validation_fraction)]
        tokens, lengths = [self._tokens], [self._bytes]
        for ids, sizes in self._tokenizer.encode_documents(kept):
            tokens += [ids, np.array([self._tokenizer.eos_id])]
            lengths += [sizes, np.zeros(1, dtype=np.int64)]
        self._tokens, self._bytes = np.concatenate(tokens), np.concatenate(lengths)

    def state_dict(self) -> dict[str, Any]:
        """Returns the stream's place and the tokens read but not yet used: plain data and tensors."""
        return {
            "stream": self._stream.state_dict(),
            "tokens": torch.from_numpy(self._tokens.astype(np.int32)),
            "bytes": torch.from_numpy(self._bytes.astype(np.int32)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken."""
        self._stream.load_state_dict(state["stream"])
        self._tokens = state["tokens"].numpy().astype(np.int64)
        self._bytes = state["bytes"].numpy().astype(np.int64)
