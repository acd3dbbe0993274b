"""Sources too large to store: documents are tokenized as training needs them; the place in the stream is state.

Every row of the global batch is dealt documents of its own: in the p-th pass over a source, document n is row
``(n + p) mod rows``'s. So a rank tokenizes what its own rows train on and nothing else, and what is trained on depends
on the number of rows alone, however many ranks they are spread over. Documents of other rows are passed over, unparsed
where the kind of file allows it.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, islice, repeat
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from moebed.data.sources import Source, encodable
from moebed.data.store import is_validation, with_end
from moebed.data.tokenizer import Tokenizer
from moebed.errors import UserError

_DOCUMENTS_AT_ONCE = 16
Place = tuple[int, int]  # passes over the source that are over, and documents read of the next


class Dealt(NamedTuple):
    """A document, the row it was dealt to and the place after it."""

    row: int
    place: Place
    text: str


class DocumentStream:
    """The training documents of some rows of the global batch, over and over, from where the stream was left.

    A hub data set goes on at its own ``state_dict``; other kinds are read again up to the same document.

    Args:
        source: The source.
        rows: The rows whose documents are wanted.
        num_rows: Rows of the global batch.
        validation_fraction: Documents that :func:`is_validation` puts into the validation split are passed over.
    """

    def __init__(
        self, source: Source, rows: range = range(1), num_rows: int = 1, validation_fraction: float = 0.0
    ) -> None:
        self._source, self._rows, self._num_rows = source, rows, num_rows
        self._validation_fraction = validation_fraction
        self._dataset = source.load_dataset(streaming=True) if source.config.kind == "hub" else None
        self._passes = self._read = self._passes_without = 0
        self._iterator: Iterator[str | None] | None = None

    @property
    def place(self) -> Place:
        """After the document last returned."""
        return self._passes, self._read

    def __iter__(self) -> Iterator[Dealt]:
        """The stream itself."""
        return self

    def __next__(self) -> Dealt:
        """Returns the next non-empty document; raises UserError if the rows have none however often it is read."""
        while True:
            if self._iterator is None:
                self._iterator = self._open()
            for text in self._iterator:
                self._read += 1
                if text is None or not text.strip():
                    continue
                text = encodable(text)
                if not is_validation(text, self._validation_fraction):
                    self._passes_without = 0
                    return Dealt((self._read - 1 + self._passes) % self._num_rows, self.place, text)
            # After as many passes as there are rows, each row was dealt every document.
            self._passes_without += 1
            if self._read == 0 or self._passes_without > self._num_rows:
                name = self._source.config.name
                raise UserError(
                    f"data source {name!r} has no text to stream: no document is for training; "
                    "choose another split, or a smaller data.validation_fraction"
                )
            self._passes, self._read, self._iterator = self._passes + 1, 0, None
            if self._dataset is not None:
                self._dataset = self._source.load_dataset(streaming=True)

    def _open(self) -> Iterator[str | None]:
        rows, num_rows, passes = self._rows, self._num_rows, self._passes
        wanted = ((n + passes) % num_rows in rows for n in count(self._read))
        if self._dataset is not None:
            return self._source.texts_of(self._dataset, wanted)
        return islice(self._source.texts(chain(repeat(False, self._read), wanted)), self._read, None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place, as plain data."""
        dataset = None if self._dataset is None else copy.deepcopy(self._dataset.state_dict())
        return {"passes": self._passes, "read": self._read, "dataset": dataset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place that ``state_dict`` returned, of whichever rows."""
        self._passes, self._read, self._passes_without = state["passes"], state["read"], 0
        if self._dataset is not None:
            self._dataset = self._source.load_dataset(streaming=True)
            self._dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._iterator = None


class _Row:
    """What one row was dealt and has not used, of which the first document may be used in part."""

    def __init__(self, first: Place, offset: int) -> None:
        self.first, self.offset = first, offset  # documents before this one, and so many of its tokens, are used
        self.size = 0
        self._documents: deque[tuple[Place, tuple[np.ndarray, ...]]] = deque()

    def add(self, place: Place, *columns: np.ndarray) -> None:
        """A document's tokens, and what is said of each of them, each (N,)."""
        self.size += len(columns[0]) - (self.offset if place == self.first else 0)
        self._documents.append((place, columns))

    def take(self, size: int) -> list[np.ndarray]:
        """The next tokens and what is said of them; all but the last are used."""
        found, left, start = [], size, self.offset
        for _, columns in self._documents:
            found.append([column[start : start + left] for column in columns])
            left -= len(found[-1][0])
            start = 0
            if not left:
                break
        self.offset, self.size = self.offset + size - 1, self.size - (size - 1)
        while self.offset >= len(self._documents[0][1][0]):
            self.offset -= len(self._documents.popleft()[1][0])
        self.first = self._documents[0][0]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]


class StreamPacker:
    """Windows of one streaming domain for this rank's rows, each row in the order of its training documents.

    Rows use what they are dealt at different speeds, so a rank holds tokens of the rows that lag: with documents of
    1,000 tokens on average (log-normal, sigma 1), windows of 1,024 and 8 rows, 50,000 tokens a row after 1,000 steps
    and 300,000 after 50,000, by simulation. A state is only the places; what was held is tokenized again.

    Args:
        source: The source.
        tokenizer: The tokenizer.
        sequence_length: Window stride (S); a window has S + 1 tokens.
        validation_fraction: Documents that :func:`is_validation` puts into the validation split are passed over.
        rows: This rank's rows of the global batch.
        num_rows: Rows of the global batch.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        sequence_length: int,
        validation_fraction: float,
        rows: range = range(1),
        num_rows: int = 1,
    ) -> None:
        self._stream = DocumentStream(source, rows, num_rows, validation_fraction)
        self._tokenizer, self._num_rows, self._sequence_length = tokenizer, num_rows, sequence_length
        self._has_domains = source.config.has_token_domains
        self._begin(self._stream.state_dict(), dict.fromkeys(rows, (0, 0, 0)))

    def _begin(self, state: dict[str, Any], rows: Mapping[int, tuple[int, int, int]]) -> None:
        """Begins at a stream's state, with each row at a document's place and tokens used of it."""
        self._states = deque([state])  # of the stream, from the latest before all that is held on
        self._rows = {row: _Row((passes, read), offset) for row, (passes, read, offset) in rows.items()}
        opening = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
        for row in self._rows.values():
            if row.first == (0, 0):  # before all documents: it lets every token of text be predicted
                none = np.zeros(1, dtype=np.int32)
                row.add((0, 0), np.array([opening], dtype=np.int32), none, *([none] if self._has_domains else []))

    def next_window(self, row: int) -> list[np.ndarray]:
        """Returns the next window of one of this rank's rows, ``(S + 1,)`` int32 each: its ids, their byte lengths, and
        the domains of tokens where the text tells them."""
        while self._rows[row].size < self._sequence_length + 1:
            self._fill()
        return self._rows[row].take(self._sequence_length + 1)

    def _fill(self) -> None:
        """Reads on: every row of this rank is given what it is dealt on the way."""
        read = list(islice(self._stream, _DOCUMENTS_AT_ONCE))
        # Where the stream began anew for the sake of one row, others have used what comes.
        kept = [document for document in read if document.place >= self._rows[document.row].first]
        encoded = self._tokenizer.encode_documents([document.text for document in kept])
        for document, (ids, sizes) in zip(kept, encoded, strict=True):
            columns = [np.append(ids, self._tokenizer.eos_id), np.append(sizes, 0)]
            if self._has_domains:
                columns.append(with_end(self._tokenizer.token_domains(document.text)))
            self._rows[document.row].add(document.place, *(column.astype(np.int32) for column in columns))
        self._states.append(self._stream.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Returns, as plain data, where the stream must begin for all that is held, and where each row is."""
        earliest = min(row.first for row in self._rows.values())
        while len(self._states) > 1 and _place(self._states[1]) < earliest:
            self._states.popleft()
        rows = {str(number): (*row.first, row.offset) for number, row in self._rows.items()}
        return {
            "stream": self._states[0],
            "furthest": self._states[-1],
            "num_rows": self._num_rows,
            "rows": rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken, on however many ranks, by :func:`whole_state`.

        With another number of rows there is nothing to continue: all rows begin after the document furthest read.
        """
        if state.get("num_rows") == self._num_rows:
            begin, rows = state["stream"], {row: state["rows"][str(row)] for row in self._rows}
        else:
            rank_zero_warn(
                f"the global batch has {self._num_rows} sequences and had {state.get('num_rows', 'another number')}: "
                "a streaming source goes on after the document furthest read"
            )
            begin = state.get("furthest", state["stream"])
            passes, read = _place(begin)
            rows = dict.fromkeys(self._rows, (passes, read + 1, 0))
        self._stream.load_state_dict(begin)
        self._begin(begin, rows)


def _place(state: Mapping[str, Any]) -> Place:
    return state["passes"], state["read"]


def whole_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the state of all rows, of which each rank's :meth:`StreamPacker.state_dict` has some.

    Args:
        states: Of every rank; ranks may have rows in common.
    """
    return {
        "stream": min((state["stream"] for state in states), key=_place),
        "furthest": max((state["furthest"] for state in states), key=_place),
        "num_rows": states[0]["num_rows"],
        "rows": {row: held for state in states for row, held in state["rows"].items()},
    }
