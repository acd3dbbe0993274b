"""What the READMEs say of the tree is so: paths, links, commands, walks through functions, tables of files, rooms."""

import argparse
import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from moebed.cli import COMMANDS
from moebed.data.datamodule import TextDataModule
from moebed.model.config import ModelConfig
from moebed.training.module import MoEModule
from tests.test_architecture import FLOORS, ROOT

READMES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "runs" for part in path.relative_to(ROOT).parts)
)
SUFFIXES = (".py", ".md", ".yaml", ".sbatch", ".cpp", ".h", ".toml", ".png")
# What a run or a person writes, or is a project's name, and no file of the tree.
MADE = {"llama.cpp", "config.yaml", "start.yaml", "my_router.py", "cosine.py", "confidence.py", "README.md"}
TREE = re.compile(r"    ( *)(\w+)/  +(.*)")  # a line of the annotated tree
# Of `fit`, beside the arguments of model and data.
SECTIONS = {"config", "ckpt_path", "help", "plugins", "print_plan", "trainer", "checkpoint", "samples", "parallel"}


def lines_of(readme):
    return (ROOT / readme).read_text(encoding="utf-8").splitlines()


def section(readme, heading):
    """Lines below a heading, up to the next of its kind."""
    lines = lines_of(readme)
    start = lines.index(f"## {heading}") + 1
    stop = next((n for n in range(start, len(lines)) if lines[n].startswith("## ")), len(lines))
    return lines[start:stop]


def code_of(readme):
    """What a README has as code: lines of blocks, those that go on joined, and spans, with the line's number."""
    text = "\n".join(lines_of(readme)).replace("\\\n", " ")
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("    ") or fenced:
            yield line.split(" #")[0]
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield " ".join(span.split())


def places(readme):
    """Folders that a path in a README may begin in: its own, and those above it."""
    return [ROOT / place for place in readme.parents]


def paths_of(readme):
    """What is a path by its look: by its ending, or as it begins with a folder that is there."""
    folders = {folder.name for place in places(readme) for folder in place.iterdir() if folder.is_dir()} - {"runs"}
    lines = [line for line in lines_of(readme) if not TREE.fullmatch(line)]
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))  # links, as the tree, are looked at by themselves
    for word in re.findall(r"[\w.*/{}<>:-]+", text.replace("**", "")):
        name = word.split("::")[0].rstrip(".:").removeprefix("../")
        made = name in MADE or name.startswith(("runs/", "shared/"))
        placeholder = re.search(r"[*{}<>:]", name) or any(re.fullmatch(r"[A-Z]+(\.\w+)?", p) for p in name.split("/"))
        is_path = name.endswith(SUFFIXES) or ("/" in name and name.split("/")[0] in folders)
        if is_path and not made and not placeholder:
            yield name


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_there_are_readmes():
    assert {"README.md", "moebed/LIMITS.md", "moebed/README.md", "probes/README.md"} <= {
        path.as_posix() for path in READMES
    }


def test_the_first_readme_is_short():
    assert len(lines_of(Path("README.md"))) <= 150


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_path_is_there(readme):
    missing = [
        name
        for name in paths_of(readme)
        if not any((place / end).exists() for place in places(readme) for end in (name, f"{name}.yaml"))
    ]
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_link_leads_somewhere(readme):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(lines_of(readme))):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        found = (ROOT / readme).parent / path if path else ROOT / readme
        assert found.exists(), target
        if place:
            readable = found / "README.md" if found.is_dir() else found
            headings = [line for line in readable.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            assert place in [anchor(heading) for heading in headings], target


class Parsing(Exception):
    """Instead of parsing: the parser."""


def options_of(command, monkeypatch):
    """The options of a command, its own commands' included."""

    def parse(parser, *arguments, **options):
        raise Parsing(parser)

    run = importlib.import_module(COMMANDS[command][0]).run
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsing) as caught:
            run(command, [])
    found, waiting = {"plugins", "verbose"}, [caught.value.args[0]]
    while waiting:
        for action in waiting.pop()._actions:
            found |= {option.lstrip("-") for option in action.option_strings}
            waiting += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    return found


def is_key_of_fit(key):
    first, _, rest = key.partition(".")
    settings = {"model": MoEModule, "data": TextDataModule}
    if first not in settings:
        return first in SECTIONS
    name, _, of_config = rest.partition(".")
    known = name in inspect.signature(settings[first].__init__).parameters
    field = of_config.partition(".")[0]
    return known and (name != "config" or field == "" or field in ModelConfig.__dataclass_fields__)


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_command_and_option_is_there(readme, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for code in code_of(readme):
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
            assert target in targets, code
        for command, arguments in re.findall(r"(?:^ *|`)moebed ([a-z]+)\b([^`]*)", code):
            assert command in COMMANDS, code
            given = re.findall(r"(?:^|[\s\[])--([\w.-]+)", arguments)
            if command in ("fit", "validate", "test", "predict"):
                unknown = [key for key in given if not is_key_of_fit(key)]
            else:
                known = options_of(command, monkeypatch) if given else set()
                unknown = [key for key in given if key not in known]
            assert not unknown, code


def test_the_tree_is_the_one_that_is_there():
    """Its folders, the files that it names in them, and every room, from the ground up."""
    rooms, stack = [], []
    for line in section(Path("README.md"), "Where things are"):
        found = TREE.fullmatch(line)
        if found is None:
            continue
        depth, name, what = len(found[1]) // 2, found[2], found[3]
        stack[depth:] = [name]
        folder = ROOT.joinpath(*stack)
        assert folder.is_dir(), line
        for file in re.findall(r"[\w.]+\.py|\w+(?=/)", what):
            assert (folder / file).exists(), line
        rooms.append(".".join(stack))
    floor = {room: number for number, names in enumerate(FLOORS) for room in names}
    packages = {room for room in floor if ROOT.joinpath(*room.split("."), "__init__.py").exists()}
    assert packages <= set(rooms)
    inner = [room for room in rooms if room in packages and not any(one.startswith(f"{room}.") for one in packages)]
    drawn = [floor[room] for room in inner]
    assert drawn == sorted(drawn)


@pytest.mark.parametrize("package", ["moebed", "probes"])
def test_every_file_is_in_the_table_of_its_package(package):
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    files = (ROOT / package).rglob("*.py")
    named = {path.relative_to(ROOT / package).as_posix() for path in files if path.name != "__init__.py"}
    assert not [name for name in sorted(named) if f"`{name}`" not in text]


def test_the_examples_in_python_run(capsys, tmp_path, monkeypatch):
    """From another folder than the project's, as a script of a person's own."""
    beneath, own = re.findall(r"```python\n(.*?)```", "\n".join(lines_of("moebed/commands/README.md")), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(beneath, {})
    assert "rank correlation" in capsys.readouterr().out
    exec(own, {})
    said = json.loads(Path("runs/own/summary.json").read_text(encoding="utf-8"))
    assert "balance" in json.dumps(said)
    assert Path("runs/own/results/balance.npz").is_file()


def test_the_glossary_is_short():
    rows = [line for line in section(Path("moebed/README.md"), "Glossary") if line.startswith("|")]
    assert 10 <= len(rows) - 2 <= 20


def test_rooms_say_what_they_are_for_and_may_import():
    """What a room may import: what is on the floor below, and what lies below that."""
    for number, rooms in enumerate(FLOORS[1:], 1):
        for room in rooms:
            path = ROOT.joinpath(*room.split("."), "__init__.py")
            if not path.exists():
                continue
            words = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
            found = re.search(r"May import (.*?) and what lies below\.", words)
            assert found, f"{room} does not say what it may import"
            assert tuple(re.findall(r"``([\w.]+)``", found[1])) == FLOORS[number - 1], room
