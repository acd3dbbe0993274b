"""What a checkpoint is to be evaluated on, and whether it is there; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moebed.data.file_formats import require_known
from moebed.errors import ConfigError, UserError
from moebed.machine.places import require_file


@dataclass(frozen=True)
class TaskOptions:
    """What to evaluate a checkpoint on.

    Args:
        checkpoint: Folder of a checkpoint, or a ``.ckpt`` file of a run.
        out: Folder of the results.
        tasks: Names of lm-eval's tasks, those of ``include`` and of ``moebed/tasks/files`` among them.
        texts: Name -> file whose perplexity is a task as well.
        include: Folder with task files of one's own.
        limit: Items of each task at most.
        num_fewshot: Examples before each item; as each task says if not given.
        batch_tokens: Of one forward pass, padding included.
        device: Where to compute.
    """

    checkpoint: str
    out: Path
    tasks: Sequence[str] = ()
    texts: Mapping[str, Path] = field(default_factory=dict)
    include: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_tokens: int = 4096
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be evaluated, UserError for a file that is not there."""
        if not self.tasks and not self.texts:
            raise ConfigError("moebed tasks needs --tasks A,B or --text NAME=FILE")
        for name, value in {"limit": self.limit, "batch-tokens": self.batch_tokens}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in {*self.tasks} & {*self.texts}:
            raise ConfigError(f"--text {name}: a task is called so as well; give the text another name")
        for name, file in self.texts.items():
            require_file(file, f"--text {name}={file}", "give one of text")
            require_known(file, f"--text {name}={file}")
        if self.include is not None and not self.include.is_dir():
            raise UserError(f"--include {self.include} is no folder; give one with task files of lm-eval")
