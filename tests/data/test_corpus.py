"""The embedded corpus: three disjoint domains, the same every time, of text and not of tables."""

import ast
import re

import pytest

from moebed.data.corpus import EMBEDDED_DOMAINS, embedded_documents


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return {domain: list(embedded_documents(domain)) for domain in EMBEDDED_DOMAINS}


def test_sizes(corpus: dict[str, list[str]]) -> None:
    sizes = {domain: sum(len(text.encode()) for text in texts) for domain, texts in corpus.items()}
    assert sizes["code"] > 2_500_000
    assert sizes["prose"] > 1_000_000
    assert 1_150_000 < sizes["math"] <= 1_200_000
    assert sum(sizes.values()) < 9_000_000


def test_code_still_parses_and_has_no_docstrings(corpus: dict[str, list[str]]) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in corpus["code"][:80]:
        tree = ast.parse(text)
        assert not any(ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)), text[:200]


def test_prose_is_sentences_and_not_in_code(corpus: dict[str, list[str]]) -> None:
    code = "".join(corpus["code"])
    for text in corpus["prose"]:
        assert re.search(r"[a-z]{2,} [a-z]{2,}", text)
        longest = max(text.split("\n\n"), key=len)
        assert longest not in code


def test_a_smaller_corpus_is_part_of_the_larger(corpus: dict[str, list[str]]) -> None:
    small = list(embedded_documents("code", 100_000))
    assert 50_000 < sum(len(text.encode()) for text in small) <= 100_000
    assert small == list(embedded_documents("code", 100_000))
    assert len(set(small)) == len(small)


def test_no_path_of_the_build_machine(corpus: dict[str, list[str]]) -> None:
    import sysconfig

    for texts in corpus.values():
        assert not any(sysconfig.get_path("stdlib") in text for text in texts)
