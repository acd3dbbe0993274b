"""Settings of how a run's domains are mixed: their weights at the start, and what the rules that change them read.

D domains.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import Tokenizer, load_tokenizer
from moebed.errors import ConfigError, UserError

_LOSS = "val/loss/"  # and the domain's name, in a run's summary
_DOMAINS = ("cc", "c4", "github", "wiki", "books", "arxiv", "stack")
_OTHER_NAMES = {"commoncrawl": "cc", "wikipedia": "wiki", "book": "books", "stackexchange": "stack"}
# LLaMA's (2302.13971, table 1), and those that Sheared-LLaMA's dynamic loading ended at (2310.06694), which
# LLaMA-MoE's released models were trained with (2406.16554).
PRESETS = {
    "llama": dict(zip(_DOMAINS, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), strict=True)),
    "sheared": dict(zip(_DOMAINS, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), strict=True)),
}


@dataclass
class MixingConfig:
    """Weights of the domains, and how they change. A rule sets w to (1 − c) · softmax(ln w + η · g) + c / D.

    Args:
        start: Weights at the start: those of the sources (sources), the same of every domain (uniform), or published
            ones of the domains cc, c4, github, wiki, books, arxiv and stack, or of those that the run has: LLaMA's
            (llama), or Sheared-LLaMA's (sheared).
        rule: static, weights stay; excess_loss, g is how far a domain's validation loss lies above ``reference``,
            after every validation (LLaMA-MoE 2406.16554, Sheared-LLaMA 2310.06694); gate_load, g is the mean L2
            distance of the domain's shares of the last MoE layer's experts to the other domains', in the training text
            since the weights changed last (2406.11256).
        step_size: η; 1 of excess_loss and 10 of gate_load, if not given.
        smoothing: c; 1e-4 of excess_loss and .05 of gate_load, if not given. 0 mixes nothing in.
        clip: excess_loss alone: a loss below the reference counts as one at it. LLaMA-MoE's code calls clip with
            smoothing 0 ``sheared_llama_paper``, and its default, no clip and 1e-4, ``sheared_llama``.
        reference: excess_loss alone: the loss to compare with, in nats a token, by domain; or a run of the dense
            parent on the same domains and tokenizer, its folder or its run_summary.json.
        every_n_steps: gate_load alone: optimizer steps between two changes, 100 if not given; more, where a domain had
            no text in them.
    """

    start: Literal["sources", "uniform", "llama", "sheared"] = "sources"
    rule: Literal["static", "excess_loss", "gate_load"] = "static"
    step_size: float | None = None
    smoothing: float | None = None
    clip: bool = False
    reference: dict[str, float] | str | None = None
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without the sources; raises ConfigError."""
        readers: dict[str, tuple[str, ...]] = {
            "step_size": ("excess_loss", "gate_load"),
            "smoothing": ("excess_loss", "gate_load"),
        }
        readers |= {"clip": ("excess_loss",), "reference": ("excess_loss",), "every_n_steps": ("gate_load",)}
        for name, rules in readers.items():
            value = getattr(self, name)
            if value is not None and value is not False and self.rule not in rules:
                raise ConfigError(
                    f"data.mixing.{name} does nothing with rule {self.rule}; it is for {', '.join(rules)}"
                )
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ConfigError(f"data.mixing.step_size is {self.step_size}; it must be positive and finite")
        if self.smoothing is not None and not 0 <= self.smoothing < 1:
            raise ConfigError(f"data.mixing.smoothing is {self.smoothing}; it must be at least 0 and below 1")
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ConfigError(f"data.mixing.every_n_steps is {self.every_n_steps}; it must be at least 1")
        if self.rule == "excess_loss" and self.reference is None:
            raise ConfigError(
                "data.mixing.rule excess_loss needs data.mixing.reference: a loss for each domain, or the run of the "
                "dense parent"
            )


def start_weights(
    configs: Sequence[SourceConfig], train_tokens: Sequence[int | None], start: str = "sources"
) -> np.ndarray:
    """Returns each domain's chance to give the first samples, and all others if nothing changes it.

    Args:
        configs: The sources.
        train_tokens: Training tokens of each domain, None where it is streaming.
        start: As in :class:`MixingConfig`.

    Returns:
        Probabilities ``(D,)``. Of the sources' own: with no weight given and every domain finite, in proportion to
        ``train_tokens``; otherwise in proportion to the weights, a missing one being 1.

    Raises:
        ConfigError: The weights are given twice, or there are none of a domain.
    """
    weighted = [config.name for config in configs if config.weight is not None]
    if start != "sources" and weighted:
        raise ConfigError(
            f"data.mixing.start {start} and the weight of data source {weighted[0]!r} exclude each other; leave one out"
        )
    sizes = [size for size in train_tokens if size is not None]
    if start == "uniform":
        weights = np.ones(len(configs))
    elif start != "sources":
        weights = np.array([_published(start, config.name) for config in configs])
    elif len(sizes) == len(configs) and not weighted:
        weights = np.array(sizes, dtype=np.float64)
    else:
        weights = np.array([1.0 if config.weight is None else config.weight for config in configs], dtype=np.float64)
    return weights / weights.sum()


def _published(start: str, domain: str) -> float:
    name = _OTHER_NAMES.get(domain.lower(), domain.lower())
    if name not in PRESETS[start]:
        raise ConfigError(
            f"data.mixing.start {start} has no weight for the domain {domain!r}; it has {', '.join(_DOMAINS)}"
        )
    return PRESETS[start][name]


def reference_losses(given: Mapping[str, float] | str, domains: Sequence[str]) -> np.ndarray:
    """Returns the reference loss of each domain ``(D,)``, in nats a token.

    Args:
        given: By domain; or a run's folder or its ``run_summary.json``.
        domains: Names of the domains.

    Raises:
        UserError: There is no such run.
        ConfigError: A domain has none, or none that is finite.
    """
    where, losses = "data.mixing.reference", given
    if isinstance(losses, str):
        path = _summary(losses)
        try:
            numbers = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where}: cannot read {path} ({error}); give a loss for each domain, or the folder of a run that ended"
            ) from error
        where += f": {path}"
        losses = {name.removeprefix(_LOSS): value for name, value in numbers.items() if name.startswith(_LOSS)}
    for name in domains:
        if not isinstance(loss := losses.get(name), int | float) or not np.isfinite(loss):
            raise ConfigError(f"{where} has no finite loss for the domain {name!r}; it needs one for each of the run's")
    return np.array([losses[name] for name in domains], dtype=np.float64)


def _summary(run: str) -> Path:
    return Path(run) / "run_summary.json" if Path(run).is_dir() else Path(run)


def require_same_tokens(run: str, tokenizer: Tokenizer, text: str) -> None:
    """Checks that a reference run's losses are of the same tokens.

    Args:
        run: Its folder or its ``run_summary.json``; without a tokenizer beside it, nothing is checked.
        tokenizer: This run's.
        text: What both are tried on.

    Raises:
        ConfigError: They are not.
    """
    folder = _summary(run).parent / "tokenizer"
    if not folder.is_dir():
        return
    theirs, ours = (found.encode_documents([text])[0][0] for found in (load_tokenizer(folder), tokenizer))
    if not np.array_equal(theirs, ours):
        raise ConfigError(
            f"data.mixing.reference: the run in {folder.parent} has another tokenizer, and nats a token cannot be "
            f"compared; set data.tokenizer to kind auto, path {folder}"
        )
