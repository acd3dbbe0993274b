"""What is refused before PyTorch is loaded, and options that are misspelt, whatever the command."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from moebed import extras
from moebed.arguments import OneLineParser, is_run_recipe, read_yaml
from moebed.cli import COMMANDS, main
from moebed.commands.fit import CHECKPOINT, FOLDER, KEYS, SOURCES, look_first
from moebed.errors import ConfigError, UserError
from moebed.machine.units import parse_bytes
from moebed.training.starting import find_start

RECIPE = "recipes/tiny_mixtral.yaml"
STUDY = "recipes/studies/router_tiny.yaml"


def test_what_needs_no_model_is_refused_before_pytorch_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    program = "import sys; from moebed.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    folder = f"--trainer.default_root_dir={tmp_path}/file/run"
    done = subprocess.run(
        [sys.executable, "-c", program, "fit", "-c", RECIPE, folder], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout.split() == ["2", "False"]
    assert "cannot be written (Not a directory); choose another with --trainer.default_root_dir" in done.stderr


# Of each command: what it is given beside an option that it does not have, and a path that is not there.
REFUSED = {
    "fit": (["--config", RECIPE], ["--config", "nothere.yaml"]),
    "validate": (["--config", RECIPE], ["--config", "nothere.yaml"]),
    "test": (["--config", RECIPE], ["--config", "nothere.yaml"]),
    "predict": (["--config", RECIPE], ["--config", "nothere.yaml"]),
    "probe": (["nothere", "--out", "new"], ["nothere", "--out", "new"]),
    "tasks": (["nothere", "--out", "new"], ["nothere", "--out", "new", "--tasks", "moebed_recall"]),
    "upcycle": (["nothere", "--out", "new", "--method", "copy"], ["nothere", "--out", "new", "--method", "copy"]),
    "export": (["nothere", "--out", "new"], ["nothere", "--out", "new"]),
    "prune": (["nothere", "--out", "new", "--keep", "2"], ["nothere", "--out", "new", "--keep", "2"]),
    "study": ([STUDY], ["nothere.yaml"]),
    "law": (["nothere.csv", "--form", "joint", "--out", "new"], ["nothere.csv", "--form", "joint", "--out", "new"]),
    "size": ([RECIPE], ["nothere.yaml"]),
    "report": (["nothere"], ["nothere"]),
    "bench": (["train"], ["nothere"]),
    "check": ([], ["--out", RECIPE]),
    "completion": (["bash"], ["nothere"]),
}


def test_every_command_refuses_what_it_can_before_pytorch_is_loaded():
    """In one line, with exit code 2: an option that it does not have, and a path that is not there."""
    assert REFUSED.keys() == COMMANDS.keys()
    calls = {}
    for command, (beside, nowhere) in REFUSED.items():
        calls[command, "an option"] = [command, *beside, "--no-such-option"]
        calls[command, "a path"] = [command, *nowhere]
    calls["study", "a result"] = ["study", "nothere/study.json"]
    program = (
        "import contextlib, io, json, sys\nfrom moebed.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n        code = main(arguments)\n"
        "    print(json.dumps([code, 'torch' in sys.modules, said.getvalue()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(calls.values()))],
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    found = dict(zip(calls, map(json.loads, done.stdout.splitlines()), strict=True))
    for (command, what), (code, loaded, said) in found.items():
        assert (code, loaded) == (2, False), (command, what, said)
        (line,) = said.splitlines()
        wanted = "no[-_]such[-_]option" if what == "an option" else f"nothere|{RECIPE}"
        assert re.match(f"moebed: error: .*({wanted})", line), (command, line)


def test_the_last_folder_that_is_named_holds(tmp_path):
    (tmp_path / "file").write_text("")
    no, yes = str(tmp_path / "file" / "run"), str(tmp_path / "run")
    own = tmp_path / "own.yaml"
    own.write_text(f"trainer: {{default_root_dir: {no}}}")
    option = "--trainer.default_root_dir"
    look_first("fit", ["--config", str(own), option, yes])
    look_first("validate", ["--config", str(own), "--ckpt_path", "last"])
    look_first("fit", ["--config", "{trainer: {max_steps: 3}}", option, no, "--print_plan"])
    look_first("fit", ["--config", str(own), "--trainer", f"{{default_root_dir: {yes}}}"])
    look_first("fit", ["--config", RECIPE, "--ckpt_path", "nothere.ckpt", "--print_plan"])
    for arguments in (["--config", RECIPE, "--config", str(own)], [option, no], [option, yes, f"{option}={no}"]):
        with pytest.raises(UserError, match="cannot be written"):
            look_first("fit", arguments)


def test_where_a_command_cannot_begin_is_said_at_once(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    there = ["--config", RECIPE, "--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises(UserError, match="already holds a run; continue it with --ckpt_path last"):
        look_first("fit", there)
    for more in (["--ckpt_path", "last"], ["--ckpt_path=last"], ["--print_config"], ["--print_plan=json"]):
        look_first("fit", [*there, *more])
    with pytest.raises(UserError, match="validate needs a checkpoint: add --ckpt_path last"):
        look_first("validate", there)


@pytest.mark.parametrize("null", ["null", "Null", "NULL", "~"])
def test_null_is_none_as_the_parser_has_it(tmp_path, null):
    """Of a checkpoint: a new run. Of the folder: none to write into."""
    (tmp_path / "config.yaml").write_text("{}")
    own = tmp_path / "own.yaml"
    own.write_text(f"trainer: {{default_root_dir: {null}}}\nckpt_path: {null}")
    with pytest.raises(UserError, match="already holds a run"):
        look_first("fit", ["--config", str(own), FOLDER, str(tmp_path), CHECKPOINT, null])
    with pytest.raises(UserError, match="validate needs a checkpoint"):
        look_first("validate", ["--config", RECIPE, CHECKPOINT, null])
    for arguments in (["--config", str(own)], ["--config", RECIPE, FOLDER, null], [f"{FOLDER}=", f"{CHECKPOINT}=last"]):
        with pytest.raises(UserError, match=r"trainer.default_root_dir is (null|''); give the run a folder"):
            look_first("fit", arguments)


def test_settings_in_place_of_a_recipe_are_looked_at_as_one(tmp_path):
    """They hold from there on, whatever the recipe before them says."""
    run, new = tmp_path / "run", tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    (tmp_path / "own.yaml").write_text(f"trainer: {{default_root_dir: {run}}}")
    own = ["--config", str(tmp_path / "own.yaml")]
    look_first("fit", [*own, "--config", f"trainer: {{default_root_dir: {new}}}"])
    with pytest.raises(UserError, match="already holds a run"):
        look_first("fit", ["--config", f"trainer: {{default_root_dir: {run}}}"])
    with pytest.raises(ConfigError, match="unknown key 'trainr' in the config; did you mean 'trainer'"):
        look_first("fit", [*own, "--config", "trainr: {max_steps: 4}"])
    with pytest.raises(ConfigError, match="is no YAML"):
        look_first("fit", [*own, "--config={trainer: ["])


def test_of_a_models_settings_the_last_word_counts():
    """A recipe for a router of one's own, trained with another one: no plug-in is needed."""
    own = ["--config", "model: {config: {router: mine, num_experts: 4}}"]
    look_first("fit", [*own, "--model.config.router", "softmax_topk"])
    look_first("fit", [*own, "--config", "model: {config: {router: softmax_topk}}"])
    look_first("fit", [*own, "--model.config", "other.yaml"])
    with pytest.raises(ConfigError, match="router is 'mine'; choose one of"):
        look_first("fit", [*own, "--model.config.num_experts", "8"])


def test_a_run_without_a_folder_is_refused_where_the_parser_alone_knows():
    given = Namespace(trainer=Namespace(default_root_dir=None), checkpoint=Namespace(dirpath=None), ckpt_path=None)
    with pytest.raises(UserError, match=r"trainer\.default_root_dir is null; give the run a folder"):
        find_start("fit", given)


def test_text_that_is_not_there_is_said_at_once(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("text")

    def sources(path, more=""):
        return f"[{{name: a, kind: files, path: {path}{more}}}]"

    own = tmp_path / "own.yaml"
    own.write_text(f"data: {{sources: {sources('nothere.txt')}}}")
    nowhere, known = ["--config", str(own)], ["--config", RECIPE, FOLDER, str(tmp_path / "run")]
    for arguments, said in (
        (nowhere, "data source 'a': there is no file nothere.txt"),
        ([*known, SOURCES, sources(tmp_path)], "is a folder; name its files, such as"),
        ([*known, SOURCES, sources(text), *nowhere], "there is no file nothere.txt"),
        ([*nowhere, SOURCES, sources(text, ", weight: -1")], "weight is -1; it must be positive"),
        ([f"{SOURCES}=[{{"], "is no YAML"),
    ):
        with pytest.raises(UserError, match=said):
            look_first("fit", arguments)
    for arguments in (
        [*nowhere, SOURCES, sources(text)],
        [*nowhere, SOURCES, "null"],
        [*nowhere, "--data", "{}"],
        [*nowhere, f"{SOURCES}+", "{name: b}"],
        [*nowhere, "--print_plan"],
        [SOURCES, sources(text, ", weight: heavy")],  # of another type, or unknown: the parser says it with its key
        [SOURCES, sources("nothere.txt", ", pth: y")],
        [SOURCES, "x.txt"],
    ):
        look_first("fit", arguments)


def test_where_lm_eval_is_missing_is_said_in_the_same_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    study = tmp_path / "own.yaml"
    content = read_yaml(Path(STUDY)) | {"base": str(Path(RECIPE).resolve()), "tasks": {"tasks": ["moebed_recall"]}}
    study.write_text(json.dumps(content))
    tasks = ["tasks", "recipes", "--tasks", "moebed_recall", "--out", str(tmp_path / "new")]
    for arguments, what in ((tasks, "moebed tasks"), (["study", str(study)], "study own.yaml, which has tasks,")):
        assert main(arguments) == 2
        said = f"moebed: error: {what} needs lm-eval; pip install -e '.[tasks]' where moebed was cloned\n"
        assert capsys.readouterr().err == said


def test_a_folder_of_runs_is_not_reported_as_one(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_summary.json").write_text("{}")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "both.html")]) == 2
    assert f"give them: {tmp_path / 'one'} {tmp_path / 'two'}" in capsys.readouterr().err


def test_what_is_near_is_said(capsys, tmp_path):
    for arguments, words in (
        (["fit", "--config", "recipes/tiny_mixtrl.yaml"], "did you mean 'recipes/tiny_mixtral.yaml'?"),
        (["fit", "--config", "recipes"], "it is a folder); give a file in it, such as recipes/demo.yaml"),
        (["study", "recipes/studies/router_tiny.yaml", "--job", "2"], "did you mean '--jobs'?"),
        (["upcycle", "dense", "--method", "drp", "--out", "new"], "did you mean 'drop'?"),
        (["law", "runs.csv", "--form", "jont", "--out", "law"], "did you mean 'joint'?"),
        (["study", RECIPE], f"is a recipe of one run, and no study: `moebed fit --config {RECIPE}` trains it"),
        (["fit", "--config", STUDY], f"is a study, and no recipe of one run: `moebed study {STUDY}` runs it"),
        (["size", STUDY], f"is a study, and no recipe of one run: `moebed study {STUDY}` runs it"),
        (["prune", "x", "--keep", "-1/2", "--by", "reap", "--out", "new"], "--keep is '-1/2'"),
        (["probe", RECIPE, "--out", str(tmp_path / "out")], "is a recipe or a config; give the checkpoint itself"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_a_negative_size_is_refused_by_its_option():
    """And is not taken for an option that is unknown, as argparse takes what is no plain number."""
    parser = OneLineParser(prog="moebed")
    parser.add_argument("--memory-budget")
    given = parser.parse_args(["--memory-budget", "-5GiB"]).memory_budget
    with pytest.raises(UserError, match="memory_budget is '-5GiB'; write it such as 8GiB"):
        parse_bytes(given)


def test_the_version_is_said_without_pytorch():
    program = "import sys, moebed.cli\ntry: moebed.cli.main(['--version'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0
    line, loaded = done.stdout.splitlines()
    assert line.startswith("moebed ")
    assert ", torch " in line
    assert ", Python 3." in line
    assert loaded == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipes/demo.yaml"], "'recipes/demo.yaml' belongs to no option; a recipe is given as --config recipes/"),
        (["--confg", "recipes/demo.yaml"], "unknown key 'confg' in the config; did you mean 'config'"),
        (["--modle.config.num_experts=4"], "did you mean 'model.config.num_experts'"),
        (["--config", "{yaml}"], "unknown key 'trainr' in the config; did you mean 'trainer'"),
    ],
)
def test_what_no_key_begins_with_needs_no_pytorch(tmp_path, arguments, said):
    (tmp_path / "mine.yaml").write_text("trainr: {max_steps: 4}\n")
    with pytest.raises(ConfigError, match=said):
        look_first("fit", [one.format(yaml=tmp_path / "mine.yaml") for one in arguments])


def test_the_words_that_keys_begin_with_are_those_of_the_parsers(monkeypatch):
    from moebed.training import command_line
    from moebed.training.jsonargparse_private import option_names

    known = set()

    def note(parser, *_):
        known.update(name.partition(".")[0] for name in option_names(parser))
        return ConfigError("noted")

    monkeypatch.setattr(command_line, "refusal", note)
    for command in ("fit", "validate", "test", "predict"):
        with pytest.raises(ConfigError, match="noted"):
            command_line.TrainingCLI([command, "--no_such_key", "1"])
    assert known == set(KEYS)
    for recipe in Path("recipes").rglob("*.yaml"):
        if is_run_recipe(content := read_yaml(recipe)):
            assert content.keys() <= known, recipe


@pytest.mark.parametrize(("arguments", "unbuffered"), [([], ""), ([], "1"), (["--help"], "")])
def test_output_that_nobody_reads_ends_a_command_in_silence(arguments, unbuffered):
    """``| head``: with the exit code of a program that SIGPIPE ended, and no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "moebed.cli", *arguments],
        stdout=writing, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_command_without_an_output_ends_as_with_one():
    """As a service may be started: Python has no standard output then."""
    command = [sys.executable, "-m", "moebed.cli", "completion", "nosuchshell"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
