"""A wrong value of every option of every command: refused at once, in one line, and nothing is written."""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from moebed import names
from moebed.cli import COMMANDS
from moebed.commands.completion import TRAINING

ROOT = Path(__file__).resolve().parents[2]
RECIPE, STUDY = str(ROOT / "recipes/tiny_mixtral.yaml"), str(ROOT / "recipes/studies/router_tiny.yaml")
LONG = "a text in place of its file's name " * 9
HERE = str(ROOT / "recipes")  # a folder, and no checkpoint
WHOLE, POSITIVE = ("x", "1.5", "-1"), ("nan", "0")
NUMBER = ("x", "nan", "-inf")
CHECKPOINT = ("nothere", LONG)
OUT = ("file.txt/new", "file.txt", LONG, "")
OUT_FILE = ("file.txt/new", "folder", f"{LONG}/new", "")
TEXT = {
    "--text": ("nothere.txt", "folder", "empty.txt", LONG, ""),
    "--input-ids": ("nothere.npy", "folder", "empty.txt", "file.txt"),
    "--domain": ("nothere", "=file.txt", "a=", "a=nothere", "a=folder", "a=empty.txt", f"a={RECIPE}", f"a={LONG}"),
    "--sequence-length": (*POSITIVE, "1"),
    "--domain-tokens": (*POSITIVE, "1"),
    "--text-field": ("",),
    "--memory-budget": ("x", "-5GiB", "0", "nan", "8 apples"),
}
TRAINED = {
    "--config": ("nothere.yaml", "folder", "binary.yaml", STUDY, "trainer: [", LONG),
    "--ckpt_path": ("nothere.ckpt", LONG),
    "--model.config.router": ("softmx",),
    "--model.config.num_exprts": ("4",),
    "--model.config.num_experts": ("x", "1.5", "nan", "true"),
    "--model.config.hidden_act": ("sily",),
}
FEW_OF_TRAINED = {"--config": ("nothere.yaml",), "--ckpt_path": ("nothere.ckpt",), "--model.config.router": ("softmx",)}
JSON = (*OUT_FILE, "nothere/new")
TIMED = {"--rounds": POSITIVE, "--steps": POSITIVE, "--json": JSON}
BENCH_TRAIN = {"--size": ("X",), "--precision": ("16",), "--device": ("gpu",), **TIMED}
# Of each command, and of bench each kind: what stands beside; of each option, values that it refuses.
WRONG = {
    **{each: (["--config", "recipe.yaml"], TRAINED if each == "fit" else FEW_OF_TRAINED) for each in TRAINING},
    "probe": (
        [HERE, "--out", "new"],
        TEXT
        | {
            "--config": ("nothere.yaml", "folder", "binary.yaml", "dtype.yaml", "experts.yaml", "key.yaml"),
            "--out": OUT,
            "--probes": ("balanse", "all,balanse", " ,", "norm_vs_score"),  # the last one needs text
            "--probe-option": ("x", "traffic.ranks", "trafic.ranks=8", "traffic.rank=8", "traffic.ranks=["),
            "--intervene": ("mask",),  # the others need text beside them
            "--text": (
                *TEXT["--text"],
                *(f"file.txt --intervene={one}" for one in ("msk 3", "mask", "replay nothere")),
            ),
            "--earlier": CHECKPOINT,
            "--save-trace": OUT_FILE,
            "--trace-format": ("x",),
            "--through": ("x",),
            "--num-experts": POSITIVE,
            "--reference-dense": CHECKPOINT,
            "--layers": ("x", "-1", "1.5"),
            "--dtype": ("float16",),
            "--device": ("gpu",),
        },
    ),
    "tasks": (
        [HERE, "--tasks", "moebed_recall", "--out", "new"],
        {
            "--out": OUT,
            "--tasks": ("", " ,"),
            "--text": ("x", "a=nothere", "a=folder", "a=empty.txt", f"a={RECIPE}"),
            "--include": ("nothere", "file.txt", LONG),
            "--limit": POSITIVE,
            "--num-fewshot": WHOLE,
            "--batch-tokens": POSITIVE,
            "--device": ("gpu",),
            "--probes": ("balanse", "none,balance", ""),
        },
    ),
    "upcycle": (
        [HERE, "--method", "partition", "--out", "new"],
        TEXT
        | {
            "--out": OUT,
            "--method": ("drp",),
            "--num-experts": (*POSITIVE, "1"),  # fewer than a token's
            "--num-experts-per-tok": (*POSITIVE, "9"),
            "--granularity": POSITIVE,
            "--fraction": (*NUMBER, "1.5"),
            "--noise-std": NUMBER,
            "--output-scale": (*NUMBER, "0"),
            "--by": ("x",),
            "--rows": ("x",),
            "--normalise": ("x",),
            "--starts": POSITIVE,
            "--router": ("x",),
            "--residual-experts": WHOLE,
            "--sharing": ("x",),
            "--expert-width": POSITIVE,
            "--text-clusters": ("x",),
            "--init-std": NUMBER,
            "--seed": ("x", "1.5"),
            "--dense-layers": ("x", "-1"),
            "--shared-experts": WHOLE,
            "--family": ("mixtrl",),
            "--dtype": ("x",),
        },
    ),
    "export": ([HERE, "--out", "new"], {"--out": OUT, "--family": ("mixtrl", ""), "--dtype": ("x",)}),
    "prune": (
        [HERE, "--keep", "2", "--out", "new", "--text", "file.txt"],
        TEXT | {"--out": OUT, "--keep": ("x", "0", "-1", "1.5", "1/0"), "--by": ("reep", ""), "--seed": WHOLE},
    ),
    "study": (
        [STUDY, "--out", "new"],
        {
            "--out": OUT,
            "--jobs": POSITIVE,
            "--arms": ("x", ""),
            "--run": (*WHOLE, "1000"),
            "--pilot": (*POSITIVE, "1"),
            "--difference": (*NUMBER, "0", ".1"),  # the last one belongs to --pilot
        },
    ),
    "law": (
        ["runs.csv", "--form", "joint", "--out", "new"],
        {
            "--form": ("jont",),
            "--out": OUT,
            "--fix": ("x", "x=1", "E", "E=x", "E=nan"),
            "--budget": (*NUMBER, "0"),
            "--cost": ("x",),
            "--resamples": (*POSITIVE, "39"),
            "--seed": WHOLE,
        },
    ),
    "size": (
        ["recipe.yaml"],
        {"--match": ("nothere", "folder", "binary.yaml", STUDY, LONG), "--granularity": POSITIVE},
    ),
    "report": (["folder"], {"--out": OUT_FILE}),
    "bench train": ([], BENCH_TRAIN),
    "bench routers": ([], BENCH_TRAIN | {"--router": ("softmx", "oracle", "")}),
    "bench probe": (
        [],
        {"--rounds": POSITIVE, "--only": ("x",), "--size": ("X",), "--experts": (*POSITIVE, "1"), "--json": JSON},
    ),
    "bench kernels": (
        ["--static"],
        TIMED | {"--arch": ("x",), "--dtype": ("x",), "--only": ("",), "--shape": ("x",), "--tokens": POSITIVE},
    ),
    "bench experts": ([], TIMED | {"--dtype": ("x",), "--device": ("x",), "--shape": ("x",), "--tokens": POSITIVE}),
    "check": (["--only", "x"], {"--minutes": (*NUMBER, "0"), "--out": OUT, "--only": ("x", "")}),
    "completion": ([], {}),
}
ARGUMENTS = {  # in place of an option
    "size": ("num_experts", "num_experts=x", "num_exprts=4", "router=softmx", "num_experts=[", "hidden_size=nan"),
    "report": ("nothere", "file.txt", LONG, ""),
    "study": ("nothere.yaml", "folder", "binary.yaml", RECIPE, ""),
    "law": ("nothere.csv --form=joint --out=new", "runs.csv"),
    "completion": ("x", ""),
}
FILES = {
    "file.txt": b"words", "empty.txt": b"", "binary.yaml": b"\xff\xfe\x00", "runs.csv": b"N,tokens,loss\n1e6,1e7,3\n",
    "recipe.yaml": b"model: {config: {num_experts: 4}}", 
    "dtype.yaml": b"dtype: float16", "experts.yaml": b"num_experts: 0", "key.yaml": b"probs: all",
}  # fmt: skip
# Calls one after another; PyTorch is not found, so that each that asks for it says so.
PROGRAM = """
import contextlib, io, json, sys
from moebed.cli import main
class NoTorch:
    def find_spec(self, name, *_):
        assert name != "torch", "PyTorch was asked for"
sys.meta_path.insert(0, NoTorch())
for arguments in json.loads(sys.stdin.read()):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            code = main(arguments)
        except AssertionError as error:
            code = str(error)
    print(json.dumps([code, said.getvalue(), told.getvalue()]))
    if code != 2:
        break
"""


def parsers():
    """Every parser of moebed's own, by what is written before its options."""
    for command, (module, _) in COMMANDS.items():
        if command in TRAINING:
            continue
        parser = importlib.import_module(module).build_parser()
        kinds = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        yield from (
            ((f"{command} {name}", each) for name, each in kinds[0].choices.items()) if kinds else ((command, parser),)
        )


def options(parser):
    """What takes a value."""
    return [one for one in parser._actions if one.option_strings and one.nargs != 0]


def written(value):
    """A value, and what else stands behind it."""
    first, *more = value.split(" --")
    return [first, *(f"--{one}" for one in more)]


def test_every_option_of_every_command_is_in_the_table():
    assert WRONG.keys() == {*TRAINING, *(name for name, _ in parsers())}
    for name, parser in parsers():
        assert {one.option_strings[-1] for one in options(parser)} == WRONG[name][1].keys(), name


def test_numbers_say_what_they_may_be():
    """int and float say 'invalid int value', and take NaN, and what no model has so many of."""
    for name, parser in parsers():
        for one in options(parser):
            assert one.type not in (int, float), (name, one.option_strings)


def test_a_wrong_value_is_refused_before_pytorch_is_loaded_and_nothing_is_written(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    calls = {
        (command, option, value): [*command.split(), *beside, option, *written(value)]
        for command, (beside, wrong) in WRONG.items()
        for option, values in wrong.items()
        for value in values
    }
    calls |= {
        (command, "", value): [command, *(WRONG[command][0] if command == "size" else ()), *written(value)]
        for command, values in ARGUMENTS.items()
        for value in values
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(list(calls.values())), cwd=tmp_path, capture_output=True,
        text=True, encoding="utf-8", env=None,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for call, (code, line, told) in zip(calls, said, strict=False):
        assert (code, told, line.count("\n")) == (2, "", 1), (call, code, line, told)
        assert line.startswith("moebed: error: "), call
    assert len(said) == len(calls), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "folder"}
    assert all((tmp_path / name).read_bytes() == content for name, content in FILES.items())


@pytest.mark.parametrize(
    "known", [one for one in vars(names).values() if isinstance(one, names.Names)], ids=lambda one: one.attribute
)
def test_names_are_those_of_their_registry(known):
    assert known.own == tuple(getattr(importlib.import_module(known.module), known.attribute))
    assert tuple(known) == known.own


def test_what_else_is_known_before_pytorch_is_as_the_registries_have_it():
    from moebed.checkpoints.families.own import MOEBED
    from moebed.model.routers import ROUTERS
    from probes.measures.expert_scores import RANDOM
    from probes.registry import PROBES
    from probes.running.choosing import probes_for

    settings = {name: tuple(one.name for one in fields(probe.Options)) for name, probe in PROBES.items()}
    assert {name: some for name, some in settings.items() if some} == names.SETTINGS
    assert tuple(name for name, rule in ROUTERS.items() if rule.needs_domain) == names.OF_DOMAINS
    assert (MOEBED.model_type, RANDOM) == (names.OWN_LAYOUT, names.RANDOM)
    assert set(probes_for(["all"], with_text=False)) == set(names.STATIC_PROBES)


def test_a_plugin_adds_to_the_names(monkeypatch):
    from probes import registry

    monkeypatch.setitem(registry.PROBES, "mine", registry.PROBES["balance"])
    names.PROBES.require("mine", "probes")
