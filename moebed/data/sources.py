"""One seam for text: a source is a named domain that yields documents.

``embedded`` sources are :mod:`moebed.data.corpus`; ``files`` are local text, CSV, JSON lines, JSON or Parquet files;
``hub`` is what ``datasets.load_dataset_builder`` makes one of the builders of text for; ``planted`` sources are drawn
from languages that are known exactly, :mod:`moebed.data.planted`. Nothing a source names is ever executed: the versions
of ``datasets`` that pyproject allows run no scripts, and of their builders those that open pickles or hold no text are
refused here.
"""

import csv
import glob
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from moebed.data.corpus import EMBEDDED_DOMAINS, embedded_documents, embedded_identity
from moebed.data.file_formats import SUFFIXES, chosen, file_documents, not_utf8, require_known, suffix
from moebed.data.planted import DEFAULT_MAX_BYTES as PLANTED_BYTES
from moebed.data.planted import PLANTED_VERSION, PlantedConfig, PlantedLanguage, language_of
from moebed.errors import ConfigError, UserError
from moebed.machine.provenance import content_record, file_record

# Of the data sets library; cache is what it kept of one of the others.
_PACKAGED = "datasets.packaged_modules."
_ALL = repeat(True)
_BUILDERS = ("csv", "json", "parquet", "arrow", "text", "xml", "cache")


@dataclass
class SourceConfig:
    """One domain of text.

    Args:
        name: Name of the domain, in results and on figures.
        kind: embedded (the corpus built from the Python installation), files (local files), hub (a data set that
            ``datasets.load_dataset`` can load) or planted (drawn from a language whose entropy is known).
        path: For embedded, code, prose or math if that is not the name already; for files, a path or glob or a list of
            them (.txt, .csv, .jsonl, .json and .parquet; all but .parquet also with .gz; a .json file may hold JSON
            lines); for hub, the data set's name.
        subset: Configuration of a hub data set, such as en for allenai/c4.
        split: Split of a hub data set to read; moebed makes its own validation split from it.
        revision: Commit, tag or branch of a hub data set; name a commit for runs that can be repeated.
        data_files: Files of the hub data set to read; with path json, csv, text or parquet, local files.
        text_field: Column or key that holds the text, where documents are records.
        streaming: Tokenize while training and never hold the whole source, on disk or in memory. A local file is read a
            piece at a time, and again for each pass over it. Each process tokenizes what it trains on and passes over
            the documents of the others, unparsed where the file is .jsonl or .parquet.
        weight: Chance of a training sequence to come from this domain, relative to the other domains' weights. If no
            source has a weight and none is streaming, domains weigh what they hold in tokens; otherwise a source
            without one weighs 1.
        document_separator: In .txt files, each piece between two of these is a document. If not given, the file is cut
            at blank lines (or at line ends, where there is no blank line) into documents of at least 2 kB.
        max_bytes: Use no more than this many bytes of text; the document that goes beyond is cut. A planted source has
            4 MB if not given.
        planted: Of a planted source, its language and which domain of it this is.
    """

    name: str
    kind: Literal["embedded", "files", "hub", "planted"] = "embedded"
    path: str | list[str] | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    text_field: str = "text"
    streaming: bool = False
    weight: float | None = None
    document_separator: str | None = None
    max_bytes: int | None = None
    planted: PlantedConfig | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without reading anything; raises ConfigError."""
        where = f"data source {self.name!r}"
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"{where}: a domain's name is made of letters, digits, '_', '-' and '.'")
        if self.kind == "embedded" and self.embedded_domain not in EMBEDDED_DOMAINS:
            raise ConfigError(
                f"{where}: no embedded domain {self.embedded_domain!r}; choose from {', '.join(EMBEDDED_DOMAINS)}"
            )
        if (self.kind == "planted") != (self.planted is not None):
            raise ConfigError(
                f"{where}: kind planted needs planted, the settings of its language, and no other kind has them"
            )
        if self.kind in ("files", "hub") and not self.path:
            raise ConfigError(f"{where}: kind {self.kind} needs a path")
        if self.kind == "hub" and not isinstance(self.path, str):
            raise ConfigError(f"{where}: a hub data set has one name as its path; use data_files to choose its files")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"{where}: weight is {self.weight}; it must be positive and finite")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"{where}: max_bytes is {self.max_bytes}; it must be at least 1")
        if self.max_bytes is not None and self.streaming:
            raise ConfigError(
                f"{where}: a streaming source has no end, so max_bytes cannot limit it; drop one of the two"
            )
        if self.document_separator == "":
            raise ConfigError(f"{where}: document_separator is empty; leave it out to cut at blank lines")

    @property
    def embedded_domain(self) -> str:
        """Which embedded domain an ``embedded`` source means."""
        return self.path if isinstance(self.path, str) else self.name

    @property
    def language(self) -> PlantedLanguage | None:
        """What a ``planted`` source is drawn from."""
        return None if self.planted is None else language_of(self.planted)

    @property
    def has_token_domains(self) -> bool:
        """Whether its text says the domain of each token, since domains switch within a document."""
        return self.planted is not None and self.planted.switch > 0


class Source:
    """Reads the documents that a SourceConfig names.

    Args:
        config: The source.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    def identity(self) -> dict[str, Any]:
        """Returns everything that decides the documents, as plain data for a cache fingerprint.

        Raises:
            UserError: If a local file does not exist.
        """
        config = self.config
        if config.kind == "embedded":
            return embedded_identity(config.embedded_domain, config.max_bytes)
        if config.planted is not None:
            drawn = {"planted": asdict(config.planted), "planted_version": PLANTED_VERSION}
            return drawn if config.streaming else drawn | {"max_bytes": config.max_bytes or PLANTED_BYTES}
        kept_out = ("name", "weight", "path", "planted")
        identity = {key: value for key, value in asdict(config).items() if key not in kept_out}
        if config.kind == "files":
            return identity | {"files": [_file_identity(path) for path in self.files()]}
        return identity | {"path": config.path, "files": [_file_identity(path) for path in self._data_files()]}

    def content(self) -> list[Any]:
        """Returns what the local files of the source hold, whatever their times and folders, as plain data.

        Raises:
            UserError: If one does not exist.
        """
        if self.config.kind == "embedded":
            return [embedded_identity(self.config.embedded_domain, self.config.max_bytes)]
        if self.config.kind == "planted":
            return [self.identity()]
        return [content_record(path) for path in (self.files() if self.config.kind == "files" else self._data_files())]

    def _data_files(self) -> list[Path]:
        """The local files that a hub source names."""
        patterns = [self.config.data_files] if isinstance(self.config.data_files, str) else self.config.data_files or []
        local = [Path(name) for pattern in patterns for name in sorted(glob.glob(pattern))]
        return [path for path in local if path.is_file()]

    def files(self) -> list[Path]:
        """Returns a ``files`` source's files in order; raises UserError if a path or glob matches none."""
        patterns = [self.config.path] if isinstance(self.config.path, str) else self.config.path or []
        found: list[Path] = []
        for pattern in patterns:
            expanded = str(Path(pattern).expanduser())
            matches = (
                [Path(expanded)]
                if Path(expanded).exists()
                else [Path(p) for p in sorted(glob.glob(expanded, recursive=True))]
            )
            matches = [path for path in matches if path.is_file()]
            if not matches:
                raise UserError(f"data source {self.config.name!r}: {_no_file(pattern, Path(expanded))}")
            found += [path for path in matches if path not in found]
        for path in found:
            require_known(path, f"data source {self.config.name!r}")
        return found

    def documents(self) -> Iterator[str]:
        """Yields the non-empty documents, the last one cut at ``max_bytes`` bytes of UTF-8 text.

        Raises:
            UserError: If a file is missing or damaged, the text field does not exist or the hub cannot be reached.
        """
        limit = self.config.max_bytes
        if limit is None and self.config.kind == "planted":
            limit = PLANTED_BYTES
        left = sys.maxsize if limit is None else limit
        for text in self.texts():
            if text is None or not text.strip():
                continue
            text = encodable(text)
            size = len(text.encode())
            if size > left:
                text = text.encode()[:left].decode(errors="ignore")  # a character that is cut through is left out
            if text.strip():
                yield text
            left -= size
            if left <= 0:
                return

    def stored_documents(self) -> Iterator[str]:
        """Yields the documents to store: all of them, or of a streaming source one pass that keeps nothing.

        A streaming planted source has no end; who stores of it has enough at some time.
        """
        if self.config.kind == "planted" and self.config.streaming:
            return (text for text in self.texts() if text is not None)
        if self.config.kind == "hub" and self.config.streaming:
            texts = self.texts_of(self.load_dataset(streaming=True))
            return (encodable(text) for text in texts if text is not None and text.strip())
        return self.documents()

    def texts(self, wanted: Iterator[bool] = _ALL) -> Iterator[str | None]:
        """Yields every document as it stands, empty ones too.

        Args:
            wanted: For each document in turn, whether it is; instead of one that is not, None is yielded, and it is
                not parsed where it need not be.

        Raises:
            UserError: As in :meth:`documents`.
        """
        config = self.config
        if config.kind == "embedded":
            yield from chosen(embedded_documents(config.embedded_domain, config.max_bytes), wanted)
        elif config.language is not None:
            for block in config.language.blocks():
                yield from (block.documents[index] if next(wanted) else None for index in range(len(block)))
        elif config.kind == "hub":
            yield from self.texts_of(self.load_dataset(streaming=False), wanted)
        else:
            for path in self.files():
                text_of = _TextOf(self, path)
                try:
                    yield from file_documents(path, text_of, config.text_field, config.document_separator, wanted)
                except UnicodeDecodeError as error:
                    raise UserError(f"data source {config.name!r}: {not_utf8(path, error)}") from error
                except (OSError, EOFError, csv.Error, ValueError) as error:
                    raise UserError(
                        f"data source {config.name!r}: cannot read {path}: {_one_line(error)}; "
                        "mend the file, or leave it out of the path"
                    ) from error

    def text_of(self, record: Any, where: str = "", read_before: int = 0) -> str:
        """Returns a record's text; raises UserError, naming the columns there are, if it has no such field.

        Args:
            record: What was read.
            where: What an error says of the file, with a space in front.
            read_before: Records of the file that had the field.
        """
        field = self.config.text_field
        if not isinstance(record, dict) or field not in record:
            columns = ", ".join(map(str, record)) if isinstance(record, dict) else "none: the records are not objects"
            if read_before:
                raise UserError(
                    f"data source {self.config.name!r}: after {read_before} with a column {field!r} a record{where} "
                    f"has none, but: {columns}; mend the file, or leave the record out"
                )
            raise UserError(
                f"data source {self.config.name!r}: no column {field!r}{where}; set text_field (--text-field of moebed "
                f"probe) to one of: {columns}"
            )
        value = record[field]
        if isinstance(value, bytes):  # Parquet writers may leave out that a column is text
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data source {self.config.name!r}: column {field!r} holds bytes that are not UTF-8 ({error}); "
                    "choose a text_field of text"
                ) from error
        if value is not None and not isinstance(value, str | int | float):
            raise UserError(
                f"data source {self.config.name!r}: column {field!r} holds {type(value).__name__}s, not text; "
                f"set text_field to one of: {', '.join(map(str, record))}"
            )
        return "" if value is None else str(value)

    def texts_of(self, dataset: Any, wanted: Iterator[bool] = _ALL) -> Iterator[str | None]:
        """Yields the text of each record of an opened hub data set; raises UserError in one line if reading fails.

        Args:
            dataset: What :meth:`load_dataset` returned.
            wanted: As in :meth:`texts`.
        """
        records = iter(dataset)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # the network and the parsers raise all sorts
                cause = f"{type(error).__name__}: {_one_line(error)}"
                raise UserError(f"data source {self.config.name!r}: reading the data set stopped ({cause})") from error
            yield self.text_of(record) if next(wanted) else None

    def load_dataset(self, streaming: bool) -> Any:
        """Opens a ``hub`` source with the datasets library; raises UserError in one line if that fails."""
        import datasets  # heavy, and needed by this kind alone

        config = self.config
        try:
            builder = datasets.load_dataset_builder(
                str(config.path), config.subset, data_files=config.data_files, revision=config.revision
            )
            self._require_text_builder(builder)
            if streaming:
                return builder.as_streaming_dataset(split=config.split)
            builder.download_and_prepare()
            return builder.as_dataset(split=config.split)
        except UserError:
            raise
        except Exception as error:  # network, hub, parser: one cause, said in one line
            name = " ".join(filter(None, [str(config.path), config.subset]))
            raise UserError(
                f"data source {config.name!r}: cannot load data set {name!r}, split {config.split!r} "
                f"({type(error).__name__}: {_one_line(error)}); check its name and the network, or give files"
            ) from error

    def _require_text_builder(self, builder: Any) -> None:
        """Raises UserError unless what would read the files is known to open neither pickles nor code."""
        kinds = {base.__module__.removeprefix(_PACKAGED).split(".")[0] for base in type(builder).__mro__}
        if not kinds & set(_BUILDERS):
            raise UserError(
                f"data source {self.config.name!r}: the data sets library would read {self.config.path!r} with its "
                f"{type(builder).__name__} builder, which may run code or holds no text; "
                f"only these are used: {', '.join(_BUILDERS)}"
            )


class _TextOf:
    """Text of the records of one file, which counts them."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source, self._where, self._read = source, f" in {path}", 0

    def __call__(self, record: Any) -> str:
        text = self._source.text_of(record, self._where, self._read)
        self._read += 1
        return text


def require_files(given: list[Any]) -> None:
    """Refuse a recipe's ``data.sources`` whose local files are not there, before anything is built.

    Raises:
        UserError: There is no such file, or a setting has no such value. What is of another type the parser refuses.
    """
    for entry in given:
        if not isinstance(entry, dict) or entry.get("kind") != "files":
            continue
        try:
            Source(SourceConfig(**entry)).files()
        except TypeError:
            continue


def encodable(text: str) -> str:
    """Replaces what has no UTF-8 form: lone surrogates, which JSON can spell."""
    return text.encode("utf-8", "replace").decode()


def _file_identity(path: Path) -> list[object]:
    return [str(path.resolve()), *file_record(path)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _no_file(pattern: str, path: Path) -> str:
    """Why nothing matches, and what to write."""
    if not path.is_dir():
        return f"there is no file {pattern}; set its path to one that is there"
    there = sorted({suffix(file) for file in path.iterdir()} & set(SUFFIXES)) or [".txt"]
    return f"{pattern} is a folder; name its files, such as {pattern.rstrip('/')}/*{there[0]}"
