"""Tasks over a model, one after another; what is finished is kept, and a second run goes on from there."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints.hub import find_checkpoint
from moebed.checkpoints.texts import CheckpointTokenizer
from moebed.data.sources import Source, SourceConfig
from moebed.errors import ConfigError, UserError, did_you_mean
from moebed.extras import INSTALL_LM_EVAL
from moebed.machine import provenance, storage
from moebed.machine.progress import say
from moebed.tasks.options import TaskOptions

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from moebed.tasks.adapter import DecoderLM

FILES = Path(__file__).parent / "files"
SEED = 1234
_COUNTS = ("sample_len", "sample_count")  # what lm-eval puts beside the metrics


def run_tasks(options: TaskOptions) -> dict[str, dict[str, Any]]:
    """Evaluate, and keep each task as it ends: its numbers in ``tasks/NAME.json``, its text in ``tasks/NAME.jsonl``.

    Returns:
        By task, its numbers by name (``acc``, ``acc_stderr`` and so on) and ``items``, how many there were.

    Raises:
        UserError: lm-eval is not installed, a task is unknown or cannot be loaded, or the checkpoint cannot be read.
    """
    manager = _manager(options)
    path = find_checkpoint(options.checkpoint)
    checkpoint = Checkpoint.open(path)
    made_from = {"moebed": provenance.code(), "model": checkpoint.record(), "limit": options.limit}
    made_from |= {"num_fewshot": options.num_fewshot, "lm_eval": _version()}
    found: dict[str, dict[str, Any]] = {}
    model = None
    for name in [*options.tasks, *options.texts]:
        record = provenance.fingerprint({**made_from, "source": _source(name, options)})
        kept = _kept(options.out, name)
        if kept.get("made_from") == record:
            say(f"{name}: finished already")
            found[name] = kept["results"]
            continue
        model = model or _model(path, checkpoint, options)
        say(f"{name}:")
        found[name] = _evaluated(name, model, manager, options)
        text = "".join(json.dumps({"text": said}, ensure_ascii=False) + "\n" for said in model.texts.get(name, ()))
        storage.write_text(_place(options.out, name, "jsonl"), text)
        content = {"made_from": record, "results": found[name]}
        storage.write_text(_place(options.out, name, "json"), json.dumps(content, indent=1) + "\n")
    return found


def texts_of(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """By task, the file with the text of its requests, of those that had any."""
    files = {name: _place(out, name, "jsonl") for name in names}
    return {name: file for name, file in files.items() if file.exists() and file.stat().st_size}


def _model(path: Path, checkpoint: Checkpoint, options: TaskOptions) -> DecoderLM:
    from moebed.tasks.adapter import DecoderLM

    tokenizer = CheckpointTokenizer(path)
    if tokenizer.prefix_id is None:
        raise UserError(
            f"{options.checkpoint}: its tokenizer has no token that begins or ends a text, which lm-eval puts first; "
            "give a checkpoint with one"
        )
    return DecoderLM(load_decoder(checkpoint).to(options.device), tokenizer, options.batch_tokens)


def _evaluated(name: str, model: DecoderLM, manager: TaskManager, options: TaskOptions) -> dict[str, Any]:
    import lm_eval
    from lm_eval import evaluator

    # It asks git for the commit of whatever folder it was called in, which says "fatal" aloud where that is none.
    setattr(evaluator, "get_git_commit_hash", lambda: None)  # noqa: B010
    task = _text_task(name, options.texts[name]) if name in options.texts else name
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=[task],
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    except UserError:
        raise
    except Exception as error:  # a task is a file of anyone's, and its data may lie on a hub: one line for a person
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"task {name} cannot be run ({type(error).__name__}: {cause})") from error
    assert found is not None
    numbers = {key.removesuffix(",none").replace(",", "_"): value for key, value in found["results"][name].items()}
    results = {key: float(value) for key, value in numbers.items() if key not in _COUNTS and _is_number(value)}
    return {**results, "items": found["n-samples"][name]["effective"]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text_task(name: str, file: Path) -> dict[str, Any]:
    """The perplexity of a file's documents, as lm-eval describes a task."""
    from datasets import Dataset

    documents = [{"text": text} for text in Source(SourceConfig(name, "files", path=str(file))).documents() if text]
    if not documents:
        raise UserError(f"--text {name}={file}: it holds no text; give another file")
    return {
        "task": name,
        "custom_dataset": lambda **metadata: {"test": Dataset.from_list(documents)},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": key} for key in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }


def _manager(options: TaskOptions) -> TaskManager:
    """The tasks there are: our own and ``include``'s, and lm-eval's thousands only where one of them is asked for."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"moebed tasks needs lm-eval; {INSTALL_LM_EVAL} ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(FILES), *([str(options.include)] if options.include else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)
    for name in options.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(f"--tasks {name}: {did_you_mean(name, manager.all_tasks, 'lm-eval has no such task')}")
        if name not in manager.all_subtasks:
            raise ConfigError(f"--tasks {name} is a group of tasks; name those of it that are wanted")
    return manager


def _source(name: str, options: TaskOptions) -> Any:
    """What decides a task's items, as far as it is here: the bytes of a text, moebed's own code, or the name."""
    if name not in options.texts:
        return [name, str(options.include)]
    return [name, provenance.fingerprint(options.texts[name].read_text(encoding="utf-8", errors="replace"))]


def _kept(out: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(_place(out, name, "json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing yet, or nothing that can be read
        return {}
    return found if isinstance(found, dict) else {}


def _place(out: Path, name: str, ending: str) -> Path:
    return out / "tasks" / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', name)}.{ending}"


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
