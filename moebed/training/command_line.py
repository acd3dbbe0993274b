"""``moebed fit``, ``validate``, ``test`` and ``predict``: LightningCLI, with a run folder that is never overwritten."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from moebed.arguments import names_recipe, read_recipe
from moebed.checkpoints.families.meaning import beside_experts
from moebed.data.datamodule import TextDataModule
from moebed.errors import ConfigError
from moebed.machine import storage
from moebed.machine.places import require_writable
from moebed.machine.precision import COMPUTED_IN, computed_in
from moebed.machine.progress import say, waiting
from moebed.machine.units import human
from moebed.model.config import ModelConfig
from moebed.model.flops import count_parameters, flops_per_token
from moebed.model.routers import all_options
from moebed.parallel.config import ParallelConfig
from moebed.parallel.strategy import MeshStrategy
from moebed.plan.plan import make_plan, setup_of
from moebed.plan.table import print_plan
from moebed.training.alerts import Alerts
from moebed.training.callbacks import AtomicCheckpointIO, SampleText, TrainingRate, UnbrokenLog
from moebed.training.jsonargparse_private import PresentNames
from moebed.training.lightning_private import end_where_nothing_is_left_to_train
from moebed.training.loggers import EventLog, log_texts
from moebed.training.module import MoEModule
from moebed.training.progress import ProgressBar, ProgressLines
from moebed.training.refusals import refusal, user_error_behind
from moebed.training.saving import RunCheckpoint, require_whole_steps
from moebed.training.schedule import SchedulePlan
from moebed.training.starting import find_start
from moebed.training.trainer import AutoTrainer, PrecisionOfRun, resolve_precision

# What Lightning warns of although it is meant here: batches without loader workers, a run folder that is continued,
# the command line's own arguments, and its own use of a deprecated name.
LIGHTNING_ADVICE = (
    "does not have many workers",
    "exists and is not empty",
    "args parameter is intended to run from within Python",
    "LeafSpec",
    "It is recommended to use `self.log",  # what is logged is a sum over ranks already
    "The `srun` command is available",  # also where one process is meant; what needs it is refused
)
# What it says that says nothing of a run, and what the command says itself.
LIGHTNING_SAYS = ("Tip:", "TPU available: False", "Detected KeyboardInterrupt")

BY_DOMAIN = ("val/loss/", "val/bits_per_byte/", "train/weight/")  # closing numbers, if there are several domains
OWN, AS_PYTHON_DOES = Path(__file__).parents[1], warnings.formatwarning
SUMMARY = "run_summary.json"  # the closing numbers, in the run's folder
OVER_FLOOR = "val/nats_over_floor"  # closing numbers of planted text; with a domain after a slash


class _Parser(PresentNames):
    """Errors become a UserError of one line instead of a usage text; what it has parsed is not checked again."""

    def dump(self, *arguments: Any, **options: Any) -> str:
        """A config as text; to check it once more would take twice as long as to write it."""
        return super().dump(*arguments, **{"skip_validation": True, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise refusal(self, message, ex) from ex


class _RecipeFile(ActionConfigFile):
    """A file is YAML with settings by name; jsonargparse takes what is not for the settings themselves."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the file's settings, or those that stand in the argument itself."""
        if names_recipe(values):
            read_recipe(Path(values))
        super().__call__(parser, cfg, values, option_string)


class RunFolder(SaveConfigCallback):
    """Writes the run's config beside its results once training starts: ``config.yaml``, and where it logs text."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing is written before every check of model and data has passed."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Model and data are whole: write, unless it is a try of a few batches."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            storage.on_first_rank(lambda: self._write(trainer))

    def _write(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        config = self.config.clone()
        config.ckpt_path = None  # where one process began is no part of the run: another may start from its config
        text = self.parser.dump(config, skip_none=False)
        storage.write_text(folder / "config.yaml", text)
        with storage.new_folder(folder / "tokenizer", sole=True) as tokenizer:
            trainer.datamodule.save_tokenizer(tokenizer)  # type: ignore[attr-defined]
        indented = "\n".join("    " + line for line in text.splitlines())
        said = {"run/config": indented, "run/computed_in": computed_in(trainer.precision)}
        log_texts(trainer, "run", said, trainer.global_step)


class TrainingCLI(LightningCLI):
    """LightningCLI for MoEModule and TextDataModule, with moebed's defaults."""

    def __init__(self, args: Sequence[str]) -> None:
        self._command, self.alerts = args[0], Alerts()
        super().__init__(
            MoEModule,
            TextDataModule,
            save_config_callback=RunFolder,
            trainer_class=AutoTrainer,
            seed_everything_default=1234,
            args=list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are one line."""
        parser = _Parser(allow_abbrev=False, **kwargs)  # half a key must not set another
        ModelConfig.__annotations__["router_options"] = all_options()  # those of --plugins as well
        parser.add_argument("-c", "--config", action=_RecipeFile, help="a recipe, or a run's config.yaml")
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is called; the others' parsers are not built."""
        return {self._command: super().subcommands()[self._command]}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Only ``fit`` can be planned."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--print_plan",
                type=Literal["table", "json"] | None,
                nargs="?",
                const="table",
                help="print parameters, memory of a rank, tokens and bytes sent, as a table or as json, and exit",
            )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that every run has, and defaults that suit small runs."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SampleText, "samples")
        parser.add_argument(
            "--parallel",
            type=ParallelConfig | None,
            default=None,
            help="layout over processes: sharded parameters, experts spread over ranks",
        )
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.max_epochs": -1,
                "trainer.check_val_every_n_epoch": None,
                "trainer.gradient_clip_val": 1.0,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": 10,
                "trainer.enable_model_summary": False,
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,
                "checkpoint.every_n_train_steps": 100,
                "checkpoint.enable_version_counter": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Place everything of a run in its folder, and refuse to overwrite another run."""
        config = self.config[self.subcommand]
        wanted = config.pop("print_plan", None)  # no part of the run, so not of its config.yaml
        if wanted is not None:
            config.trainer.precision = resolve_precision(config.trainer, None)[0]
            print_plan(make_plan(setup_of(config, torch.cuda.device_count())), as_json=wanted == "json")
            sys.exit()
        self.start = find_start(str(self.subcommand), config)
        config.ckpt_path = None if self.start.path is None else str(self.start.path)
        config.trainer.precision, said = resolve_precision(config.trainer, config.ckpt_path)
        if said is not None:
            say(said)
        if config.checkpoint.train_time_interval is not None:
            config.checkpoint.every_n_train_steps = None  # its default; ModelCheckpoint takes one of the two
        if self.subcommand == "fit":
            require_writable(Path(config.trainer.default_root_dir), "--trainer.default_root_dir")

    def instantiate_classes(self) -> None:
        """Build model, data and callbacks; what they refuse is shown as they say it."""
        # Ranks that share a model fill in their own parts of it (MoEModule.configure_model).
        shared = self.config[self.subcommand].parallel is not None
        try:
            with torch.device("meta") if shared else nullcontext():
                super().instantiate_classes()
        except ValueError as error:
            raise user_error_behind(error) or ConfigError(str(error)) from error
        self.datamodule.model_vocab_size = self.model.config.vocab_size

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs into the run folder."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") is None:
            kwargs["logger"] = self.subcommand == "fit" and EventLog(config.default_root_dir)
        # First those whose clocks stop before other callbacks begin to work.
        callbacks: list[Callback] = [TrainingRate(), *self._progress(), PrecisionOfRun(), UnbrokenLog(), self.alerts]
        own = config.get("callbacks") or []
        kwargs["callbacks"] = [*callbacks, *(own if isinstance(own, list) else [own])]
        kwargs["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
        kwargs["plugins"] = [AtomicCheckpointIO(), *(config.get("plugins") or [])]
        parallel = self._get(self.config_init, "parallel")
        if parallel is None:
            return super().instantiate_trainer(**kwargs)
        if config.get("strategy") not in (None, "auto"):
            raise ConfigError("parallel and trainer.strategy exclude each other; leave one of them out")
        kwargs["strategy"] = MeshStrategy(parallel)
        with torch.device("cpu"):
            trainer = super().instantiate_trainer(**kwargs)
        parallel.check(trainer.world_size, self._get(self.config_init, "model").config)
        return trainer

    def _progress(self) -> list[Callback]:
        """What shows how far a run is: a bar on a terminal, lines in a log, nothing where it is not wanted."""
        if self._get(self.config_init, "trainer").get("enable_progress_bar") is False:
            return []
        return [ProgressBar()] if sys.stderr.isatty() else [ProgressLines()]

    def before_fit(self) -> None:
        """Say what is about to be trained, once model and data fit each other.

        Lightning opens its loggers before it sets up the data; checked here, nothing is written if it fails.
        """
        shown = self.trainer.is_global_zero and self.config.fit.trainer.enable_progress_bar is not False
        with waiting("preparing text") if shown else nullcontext():
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        self.model.check_data(self.datamodule, self.trainer.world_size)
        self.datamodule.mixing.check(self.datamodule, self.trainer, self.model.config.moe_layers)
        require_whole_steps(self.trainer)
        SchedulePlan.of(self.model.optimizer_config, self.trainer)
        if not self.config.fit.trainer.fast_dev_run:
            done = _finished_at(Path(self.trainer.default_root_dir) / SUMMARY)
            end_where_nothing_is_left_to_train(self.trainer, lambda: self.trainer.global_step not in (0, done))
        config: Any = self.model.config
        total, active = count_parameters(config)
        flops = flops_per_token(config, self.datamodule.sequence_length, training=True)
        say(self.start.said)
        if self.model.init_from is not None and self.start.path is None:
            checkpoint = self.model.initial_checkpoint()
            new = sorted(set(beside_experts(self.model.config, checkpoint.config).values()))
            say(f"weights: those of {checkpoint.name}" + "".join(f"; new, silent at first: {what}" for what in new))
            for note in checkpoint.notes:
                say(f"note: {note}")
        if (micro := self.trainer.accumulate_grad_batches) > 1:
            say(f"a step has {micro} micro-batches; val_check_interval, checkpoints, probes and log count steps")
        say(f"model: {human(total)} parameters, {human(active)} active a token, {human(flops, 'FLOP')} a token forward")

    def closing_numbers(self, path: Path) -> dict[str, Any]:
        """The last numbers of the run, and what they were computed in, kept in ``run_summary.json``.

        Those of a run that was finished stay.
        """
        step = self.trainer.global_step
        if _finished_at(path) == step:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if self.model.last_validated_step != step and self.trainer.limit_val_batches != 0:
            found |= self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)[0]
        wanted = ("train/loss", "train/tokens_per_second", "val/loss", "val/perplexity", "val/bits_per_byte")
        numbers: dict[str, Any] = {"step": step, COMPUTED_IN: computed_in(self.trainer.precision)}
        numbers |= {name: found[name] for name in wanted if name in found}
        numbers |= {name: value for name, value in found.items() if name.startswith(BY_DOMAIN)}
        if not self.trainer.is_global_zero:
            return numbers
        if "val/bits_per_byte" in numbers:
            numbers["gzip -9 bits per byte"] = self.datamodule.gzip_bits_per_byte()["all"]
            numbers["bits per byte over gzip's"] = numbers["val/bits_per_byte"] / numbers["gzip -9 bits per byte"]
        numbers |= self._over_the_floor(numbers)
        numbers |= {"alerts": self.alerts.said} if self.alerts.said else {}
        storage.write_text(path, json.dumps(numbers, indent=2) + "\n")
        return numbers

    def _over_the_floor(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Of planted text: what each domain's loss could be at best, and what it is beyond that, in nats a token."""
        found: dict[str, Any] = {}
        for name, known in self.datamodule.planted().items():
            if "entropy_rate" in known:
                found[f"planted/entropy_rate/{name}"] = known["entropy_rate"]
            end = "" if name == "all" else f"/{name}"
            found[f"planted/floor{end}"] = known["floor"]
            if (loss := numbers.get(f"val/loss{end}")) is not None:
                found[f"{OVER_FLOOR}{end}"] = loss - known["floor"]
        return found

    def before_validate(self) -> None:
        """Say what is looked at."""
        say(self.start.said)

    before_test = before_predict = before_validate

    def after_validate(self) -> None:
        """Compare with gzip."""
        say(f"gzip -9 of the same text: {self.datamodule.gzip_bits_per_byte()['all']:.4f} bits per byte")

    def predict(self, **kwargs: Any) -> None:
        """Write the loss of every token of the test text: ``token_losses.npz``."""
        kwargs["return_predictions"] = True
        batches: Any = self.trainer.predict(**kwargs)
        arrays: dict[str, Any] = {}
        for key in batches[0]:
            arrays[key] = torch.cat([batch[key] for batch in batches]).cpu().numpy()
        rank = "" if self.trainer.world_size == 1 else f"_rank{self.trainer.global_rank}"
        name = f"token_losses{rank}.npz"
        path = Path(self.trainer.default_root_dir) / name
        storage.write_arrays(path, arrays)
        shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
        print(f"{path}: {shapes}", file=sys.stderr, flush=True)  # every rank has a file


def _finished_at(path: Path) -> int | None:
    """The step of a run's closing numbers; None where it has none yet."""
    return json.loads(path.read_text(encoding="utf-8")).get("step") if path.exists() else None


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning and Path(filename).is_relative_to(OWN):
        return f"note: {message}\n"
    return AS_PYTHON_DOES(message, category, filename, lineno, line)


def quiet() -> None:
    """Leave out what Lightning warns of although it is meant, and what else nobody needs to hear from it.

    What moebed itself warns of is a note, a line as all others, without the place in the code that it comes from.
    """
    warnings.formatwarning = _format_warning
    for message in LIGHTNING_ADVICE:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(one in record.getMessage() for one in LIGHTNING_SAYS)
    )
