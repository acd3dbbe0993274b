"""Each kind of source yields the documents it should, and each mistake ends in one clear line."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from moebed.data.sources import Source, SourceConfig
from moebed.errors import ConfigError, UserError

pyarrow = pytest.importorskip("pyarrow", reason="datasets, which brings pyarrow, is not installed")
pytest.importorskip("pyarrow.parquet")

TEXTS = ["first – ünï", 'with "quotes", commas\nand lines', "third"]


def _read(path: Path | str | list[str], **options: object) -> list[str]:
    return list(Source(SourceConfig("mine", kind="files", path=path, **options)).documents())  # type: ignore[arg-type]


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"records.{request.param}"
    rows = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match request.param:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows))
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["id", "body"])
                writer.writeheader()
                writer.writerows(rows)
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_records(records: Path) -> None:
    assert _read(str(records), text_field="body") == TEXTS


def test_documents_that_are_not_wanted_are_passed_over_and_counted(records: Path) -> None:
    source = Source(SourceConfig("mine", kind="files", path=[str(records)], text_field="body"))
    for wanted in ([True, False, True], [False, False, True], [False, True, False]):
        texts = list(source.texts(iter(wanted)))
        assert texts == [text if is_wanted else None for text, is_wanted in zip(TEXTS, wanted, strict=True)]


def test_a_missing_column_names_those_there_are(records: Path) -> None:
    with pytest.raises(UserError, match=r"'mine': no column 'text' in .*; set text_field .* to one of: id, body$"):
        _read(str(records))


def test_a_record_that_is_unlike_those_before_it_and_another_encoding_are_named(tmp_path: Path) -> None:
    mixed, latin = tmp_path / "mixed.jsonl", tmp_path / "latin.txt"
    mixed.write_text('{"text": "a"}\n{"text": "b"}\n{"body": "c"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"after 2 with a column 'text' a record in .*mixed.jsonl has none, but: body"):
        _read(str(mixed))
    latin.write_text("Grüße", encoding="latin-1")
    with pytest.raises(UserError, match=r"latin.txt: it is not UTF-8 \(byte 0xfc at place 2.*iconv -f latin1 -t utf-8"):
        _read(str(latin))


def test_a_csv_of_one_column_without_header(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["one\ntwo"], ["x" * 200_000], ["last"]])
    assert _read(str(path)) == ["one\ntwo", "x" * 200_000, "last"]


def test_text_files_are_cut_at_blank_lines_and_lose_nothing(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} " + "word " * 60 + "\n\n" for i in range(40)) + "the end"
    (tmp_path / "a.txt").write_text(text)
    documents = _read(str(tmp_path / "a.txt"))
    assert "".join(documents) == text
    assert len(documents) > 4
    assert all(len(document) >= 2048 for document in documents[:-1])
    assert all(document.startswith("paragraph") for document in documents[:-1])


def test_text_files_without_blank_lines_are_cut_at_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i} " + "word " * 60 + "\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    documents = _read(str(tmp_path / "a.txt"))
    assert "".join(documents) == text
    assert len(documents) > 4


def test_separator_globs_gzip_and_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1<>2<> <>3")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"4"))
    assert _read(str(tmp_path / "*.txt*"), document_separator="<>") == ["1", "2", "3", "4"]
    both = [str(tmp_path / "b.txt.gz"), str(tmp_path / "a.txt")]
    assert _read(both, document_separator="<>") == ["4", "1", "2", "3"]


def test_max_bytes_and_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "12345"}\n{"text": "6"}\n')
    assert _read(str(tmp_path / "a.jsonl"), max_bytes=8) == ["a?b", "12345"]


def test_a_document_larger_than_what_is_left_is_cut(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("12345", "aé" * 500, "left out")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert _read(str(tmp_path / "a.jsonl"), max_bytes=10) == ["12345", "aéa"]  # the next letter has two bytes
    assert _read(str(tmp_path / "a.jsonl"), max_bytes=3) == ["123"]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "part.json.gz").write_bytes(gzip.compress(lines.encode()))
    assert _read(str(tmp_path / "part.json.gz")) == TEXTS


def test_bytes_of_a_parquet_column_are_text_or_refused(tmp_path: Path) -> None:
    def write(values: list, kind: pyarrow.DataType) -> str:
        path = tmp_path / "column.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), path)
        return str(path)

    assert _read(write([text.encode() for text in TEXTS], pyarrow.binary())) == TEXTS
    with pytest.raises(UserError, match=r"'mine': column 'text' holds bytes that are not UTF-8 .*; choose "):
        _read(write([b"\xff\xfe"], pyarrow.binary()))
    with pytest.raises(UserError, match=r"'mine': column 'text' holds lists, not text; set text_field"):
        _read(write([["a", "b"]], pyarrow.list_(pyarrow.string())))


@pytest.mark.parametrize("path", ["pandas", "webdataset", "imagefolder", "hdf5"])
def test_builders_that_may_run_code_or_hold_no_text_are_refused(path: str, tmp_path: Path, monkeypatch) -> None:
    """Whatever the version of the data sets library does with them: an older one runs the pickle."""
    import datasets
    from datasets.packaged_modules.pandas.pandas import Pandas

    ran: list[int] = []
    monkeypatch.setattr(Pandas, "_generate_tables", lambda *_, **__: ran.append(1) or iter(()))
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *_, **__: ran.append(1))
    (tmp_path / "evil.pkl").write_bytes(b"cposix\nsystem\n(S'touch evil'\ntR.")
    source = SourceConfig("mine", "hub", path=path, data_files=str(tmp_path / "evil.pkl"))
    with pytest.raises(UserError, match=r"'mine': the data sets library would read .* builder, which may run code or"):
        list(Source(source).documents())
    assert ran == []


def test_hub_kind_reads_with_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for streaming in (False, True):
        source = Source(SourceConfig("h", kind="hub", path="json", data_files=str(path), streaming=streaming))
        assert list(source.stored_documents()) == TEXTS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "files", "path": "nowhere/*.txt"}, "'mine': there is no file nowhere/"),
        ({"kind": "files", "path": "recipes"}, "'mine': recipes is a folder; name its files, such as recipes/.*.txt"),
        ({"kind": "files", "path": "pyproject.toml"}, "cannot read .*pyproject.toml; known kinds: .txt"),
        ({"kind": "hub", "path": "json", "data_files": "nowhere.jsonl"}, "cannot load data set 'json', split 'train'"),
    ],
)
def test_mistakes_found_on_reading(config: dict, message: str, request: pytest.FixtureRequest, monkeypatch) -> None:
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(UserError, match=message) as caught:
        list(Source(SourceConfig("mine", **config)).documents())
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("a.jsonl", "a.txt"):
        with pytest.raises(UserError, match=f"cannot read .*{name}: .*({'utf-16' if name == 'a.txt' else 'line 2'})"):
            _read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "poetry"}, "no embedded domain 'poetry'; choose from code, prose, math"),
        ({"name": "a/b"}, "a domain's name is made of letters"),
        ({"name": "x", "kind": "files"}, "kind files needs a path"),
        ({"name": "code", "weight": 0.0}, "weight is 0.0; it must be positive"),
        ({"name": "math", "streaming": True, "max_bytes": 9}, "max_bytes cannot limit it"),
    ],
)
def test_mistakes_found_at_once(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**config)
