"""What has no public name in Lightning and jsonargparse is still there, and is reached in one file of each."""

import ast
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from moebed.training.jsonargparse_private import PresentNames, option_names
from moebed.training.lightning_private import (
    check_validation,
    consider_saved,
    forget_step_values,
    rank_before_processes,
    saves_by_clock,
    validates_by_clock,
    validation_follows,
)

ROOT = Path(__file__).resolve().parents[2]
# Names without an underscore in front would be another's: these are all private to Lightning, jsonargparse or argparse.
PRIVATE = {
    "_PRECISION_INPUT", "_actions", "_data_fetcher", "_get_rank", "_load_config_parser_mode", "_name_parser_map",
    "_parser", "_results", "_should_accumulate", "_should_check_val_fx", "_subcommands_action",
    "_val_check_time_interval",
}  # fmt: skip


@pytest.fixture
def trainer():
    return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", max_steps=1)


def test_lightnings_loop_is_asked_and_answered_as_before(trainer, monkeypatch):
    loop = trainer.fit_loop.epoch_loop
    for name in ("_should_check_val_fx", "_should_accumulate"):
        assert callable(getattr(loop, name))
    assert "_data_fetcher" in vars(trainer.fit_loop)
    assert "_results" in vars(loop)
    assert not validation_follows(trainer)
    forget_step_values(trainer)
    asked = []
    monkeypatch.setattr(loop, "_should_check_val_fx", lambda fetcher: fetcher == "due")
    monkeypatch.setattr(loop, "_should_accumulate", lambda: True)
    check_validation(trainer, lambda is_due, is_amid: bool(asked.append((is_due, is_amid))))
    assert not loop._should_check_val_fx("due")
    assert not loop._should_check_val_fx("not due")
    assert asked == [(True, True), (False, True)]


def test_lightnings_callback_and_trainer_keep_their_marks(trainer, monkeypatch):
    callback = ModelCheckpoint()
    assert callback._last_global_step_saved == 0
    consider_saved(callback, 7)
    assert callback._last_global_step_saved == 7
    assert not saves_by_clock(callback)
    assert "_val_check_time_interval" in vars(
        Trainer(logger=False, accelerator="cpu", val_check_interval="00:01:00:00")
    )
    assert not validates_by_clock(trainer)
    monkeypatch.setenv("RANK", "3")
    assert rank_before_processes() == 3


def test_jsonargparse_keeps_its_own(monkeypatch):
    parser = PresentNames()
    parser.add_argument("--width", type=int)
    assert "width" in option_names(parser)
    assert callable(super(PresentNames, parser)._load_config_parser_mode)
    top, sub = PresentNames(), PresentNames()
    sub.add_argument("--depth", type=int)
    top.add_subcommands().add_subcommand("fit", sub)
    assert "depth" in option_names(top)
    assert callable(LightningCLI._parser)


def test_they_are_reached_nowhere_else():
    found = set()
    for package in ("moebed", "probes"):
        for path in (ROOT / package).rglob("*.py"):
            if path.stem in ("lightning_private", "jsonargparse_private"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_own = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
                names = [node.attr] if isinstance(node, ast.Attribute) and not is_own else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
                found |= {f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names if name in PRIVATE}
    assert not found
