"""How the compiled library comes to be: what it is kept by, and what is said where it cannot be had."""

import functools
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from moebed.model import native
from moebed.model.native import compiled


def test_a_library_is_kept_by_its_sources_and_its_flags(tmp_path, monkeypatch):
    for source in Path(compiled.__file__).parent.glob("*.[ch]*"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(compiled, "_sources", lambda pattern: sorted(tmp_path.glob(pattern)))
    keys, sources = [compiled._key("avx2"), compiled._key("avx512")], sorted(tmp_path.iterdir())
    assert {source.suffix for source in sources} == {".cpp", ".h"}
    for source in sources:
        source.write_bytes(source.read_bytes() + b"\n")
        keys.append(compiled._key("avx2"))
    monkeypatch.setattr(compiled, "_COMMON", (*compiled._COMMON, "-g"))
    keys.append(compiled._key("avx2"))
    assert len(set(keys)) == len(sources) + 3


def test_a_missing_compiler_a_failed_one_and_a_cache_that_cannot_be_written_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "instruction_set", lambda: None)
    assert "no AVX2" in native.load.__wrapped__()
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    monkeypatch.setattr(compiled, "COMPILER", "no-such-compiler")
    assert native.load.__wrapped__() == "compiling it needs no-such-compiler"
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'x.h:1: error: out of luck' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(compiled, "COMPILER", str(failing))
    assert native.load.__wrapped__() == "it did not compile: x.h:1: error: out of luck"
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".failed"]  # it is why
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path / "file"))
    assert "it cannot be kept or loaded" in native.load.__wrapped__()


def test_who_waits_for_a_compilation_takes_its_failure_and_who_comes_later_tries_again(monkeypatch, tmp_path):
    """Of many ranks each would else compile, for most of a minute, one after the other."""
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path / "cache"))
    failing, tried, said = tmp_path / "failing", tmp_path / "tried", []
    failing.write_text(f"#!/bin/sh\necho >> {tried}\nsleep 0.3\necho 'x.h:1: error: out of luck' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(compiled, "COMPILER", str(failing))

    def ask():
        with pytest.raises(compiled.Unavailable) as refused:
            compiled.library.__wrapped__("avx2")
        said.append(str(refused.value))

    together = [threading.Thread(target=ask) for _ in range(3)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert said == ["it did not compile: x.h:1: error: out of luck"] * 3
    assert len(tried.read_text().splitlines()) == 1
    ask()
    assert len(tried.read_text().splitlines()) == 2


def test_a_failure_is_of_its_sources_and_its_time(monkeypatch, tmp_path):
    """A clock that was set back leaves one of a time to come; one of other sources would stay for ever."""
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path))
    kept = tmp_path / "native"
    kept.mkdir()
    to_come, other, foreign = (kept / f"{name}.failed" for name in (compiled._key("avx2"), "avx2-0123", "amx-0123"))
    for file in (to_come, other, foreign):
        file.write_text("it did not compile")
    os.utime(to_come, (2**31, 2**31))
    compile_ = functools.partial(compiled._compile, "avx2", time.time() - 1, tmp_path)
    monkeypatch.setattr(compiled, "COMPILER", "no-such-compiler")
    with pytest.raises(compiled.Unavailable, match="compiling it needs no-such-compiler"):
        compile_()
    assert list(kept.iterdir()) == [foreign]


def test_a_compiler_that_does_not_know_an_instruction_set_takes_the_next_below(monkeypatch):
    monkeypatch.setattr(native, "processor", lambda: "amx")
    monkeypatch.setattr(compiled, "is_there", lambda name: False)
    monkeypatch.setattr(compiled, "compiler_takes", lambda name: name in ("avx2", "avx512"))
    assert native.instruction_set.__wrapped__() == "avx512"
