"""The embedded corpus: three labelled domains built from what every Python installation has, so nothing is downloaded.

- ``code``: the standard library's sources, one document per file, docstrings removed;
- ``prose``: the standard library's docstrings (one document per module) and the language reference's help topics;
- ``math``: generated questions and answers, see :mod:`moebed.data.mathematics`.

Docstrings are cut out of ``code`` so that no text is in two domains. Sources are parsed, never imported.
"""

import ast
import hashlib
import inspect
import platform
import re
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moebed.data.mathematics import math_documents

EMBEDDED_DOMAINS = ("code", "prose", "math")
DEFAULT_MAX_BYTES = {"code": 3_600_000, "prose": 2_000_000, "math": 1_200_000}
# Raised when the rules below or the generator change, so that cached tokens of an older corpus are not reused.
CORPUS_VERSION = 1

# Tests and their data, bundled third-party code, tables, and files that name the machine they were built on.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
    | {"_bundled", "encodings", "pydoc_data", "turtledemo"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__")
_MIN_CODE_BYTES = 400
_MIN_DOCSTRING_CHARACTERS = 80
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Docstring = tuple[_Documented, ast.Expr]


def embedded_documents(domain: str, max_bytes: int | None = None) -> Iterator[str]:
    """Yields the documents of one embedded domain, always in the same order for a given Python version.

    Documents come in the order of a hash of their content, so a smaller ``max_bytes`` is a fair sample of the whole.

    Args:
        domain: One of ``code``, ``prose`` and ``math``.
        max_bytes: Stop before this many bytes of UTF-8 text; the default is ``DEFAULT_MAX_BYTES[domain]``.

    Yields:
        One document at a time.
    """
    budget = DEFAULT_MAX_BYTES[domain] if max_bytes is None else max_bytes
    if domain == "math":
        yield from math_documents(budget)
        return
    code, prose = _library_documents()
    for document in code if domain == "code" else prose:
        size = len(document.encode())
        if size <= budget:
            budget -= size
            yield document


def embedded_identity(domain: str, max_bytes: int | None = None) -> dict[str, object]:
    """Returns everything that decides the domain's content, as plain data for a cache fingerprint."""
    budget = DEFAULT_MAX_BYTES[domain] if max_bytes is None else max_bytes
    version = "any" if domain == "math" else f"{platform.python_implementation()} {sys.version}"
    return {"embedded": domain, "max_bytes": budget, "python": version, "corpus_version": CORPUS_VERSION}


@lru_cache(maxsize=1)
def _library_documents() -> tuple[list[str], list[str]]:
    """Parses the standard library once and returns its documents: (code, prose)."""
    code, prose = [], list(_help_topics())
    for path in _library_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # an unreadable file is no reason to do without the others
        # Not splitlines: to the parser a form feed is no line end.
        lines = [line + "\n" for line in source.split("\n")]
        docstrings = list(_docstrings(tree))
        stripped = _without_docstrings(lines, docstrings)
        if len(stripped.encode()) >= _MIN_CODE_BYTES:
            code.append(stripped)
        if text := _prose_of(docstrings):
            prose.append(text)
    return _ordered(code), _ordered(prose)


def _ordered(documents: list[str]) -> list[str]:
    return sorted(set(documents), key=lambda text: hashlib.blake2b(text.encode()).digest())


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for name in sorted(sys.stdlib_module_names):
        if name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES):
            continue
        if (root / f"{name}.py").is_file():
            files.append(root / f"{name}.py")
        files.extend(
            path for path in (root / name).rglob("*.py") if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        )
    return sorted(files)


def _docstrings(tree: ast.Module) -> Iterator[_Docstring]:
    """What has a docstring, and the docstring; a walk over statements alone, where definitions can be."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        for inside in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, inside, ()))
        if isinstance(node, _Documented) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield node, first


def _without_docstrings(lines: list[str], docstrings: list[_Docstring]) -> str:
    """Removes docstrings by their line ranges; a body that held nothing else keeps an ellipsis in their place."""
    kept: list[str | None] = list(lines)
    for node, docstring in docstrings:
        start, end = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
        # Columns of the syntax tree count UTF-8 bytes.
        before = lines[start].encode()[: docstring.col_offset].decode()
        after = lines[end].encode()[docstring.end_col_offset :].decode()
        alone = len(node.body) == 1 and not isinstance(node, ast.Module)
        for index in range(start, end + 1):
            kept[index] = None
        if alone or before.strip() or after.strip().startswith(";"):
            kept[start] = f"{before}...{after}"
    return "".join(line for line in kept if line is not None).strip("\n") + "\n"


def _prose_of(docstrings: list[_Docstring]) -> str:
    """Joins a module's docstrings that hold sentences, in the order of the source."""
    found = sorted(docstrings, key=lambda pair: pair[1].lineno)
    texts = [_sentences(inspect.cleandoc(str(ast.literal_eval(node.value)))) for _, node in found]
    return "\n\n".join(dict.fromkeys(text for text in texts if text))


def _sentences(docstring: str) -> str:
    """Keeps a docstring's paragraphs of text, or nothing when it is too short or holds no full sentence."""
    paragraphs = [part.rstrip() for part in re.split(r"\n\s*\n", docstring) if ">>>" not in part]
    text = "\n\n".join(paragraphs).strip()
    is_prose = len(text) >= _MIN_DOCSTRING_CHARACTERS and re.search(r"[a-z]{2,} [a-z]{2,}[^.!?]*[.!?](\s|$)", text)
    return text if is_prose else ""


def _help_topics() -> Iterator[str]:
    """The texts of ``pydoc_data.topics``, read from its one literal."""
    try:
        path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
        for table in tables:
            yield from (str(text).strip() + "\n" for text in ast.literal_eval(table).values())
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return  # some distributions leave the topics out
