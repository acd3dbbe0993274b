"""The walks through the code in moebed/README.md: what they name is there, and is called by what they follow."""

import ast
import contextlib
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from moebed.checkpoints.whole import load_decoder, write_checkpoint
from moebed.cli import main
from moebed.model import native
from moebed.model.decoder import Decoder
from tests.conftest import tiny_config
from tests.small_run import probing, small_recipe, write_recipe
from tests.test_architecture import ROOT
from tests.test_readmes import section

README = Path("moebed/README.md")
WALKS = ("One training step", "One probing pass", "One tensor of a checkpoint")
pytestmark = pytest.mark.drawn  # which is a part of a probing pass


def steps_of(walk):
    """(file, name) of every function that a walk's table names."""
    for line in section(README, walk):
        cells = line.split("|")
        if not line.startswith("| `"):
            continue
        (path,) = re.findall(r"`([^`]+)`", cells[1])
        names = re.findall(r"`([^`]+)`", cells[2])
        assert names, line
        yield from ((path, name) for name in names)


def defined_in(path):
    """What a file defines, by qualified name, and whether it is a function."""
    found, waiting = {}, [("", ast.parse((ROOT / path).read_text(encoding="utf-8")))]
    while waiting:
        prefix, node = waiting.pop()
        for child in node.body:
            if isinstance(child, ast.FunctionDef):
                found[prefix + child.name] = True
            elif isinstance(child, ast.ClassDef):
                found[prefix + child.name] = False
                waiting.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, ast.Assign):
                found |= {prefix + target.id: False for target in child.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("walk", WALKS)
def test_every_function_of_a_walk_is_there(walk):
    steps = list(steps_of(walk))
    assert len(steps) > 20
    assert not [step for step in steps if step[1] not in defined_in(step[0])]


@contextlib.contextmanager
def watching(called):
    """Notes (file, qualified name) of every function of ours that is called, in this thread and new ones."""

    def note(
        frame, event, argument
    ):  # of calls, and as it returns nothing, of no line; a profiler is told of C as well
        called.add(frame.f_code)

    threading.settrace(note)
    sys.settrace(note)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """What is called while a model is trained and probed, and while a checkpoint is written, read and probed."""
    folder, codes = tmp_path_factory.mktemp("walks"), set()
    callbacks = probing(2, probes=["matrix_similarity", "norm_vs_score"])
    recipe = write_recipe(folder, small_recipe(folder, trainer={"max_steps": 2, "callbacks": callbacks}))
    ids, mixtral, out = folder / "ids.npy", folder / "mixtral", folder / "out"
    np.save(ids, np.arange(20, dtype=np.int64))
    asked = ["--out", str(out), "--input-ids", str(ids), "--probes", "matrix_similarity,norm_vs_score"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "is_fastest", lambda *asked: False)  # as where the compiled experts are not to be had
        patched.setattr("moebed.checkpoints.files.map_cached", lambda *part: None)  # as of files not read before
        with watching(codes):
            assert main(["fit", "--config", str(recipe)]) == 0
            write_checkpoint(Decoder(tiny_config()), "mixtral", mixtral, torch.bfloat16)
            load_decoder(mixtral)
            assert main(["probe", str(mixtral), *asked]) == 0
    files = {code.co_filename for code in codes}
    paths = {name: Path(name).relative_to(ROOT).as_posix() for name in files if name.startswith(f"{ROOT}/")}
    return {(paths[code.co_filename], code.co_qualname) for code in codes if code.co_filename in paths}


@pytest.mark.parametrize("walk", WALKS)
def test_every_function_of_a_walk_is_called(walk, called):
    wanted = [(path, name) for path, name in steps_of(walk) if defined_in(path)[name]]
    assert not [step for step in wanted if step not in called]
