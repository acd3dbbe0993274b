"""Text to look at a pretrained checkpoint with: files, presets of the paper, ids, and labelled domains.

B sequences, S positions, T valid tokens.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moebed.checkpoints.gguf.finding import gguf_at
from moebed.checkpoints.run import is_run, run_folder
from moebed.checkpoints.text_options import PAPER_LONG, TextOptions, domain_file, text_file
from moebed.data.file_formats import not_utf8
from moebed.errors import UserError
from moebed.machine.storage import reason_of
from moebed.views.layer import ProbeText

PAPER_SHORT = "As an open source alternative to"
PAPER_LONG_LINES = 10
# About 64 tokens, the length of the paper's input for the chosen experts.
PAPER_CHOSEN = (
    "A router scores every expert for each token of a sentence and sends the token to the few that score highest. What "
    "the chosen experts compute is weighted, added up and passed to the next layer, where another router decides anew. "
    "Whether the experts that were left out would have said something else is what this text is here to show."
)
_WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")


class TextLimits(Protocol):
    """What a model says of the texts that fit it, such as a ModelConfig."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of a sequence at most."""
        ...


class CheckpointTokenizer:
    """The tokenizer that lies beside a checkpoint, or in it; code of its own is never run.

    ``encode`` has the special tokens that the tokenizer adds, ``encode_plain`` none; ``prefix_id``, where there is one,
    stands before the first token of a text.

    Args:
        checkpoint: Folder, hub snapshot, GGUF file, or ``.ckpt`` file of a run, whose folder holds the tokenizer.

    Raises:
        UserError: There is none, or it cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        if is_run(checkpoint):
            from moebed.checkpoints.companions import run_tokenizer
            from moebed.data.tokenizer import load_tokenizer

            folder = run_tokenizer(checkpoint)
            if folder is None:
                run = run_folder(checkpoint)
                raise UserError(f"{checkpoint}: {run} has no tokenizer/ of the run; give --input-ids instead of text")
            own = load_tokenizer(folder)
            self.encode: Callable[[str], list[int]] = own.encode
            self.encode_plain = own.encode
            self._says: Callable[[int], str] = own.says
            self.prefix_id: Any = own.eos_id if own.bos_id is None else own.bos_id
            self.decode: Callable[[list[int]], str] = own.decode
            return
        if (file := gguf_at(checkpoint)) is not None:
            from moebed.checkpoints.gguf.tokenizer import GgufTokenizer

            inside = GgufTokenizer(file)
            self.encode, self.decode = inside.encode, inside.decode
            self._says = lambda one: inside.decode([one])
            self.encode_plain, self.prefix_id = inside.encode_plain, inside.prefix_id
            return
        import transformers

        transformers.logging.set_verbosity_error()  # it knows not every model_type, and need not
        warnings.filterwarnings("ignore", module="transformers.*")
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(
                str(checkpoint), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever a missing or damaged file makes of it, it is one line for a person
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"{checkpoint} has no tokenizer that can be read ({type(error).__name__}: {cause}); put its "
                "tokenizer.json there, or give --input-ids instead of text"
            ) from error
        self._take(loaded)

    @classmethod
    def of(cls, loaded: Any) -> CheckpointTokenizer:
        """One of transformers that is in memory."""
        made = cls.__new__(cls)
        made._take(loaded)
        return made

    def _take(self, loaded: Any) -> None:
        self.encode = lambda text: loaded(text)["input_ids"]
        self.encode_plain = lambda text: loaded(text, add_special_tokens=False)["input_ids"]
        self.prefix_id = loaded.eos_token_id if loaded.bos_token_id is None else loaded.bos_token_id
        self.decode = lambda ids: str(loaded.decode(ids, skip_special_tokens=False))
        self._says = lambda one: str(loaded.decode([one], skip_special_tokens=False))

    def says(self, one: int) -> str:
        """What an id says by itself; nothing where it only fills up a head that has more rows than there are tokens."""
        try:
            return self._says(one)
        except (IndexError, KeyError, TypeError, ValueError):  # each kind of tokenizer refuses it in its own way
            return ""

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each id says by itself."""
        known = {number: self.says(number) for number in set(ids)}
        return tuple(known[number] for number in ids)


def read_texts(options: TextOptions, checkpoint: Path, config: TextLimits) -> tuple[ProbeText, list[str]]:
    """The sequences that were asked for, and notes on what was left out.

    Args:
        options: Which text.
        checkpoint: Where the tokenizer lies.
        config: The model, whose vocabulary and positions the text must fit.

    Raises:
        UserError: A file is missing, empty or damaged, there is no tokenizer, or the text does not fit the model.
    """
    reads = bool(options.text or options.domain)
    tokenizer = CheckpointTokenizer(checkpoint) if reads else None
    sequences: list[tuple[Tensor, str, str]] = []  # ids, domain, what an error calls it
    notes: list[str] = []
    for name in options.text:
        assert tokenizer is not None
        for number, text in enumerate(_read_text(name), 1):
            if not text.strip():
                raise UserError(f"--text {name}: it holds no text; give another file")
            ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
            sequences.append((ids, "text", f"--text {name}" + (f", sequence {number}" if number > 1 else "")))
    for name in options.input_ids:
        sequences += [(ids, "text", f"--input-ids {name}") for ids in _read_ids(Path(name))]
    for name in options.domain:
        assert tokenizer is not None
        label, found, note = _read_domain(name, options, tokenizer, config)
        sequences += [(ids, label, f"--domain {label}") for ids in found]
        notes.append(note)
    return put_together(sequences, config, tokenizer or _tokenizer_or_none(checkpoint)), notes


def put_together(
    sequences: Sequence[tuple[Tensor, str, str]], config: TextLimits, tokenizer: CheckpointTokenizer | None
) -> ProbeText:
    """Sequences of ids side by side, padded.

    Args:
        sequences: Ids (S,), the domain, and what an error calls it.
        config: The model, whose vocabulary and positions they must fit.
        tokenizer: Says what each token reads; without one pictures show none.

    Raises:
        UserError: A sequence is empty or does not fit the model.
    """
    for ids, _, what in sequences:
        _require_fits(ids, what, config)
    domains = tuple(dict.fromkeys(domain for _, domain, _ in sequences))
    longest = max(len(ids) for ids, _, _ in sequences)
    padded = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, (ids, _, _) in enumerate(sequences):
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, True
    domain = torch.tensor([domains.index(name) for _, name, _ in sequences])
    if tokenizer is None:
        return ProbeText(padded, mask, domain, domains)
    return ProbeText(padded, mask, domain, domains, tokenizer.texts(padded[mask].tolist()), says=tokenizer.says)


def _require_fits(ids: Tensor, what: str, config: TextLimits) -> None:
    if not len(ids):
        raise UserError(f"{what}: no token comes out of it; give a text with words")
    if len(ids) > config.max_position_embeddings:
        raise UserError(
            f"{what} has {len(ids)} tokens but the model has {config.max_position_embeddings} positions; shorten it "
            "(--domain NAME=FILE reads a file of text in pieces)"
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= config.vocab_size:
        wrong = least if least < 0 else most
        raise UserError(
            f"{what} has token id {wrong} but the model's embedding has {config.vocab_size} rows; the tokenizer does "
            "not belong to this checkpoint"
        )


def _read_text(name: str) -> list[str]:
    """The sequences of a file or of a preset."""
    file = text_file(name)
    if name.startswith(f"{PAPER_LONG}=") or (file is None and name == PAPER_LONG):
        return _paper_long(file)
    if file is None:
        return [PAPER_SHORT if name == "paper-short" else PAPER_CHOSEN]
    return [_decoded(file)]


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, error)) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); give another file") from error


def _paper_long(path: Path | None) -> list[str]:
    """The first ten lines of the WikiText-103 test set that are neither empty nor a heading, a sequence each."""
    if path is None:
        lines = _wikitext_lines()
    elif path.suffix == ".csv":
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        lines = [
            line for row in csv.reader(_decoded(path).splitlines(keepends=True)) for line in "".join(row).split("\n")
        ]
    else:
        lines = _decoded(path).splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("=")]
    if len(wanted) < PAPER_LONG_LINES:
        raise UserError(
            f"paper-long: {path or _WIKITEXT[0]} has {len(wanted)} lines of text, not {PAPER_LONG_LINES}; "
            "give WikiText-103's test set"
        )
    return wanted[:PAPER_LONG_LINES]


def _wikitext_lines() -> list[str]:
    import datasets

    try:
        return list(datasets.load_dataset(*_WIKITEXT, split="test")["text"])
    except Exception as error:  # network, hub, cache: one cause, said in one line
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"--text paper-long: {_WIKITEXT[0]} cannot be loaded ({type(error).__name__}: {cause}); give a local file "
            "with the test set as --text paper-long=FILE"
        ) from error


def _read_ids(path: Path) -> list[Tensor]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--input-ids {path} cannot be read ({reason_of(error)}); give a .npy file of integers"
        ) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim not in (1, 2) or not found.size:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
        raise UserError(f"--input-ids {path} holds {kind}; it must be integers, (S,) or (B, S)")
    return list(torch.from_numpy(np.atleast_2d(found).astype(np.int64)))


def _read_domain(
    given: str, options: TextOptions, tokenizer: CheckpointTokenizer, config: TextLimits
) -> tuple[str, list[Tensor], str]:
    """A domain's name, its sequences, and a note on how much of the file they are."""
    from moebed.data.sources import Source, SourceConfig

    label, file = domain_file(given)
    source = Source(SourceConfig(label, "files", path=str(file), text_field=options.text_field))
    documents = [text for text in source.documents() if text.strip()]
    if not documents:
        raise UserError(f"--domain {given}: {file} holds no text; give another file, or leave the domain out")
    length = min(options.sequence_length, config.max_position_embeddings)
    wanted = min(len(documents), max(1, options.domain_tokens // length))
    taken = [documents[i] for i in np.linspace(0, len(documents) - 1, wanted).round().astype(int)]
    # Characters beyond what could be needed are not tokenized.
    found = [torch.tensor(tokenizer.encode(text[: 16 * length])[:length], dtype=torch.int64) for text in taken]
    found = [ids for ids in found if len(ids)]
    tokens = sum(len(ids) for ids in found)
    return label, found, f"domain {label}: {tokens:,} tokens, the first ones of {wanted} of {len(documents)} documents"


def _tokenizer_or_none(checkpoint: Path) -> CheckpointTokenizer | None:
    """Ids need no tokenizer; with one, pictures show words."""
    try:
        return CheckpointTokenizer(checkpoint)
    except UserError:
        return None
