"""From Python, line by line: a model in memory, probes of it, and results that show themselves in a notebook."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints.hub import find_checkpoint
from moebed.checkpoints.texts import CheckpointTokenizer, TextLimits, put_together
from moebed.errors import ConfigError, UserError, did_you_mean
from moebed.machine.units import human
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters
from moebed.views.layer import ProbeText
from moebed.views.live import walk
from moebed.views.transformers_model import TransformersModel
from probes.contract import Arrays, Headline, ProbeResult
from probes.registry import PROBES, Settings, make_probes
from probes.running.choosing import probes_for, probes_that_fit
from probes.running.driver import needs_of, run_probes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

Text = str | Sequence[str] | Mapping[str, Sequence[str]] | Tensor


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    Args:
        name: Of the checkpoint.
        decoder: The model; a module of PyTorch.
        tokenizer: What lies beside the weights; None where nothing does.
    """

    name: str
    decoder: Decoder
    tokenizer: CheckpointTokenizer | None

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.decoder.config

    def __repr__(self) -> str:
        config, (total, active) = self.config, count_parameters(self.config)
        experts = (
            f"{config.num_experts} experts, {config.num_experts_per_tok} a token" if config.moe_layers else "dense"
        )
        return (
            f"{self.name}: {config.num_hidden_layers} layers, {experts}, {human(total)} parameters, "
            f"{human(active)} active"
        )


class Finding:
    """What one probe found: sentences, numbers, arrays and pictures. In a notebook it shows them.

    Args:
        name: The probe's.
        result: What it found.
    """

    def __init__(self, name: str, result: ProbeResult) -> None:
        self.name, self.question, self.result = name, PROBES[name].question, result

    @property
    def headlines(self) -> dict[str, Headline]:
        """The few numbers that answer the question, with their sentences and intervals."""
        return self.result.headlines

    @property
    def scalars(self) -> dict[str, float]:
        """All numbers, by quantity and layer."""
        return self.result.scalars

    @property
    def arrays(self) -> Arrays:
        """All arrays; the probe's docstring names them."""
        return self.result.arrays

    @property
    def notes(self) -> list[str]:
        """What was left out, and why."""
        return self.result.notes

    @property
    def pictures(self) -> list[str]:
        """Names of the pictures there are."""
        return list(self.result.figures)

    def draw(self, picture: str | None = None) -> Figure:
        """One of the pictures; the first one if not named.

        Raises:
            ConfigError: There is none of that name, or none at all.
        """
        if not self.pictures:
            raise ConfigError(f"{self.name} drew nothing: {'; '.join(self.notes) or 'it has no pictures'}")
        chosen = picture or self.pictures[0]
        if chosen not in self.result.figures:
            known = f"there are {', '.join(self.pictures)}"
            raise ConfigError(f"{self.name} has no picture {chosen!r}; {did_you_mean(chosen, self.pictures, known)}")
        return self.result.figures[chosen]()

    def __repr__(self) -> str:
        said = [headline.sentence for headline in self.headlines.values()] or self.notes or ["no answer"]
        return "\n".join([f"{self.name}: {self.question}", *(f"  {sentence}" for sentence in said)])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from probes.figures.drawing import to_png

        parts = [f"<h4>{html.escape(self.question)}</h4>"]
        for headline in self.headlines.values():
            low_high = "" if headline.interval is None else " [{:.3g}, {:.3g}]".format(*headline.interval)
            parts.append(f"<p>{html.escape(headline.sentence)}{low_high}</p>")
        parts += [f"<p><em>{html.escape(note)}</em></p>" for note in self.notes]
        for name, build in self.result.figures.items():
            picture = base64.b64encode(to_png(build())).decode()
            parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{picture}">')
        return "\n".join(parts)


class Findings(Mapping[str, Finding]):
    """What each probe found, by its name.

    Args:
        results: By probe.
        notes: What a person should know of the model, and of probes that were left out.
    """

    def __init__(self, results: Mapping[str, ProbeResult], notes: Sequence[str] = ()) -> None:
        self.notes = list(notes)
        self._found = {name: Finding(name, result) for name, result in results.items()}

    def __getitem__(self, name: str) -> Finding:
        if name not in self._found:
            hint = did_you_mean(name, self._found, f"there are {', '.join(self._found)}")
            raise KeyError(f"{name} was not probed; {hint}")
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return "\n".join([*map(repr, self._found.values()), *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """What a notebook shows: the sentences; pictures are each finding's own."""
        rows = [
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(headline.sentence)}</td></tr>"
            for name, found in self.items()
            for headline in found.headlines.values()
        ]
        return f"<table>{''.join(rows)}</table>"


def load(checkpoint: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """Read a checkpoint into memory whole; ``moebed probe`` reads one of any size a layer at a time.

    Args:
        checkpoint: A folder, a ``.ckpt`` file of a run, or an id on the Hugging Face hub.
        dtype: Of the weights.
        device: Where to.

    Raises:
        UserError: It is missing, damaged, or of a family that is not known.
    """
    path = find_checkpoint(str(checkpoint))
    decoder = load_decoder(Checkpoint.open(path), dtype).to(device).eval()
    try:
        tokenizer = CheckpointTokenizer(path)
    except UserError:
        tokenizer = None
    return LoadedModel(str(checkpoint), decoder, tokenizer)


def probe(
    model: LoadedModel | Decoder | PreTrainedModel,
    text: Text | None = None,
    probes: Sequence[str] | None = None,
    options: Settings | None = None,
    tokenizer: Any = None,
) -> Findings:
    """Probe a model in memory.

    Args:
        model: What :func:`load` gave, a decoder, or a model of transformers, of any class whose experts go through
            transformers' experts interface.
        text: A text, several, several by domain, or token ids (B, S); without any, weights alone are looked at.
        probes: Names; all that the inputs allow if not given.
        options: Settings of probes, by the probe's name.
        tokenizer: One of transformers, for text; if not given, that of the checkpoint that the model was read from.

    Raises:
        ConfigError: A probe is unknown, needs text, or needs what the model does not show.
        UserError: The text does not fit the model, or there is no tokenizer for it.
    """
    reads = CheckpointTokenizer.of(tokenizer) if tokenizer is not None else None
    if isinstance(model, (LoadedModel, Decoder)):
        decoder = model if isinstance(model, Decoder) else model.decoder
        reads = reads or (None if isinstance(model, Decoder) else model.tokenizer)
        given = None if text is None else _read(text, decoder.config, reads)
        chosen = make_probes(probes_for(probes, given is not None), options)
        return Findings(run_probes(walk(decoder, given, needs_of(chosen)), chosen))
    seen = TransformersModel(model)
    given = None if text is None else _read(text, seen, reads or _tokenizer_of(model, text))
    names, left_out = probes_that_fit(probes, seen.offers, seen.name, given is not None)
    chosen = make_probes(names, options)
    found = run_probes(seen.views(given, needs_of(chosen)), chosen)
    return Findings(found, [*seen.notes, *left_out])


def _tokenizer_of(model: PreTrainedModel, text: Text) -> CheckpointTokenizer | None:
    """What lies beside the checkpoint that a model was read from, where that is a folder here and text asks for it."""
    folder = Path(model.name_or_path or "")
    if isinstance(text, Tensor) or not model.name_or_path or not folder.is_dir():
        return None
    return CheckpointTokenizer(folder)


def _read(text: Text, config: TextLimits, tokenizer: CheckpointTokenizer | None) -> ProbeText:
    if isinstance(text, Tensor):
        rows = text.view(1, -1) if text.ndim == 1 else text
        return put_together([(row.long().cpu(), "text", "a row of ids") for row in rows], config, tokenizer)
    if tokenizer is None:
        raise UserError("the model has no tokenizer; give token ids (B, S) in place of text")
    by_domain = text if isinstance(text, Mapping) else {"text": [text] if isinstance(text, str) else text}
    sequences = [
        (torch.tensor(tokenizer.encode(one), dtype=torch.int64), domain, f"text {number} of {domain}")
        for domain, texts in by_domain.items()
        for number, one in enumerate([texts] if isinstance(texts, str) else texts, 1)
    ]
    if not sequences:
        raise UserError("there is no text to probe with; give at least one")
    return put_together(sequences, config, tokenizer)
