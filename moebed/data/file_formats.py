"""Documents of one local file, by the format that its name ends in."""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from moebed.data.pieces import json_records, text_documents
from moebed.errors import UserError

SUFFIXES = (".txt", ".csv", ".jsonl", ".json", ".parquet")


def suffix(path: Path) -> str:
    """Says how a file's name ends, but for ``.gz``; in small letters."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def require_known(path: Path, where: str) -> None:
    """Raise UserError for a file of text whose name ends as no known kind does; ``where`` says whose it is."""
    if suffix(path) not in SUFFIXES:
        raise UserError(f"{where}: cannot read {path}; known kinds: {', '.join(SUFFIXES)}")


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """What a person can do about a text file in another encoding."""
    encoding = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return (
        f"cannot read {path}: it is not UTF-8 (byte {error.object[error.start]:#04x} at place {error.start} of what "
        f"was read); convert it, such as by iconv -f {encoding} -t utf-8"
    )


def chosen(texts: Iterator[str], wanted: Iterator[bool]) -> Iterator[str | None]:
    """Yields each text that is wanted, and None instead of one that is not."""
    return (text if next(wanted) else None for text in texts)


def file_documents(
    path: Path, text_of: Callable[[Any], str], text_field: str, separator: str | None, wanted: Iterator[bool]
) -> Iterator[str | None]:
    """Yields the documents of a file of one of ``SUFFIXES``; all but .parquet may be compressed, and end in .gz.

    Args:
        path: The file.
        text_of: Text of a record; raises UserError, naming the fields there are, for one without the text field.
        text_field: Column or key of the text, where documents are records.
        separator: As in :func:`text_documents`.
        wanted: For each document in turn, whether it is; instead of one that is not, None is yielded, and it is not
            parsed where it need not be.

    Raises:
        OSError, EOFError, UnicodeDecodeError, csv.Error, ValueError: The file is damaged.
    """
    kind = suffix(path)
    if kind == ".parquet":
        yield from _parquet_documents(path, text_of, text_field, wanted)
        return
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open

    def opened() -> Any:
        # The csv module asks for newline=""; text and JSON keep their line ends too.
        newline = "" if kind == ".csv" else "\n"
        return opener(path, "rt", encoding="utf-8-sig", newline=newline)

    if kind == ".txt":
        yield from chosen(text_documents(opened, separator), wanted)
        return
    with opened() as file:
        if kind == ".csv":
            yield from chosen(_csv_documents(file, text_of, text_field), wanted)
        elif kind == ".jsonl":
            yield from _json_lines(file, text_of, wanted)
        else:
            yield from (text_of(record) if next(wanted) else None for record in json_records(file))


def _json_lines(file: Any, text_of: Callable[[Any], str], wanted: Iterator[bool]) -> Iterator[str | None]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if not next(wanted):
            yield None
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from error
        yield text_of(record)


def _csv_documents(file: Any, text_of: Callable[[Any], str], text_field: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.reader(file)
    header = next(rows, [])
    # A single column that opens with running text has no header; its cells are the documents.
    if len(header) == 1 and text_field not in header and ("\n" in header[0] or len(header[0]) > 100):
        yield from (row[0] for row in chain([header], rows) if row)
        return
    if header and text_field not in header:
        text_of(dict.fromkeys(header))
    yield from (row[header.index(text_field)] for row in rows if len(row) > header.index(text_field))


def _parquet_documents(
    path: Path, text_of: Callable[[Any], str], text_field: str, wanted: Iterator[bool]
) -> Iterator[str | None]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            text_of(dict.fromkeys(file.schema_arrow.names))
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            values = batch.column(0)
            yield from (
                text_of({text_field: values[row].as_py()}) if next(wanted) else None for row in range(len(values))
            )
