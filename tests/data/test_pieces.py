"""Files read a piece at a time: the same documents and records as of the whole, and no more memory than a piece."""

import io
import json
import random
import re
import tracemalloc
from contextlib import nullcontext

import pytest

from moebed.data import pieces
from moebed.data.pieces import json_records, text_documents


def _cut_whole(text, separator):
    """What the documents are, said of the whole text."""
    if separator is not None:
        return text.split(separator)
    gap = r"(?<=\n)(?:[ \t\r]*\n)+" if re.search(r"\n[ \t\r]*\n", text) else r"\n"
    found, start = [], 0
    for match in re.finditer(gap, text):
        if match.end() - start >= 2048:
            found.append(text[start : match.end()])
            start = match.end()
    return [*found, text[start:]]


@pytest.mark.parametrize(
    "parts", [["a" * 50, "\n", " ", "\r\n"], ["a" * 300, "\n", "\n \t\r\n", "b"], ["q" * 99, "\n"]]
)
def test_documents_of_pieces_are_those_of_the_whole_text(parts, monkeypatch):
    draw = random.Random(0)
    for trial in range(60):
        monkeypatch.setattr(pieces, "_PIECE", draw.choice([1, 7, 1000]))
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(300)))
        for separator in (None, "aa", "b\n"):
            found = list(text_documents(lambda text=text: nullcontext(io.StringIO(text, newline="\n")), separator))
            wanted = _cut_whole(text, separator)
            assert [d for d in found if d.strip()] == [d for d in wanted if d.strip()], trial


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_of_pieces_are_those_of_the_whole_file(piece, indent, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", piece)
    records = [1.5e10, 12345, -1.5e-7, 's"\\é', None, True, {"a": [1, {"b": "x" * 50}]}, [], "end", 7]
    for ascii_only in (True, False):
        one_by_one = "\n".join(json.dumps(record, indent=indent, ensure_ascii=ascii_only) for record in records)
        array = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
        assert list(json_records(io.StringIO(one_by_one))) == list(json_records(io.StringIO(array))) == records
    assert list(json_records(io.StringIO(" \n"))) == list(json_records(io.StringIO("[ ]"))) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1,2", "character 4: the array goes on with neither"),
        ("[1 2]", "character 3: the array goes on with neither"),
        ("[1] 2", "character 4: there is more after the end"),
        ('{"a" 1}', "character 5: Expecting ':'"),
        ('[{"a": "b', "character 7: Unterminated string"),
    ],
)
def test_what_is_no_json_is_named_by_its_place(text, message, monkeypatch):
    for piece in (1, 100):
        monkeypatch.setattr(pieces, "_PIECE", piece)
        with pytest.raises(ValueError, match=message):
            list(json_records(io.StringIO(text)))


@pytest.mark.parametrize("name", ["big.txt", "big.json"])
def test_no_more_than_a_piece_is_in_memory(name, tmp_path):
    document = "words of a document " * 100
    with (tmp_path / name).open("w", encoding="utf-8") as file:
        if name == "big.txt":
            file.writelines(f"{document}{document}\n\n" for _ in range(4000))
        else:
            file.write("[" + ",".join([json.dumps({"text": document * 2})] * 4000) + "]")

    def opened():
        return (tmp_path / name).open(encoding="utf-8", newline="\n")

    tracemalloc.start()
    try:
        if name == "big.txt":
            count = sum(1 for _ in text_documents(opened, None))
        else:
            with opened() as file:
                count = sum(1 for _ in json_records(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 4000
    assert peak < 8e6 < (tmp_path / name).stat().st_size
