"""Documents of text files and records of JSON files, a piece at a time: a file may be larger than memory."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TextIO

_MIN_DOCUMENT = 2048  # characters
_PIECE = 1 << 20  # characters
_BLANK = " \t\r\n"
_CUT_SHORT = 16  # characters; what may be wrong with a value at the end of a piece


def text_documents(opened: Callable[[], AbstractContextManager[TextIO]], separator: str | None) -> Iterator[str]:
    """Yields a text file's documents; joined, with the separator between them if there is one, they are the file.

    Args:
        opened: Opens the file, which is read twice where it has no blank line, with ``newline="\\n"``.
        separator: What stands between documents; if None, the file is cut after blank lines, or after any line if it
            has no blank one, into documents of at least 2 kB.
    """
    if separator is not None:
        with opened() as file:
            yield from _split(file, separator)
        return
    with opened() as file:
        blank_lines = any(number and line.endswith("\n") and not line.strip(_BLANK) for number, line in enumerate(file))
    document: list[str] = []
    size, after_blank = 0, False
    with opened() as file:
        for line in file:
            blank = not line.strip(_BLANK)
            if size >= _MIN_DOCUMENT and (not blank_lines or (after_blank and not blank)):
                yield "".join(document)
                document, size = [], 0
            document.append(line)
            size += len(line)
            after_blank = blank
    yield "".join(document)


def _split(file: TextIO, separator: str) -> Iterator[str]:
    rest = ""
    while piece := file.read(max(_PIECE, len(rest))):
        *whole, rest = (rest + piece).split(separator)
        yield from whole
    yield rest


def json_records(file: TextIO) -> Iterator[Any]:
    """Yields the elements of an array, or the values that stand one after another, of which JSON lines are an example.

    Raises:
        ValueError: The file is no JSON; says at which character.
    """
    values = _Values(file)
    if not values.take("["):
        while not values.at_end():
            yield values.next()
        return
    if not values.take("]"):
        yield values.next()
        while values.take(","):
            yield values.next()
        if not values.take("]"):
            raise ValueError(f"character {values.position}: the array goes on with neither ',' nor ']'")
    if not values.at_end():
        raise ValueError(f"character {values.position}: there is more after the end of the array")


class _Values:
    """JSON values of a file, of which no more is held than the value that is read and one piece."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._decoder = file, json.JSONDecoder()
        self._text, self._at, self._before = "", 0, 0

    @property
    def position(self) -> int:
        return self._before + self._at

    def at_end(self) -> bool:
        """Whether nothing but white space is left, which is passed over."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return False
            if not self._read():
                return True

    def take(self, mark: str) -> bool:
        """Pass over a mark if it comes next."""
        found = not self.at_end() and self._text[self._at] == mark
        self._at += found
        return found

    def next(self) -> Any:
        if self.at_end():
            raise ValueError(f"character {self.position}: the file ends where a value should be")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text.rstrip()) - _CUT_SHORT
                if not (cut and self._read()):
                    raise ValueError(f"character {self._before + error.pos}: {error.msg}") from None
                continue
            # A number may go on in the next piece, and so may its "e+".
            if end + 2 < len(self._text) or not self._read():
                self._at = end
                return value

    def _read(self) -> bool:
        """Reads on; False at the end of the file. Pieces grow with what is held, for the sake of long values."""
        piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        if piece:
            self._before += self._at
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
