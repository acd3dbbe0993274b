"""The data of a run as one Lightning data module: sources, tokenizer, cache, loaders, and the gzip baseline."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from moebed.data.corpus import EMBEDDED_DOMAINS
from moebed.data.loader import Batch, PackedLoader, ValidationLoader, collate, window_at
from moebed.data.mixing import MixingConfig, start_weights
from moebed.data.mixing_rules import RULES
from moebed.data.planted_sources import alphabet_of, floors
from moebed.data.sources import Source, SourceConfig
from moebed.data.store import DomainStore, DomainSummary, TokenStream, build_domain, gzip_size, is_validation
from moebed.data.streaming import StreamPacker
from moebed.data.tokenizer import (
    AutoTokenizer,
    BytesTokenizer,
    SymbolsTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_bpe,
)
from moebed.errors import ConfigError, UserError
from moebed.machine.cache import cache_folder, find_or_build, fingerprint

STREAMING_VALIDATION_WINDOWS = 64
_DEFAULT_TOKENIZER = TokenizerConfig()
_SOURCES_OWN = MixingConfig()


class TextDataModule(LightningDataModule):
    """Labelled domains of text, tokenized once, as batches of packed windows (see moebed.data.loader for their shapes).

    Args:
        sources: The domains; if not given, code, prose and math of the corpus that needs no download.
        tokenizer: The tokenizer.
        sequence_length: Tokens of a training sequence (S).
        batch_size: Sequences of a batch in each process (B).
        validation_fraction: Chance of a document to be in the validation split, decided by a hash of its text.
        max_validation_windows: Validate on only the first so many sequences of each domain. All if not given, and 64 of
            a streaming domain.
        seed: Seed of the mixture and of the order of training sequences.
        cache_dir: Where tokenized text is kept; the environment's MOEBED_CACHE or ~/.cache/moebed if not given.
        rows_by_domain: Order the sequences of every global batch by domain, so that each process, or each of the ranks
            that one stands for (model.config.expert_ranks), trains on domains of its own. Which text a step sees stays.
        mixing: Weights of the domains, and how they change while training; the sources' own, and static, if not given.

    Attributes:
        domains: Names of the domains; ``domain`` in a batch is an index into it. Known from the start.
        model_vocab_size: The model's vocabulary size, if set; a tokenizer that is too large for it is then refused
            before any text is tokenized.
        mixing: Changes the weights of the domains while training, or leaves them (see moebed.data.mixing_rules).
    """

    def __init__(
        self,
        sources: list[SourceConfig] | None = None,
        tokenizer: TokenizerConfig = _DEFAULT_TOKENIZER,
        sequence_length: int = 256,
        batch_size: int = 8,
        validation_fraction: float = 0.05,
        max_validation_windows: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        rows_by_domain: bool = False,
        mixing: MixingConfig = _SOURCES_OWN,
    ) -> None:
        super().__init__()
        for name, value in (
            ("sequence_length", sequence_length),
            ("batch_size", batch_size),
            ("max_validation_windows", max_validation_windows),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}; it must be at least 1")
        if not 0 < validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {validation_fraction}; it must be between 0 and 1")
        if seed < 0:
            raise ConfigError(f"data.seed is {seed}; it must not be negative")
        self.sources = list(sources) if sources is not None else [SourceConfig(name) for name in EMBEDDED_DOMAINS]
        self.domains = [source.name for source in self.sources]
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ConfigError(f"data.sources must be one or more domains of different names, not {self.domains}")
        self.tokenizer_config = tokenizer
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.validation_fraction, self.max_validation_windows = validation_fraction, max_validation_windows
        self.cache_dir, self.rows_by_domain = cache_dir, rows_by_domain
        start_weights(self.sources, [1] * len(self.sources), mixing.start)  # refused now, if it must be
        if tokenizer.kind == "symbols":
            alphabet_of(self.sources)
        self.mixing = RULES[mixing.rule](mixing, self.domains)
        self.model_vocab_size: int | None = None
        self._tokenizer: Tokenizer | None = None
        self._stores: list[DomainStore] = []
        self._train_loader: PackedLoader | None = None
        self._resumed: dict[str, Any] | None = None

    @property
    def num_token_domains(self) -> int:
        """Domains that tokens may be of: those of the sources, and of a source within which they switch."""
        within = [source.planted.domains for source in self.sources if source.has_token_domains and source.planted]
        return max([len(self.sources), *within])

    # ---- building and opening ----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Builds whatever the cache lacks; of processes that share a cache folder one builds, and the others wait.

        Lightning calls it in one process of each machine, and ``moebed fit`` in every process before that.
        """
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache, and builds what it lacks if ``prepare_data`` was not called; can be called again.

        Args:
            stage: Not used; all stages use the same data.

        Raises:
            UserError: If a source cannot be read or has too little text, or the cache cannot be written.
        """
        if not self._stores:
            self._open()

    def _open(self) -> None:
        cache = cache_folder(self.cache_dir)
        sources = [Source(config) for config in self.sources]
        self._tokenizer = tokenizer = self._build_tokenizer(sources, cache)
        if self.model_vocab_size is not None:
            self.check_vocabulary(self.model_vocab_size)
        streaming_tokens = (self.max_validation_windows or STREAMING_VALIDATION_WINDOWS) * self.sequence_length
        stores = [build_domain(s, tokenizer, cache, self.validation_fraction, streaming_tokens) for s in sources]
        for store in stores:
            self._require_sequences(store)
        self._stores = stores

    def _require_sequences(self, store: DomainStore) -> None:
        """Raise UserError for a domain one of whose splits has not a sequence's text."""
        splits = {"training": store.train, "validation": store.validation}
        for split, stream in splits.items():
            if stream is None or len(stream) > self.sequence_length:
                continue
            cause = ""
            if sum(len(one.document_starts) for one in splits.values() if one is not None) == 1:
                cause = " as all its text is one document, and a document is in one split (document_separator cuts it)"
            raise UserError(
                f"data source {store.name!r}: {len(stream)} {split} tokens do not fill one sequence of "
                f"{self.sequence_length} + 1{cause}; give more text, a shorter data.sequence_length or another "
                f"data.validation_fraction ({self.validation_fraction})"
            )

    def _build_tokenizer(self, sources: list[Source], cache: Path) -> Tokenizer:
        config = self.tokenizer_config
        if config.kind == "bytes":
            return BytesTokenizer()
        if config.kind == "symbols":
            return SymbolsTokenizer(*alphabet_of(self.sources))
        if config.kind == "auto":
            return AutoTokenizer(str(config.path))
        identity = {
            "bpe": [config.vocab_size, config.train_bytes, self.validation_fraction],
            "sources": [source.identity() for source in sources],
        }

        def build(folder: Path) -> None:
            share = config.train_bytes // len(sources)
            train_bpe(_training_text(sources, share, self.validation_fraction), config.vocab_size).save(folder)

        return load_tokenizer(find_or_build(cache, f"tokenizer-{fingerprint(identity)}", build))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises RuntimeError before ``setup``."""
        if self._tokenizer is None:
            raise RuntimeError("call setup() of the data module first")
        return self._tokenizer

    @property
    def stores(self) -> list[DomainStore]:
        """The domains' stores, in the order of ``domains``; raises RuntimeError before ``setup``."""
        if not self._stores:
            raise RuntimeError("call setup() of the data module first")
        return self._stores

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        # Where ranks share a model, a strategy says here which of them share data.
        if (replicas := self.trainer.distributed_sampler_kwargs) is not None:
            return replicas["rank"], replicas["num_replicas"]
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> PackedLoader:
        """Returns endless training batches.

        They have no epochs of their own: limit a run with ``max_steps``, and validate with an int
        ``val_check_interval`` or an int ``limit_train_batches``.
        """
        rank, world_size = self._rank_and_world_size()
        sizes = [None if store.train is None else len(store.train) for store in self.stores]
        weights = start_weights(self.sources, sizes, self.mixing.config.start)
        rows = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        domains: list[TokenStream | StreamPacker] = [
            StreamPacker(
                Source(config),
                self.tokenizer,
                self.sequence_length,
                self.validation_fraction,
                rows,
                world_size * self.batch_size,
            )
            if store.train is None
            else store.train
            for config, store in zip(self.sources, self.stores, strict=True)
        ]
        folders = [store.folder.name for store in self.stores]
        parts = [folders, weights.round(12).tolist(), self.sequence_length, self.seed]
        parts += [] if self.mixing.config.rule == "static" else [self.mixing.config.rule]
        self._train_loader = PackedLoader(
            domains,
            weights,
            self.sequence_length,
            self.batch_size,
            self.seed,
            rank,
            world_size,
            tracked=self.trainer is not None,
            identity=hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
            rows_by_domain=self.rows_by_domain,
        )
        if self._resumed is not None:
            self._train_loader.load_state_dict(self._resumed)
        self.mixing.attach(self._train_loader)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """How far training has read, and what changes the domains' weights has seen.

        Lightning keeps the loader's own state too, but drops it where an epoch ended.
        """
        state = {} if self._train_loader is None else {"train": self._train_loader.state_dict()}
        return {**state, "mixing": {"rule": self.mixing.config.rule, **self.mixing.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have training go on there."""
        self._resumed = state_dict.get("train")
        mixing = state_dict.get("mixing", {})
        if mixing.get("rule") == self.mixing.config.rule:
            self.mixing.load_state_dict(mixing)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tells the training loader that Lightning takes a batch to train on it.

        Args:
            batch: The batch.
            dataloader_idx: Not used.

        Returns:
            The batch; another in its place, if the domains' weights have changed since it was fetched.
        """
        if self._train_loader is not None and self.trainer is not None and self.trainer.training:
            return self._train_loader.take(batch)
        return batch

    def upcoming(self, count: int) -> list[Batch]:
        """Returns the batches that training takes after the one it has, on this rank, as they are drawn by now.

        Args:
            count: How many.

        Raises:
            UserError: A source streams.
        """
        assert self._train_loader is not None
        return self._train_loader.upcoming(count)

    def val_dataloader(self) -> ValidationLoader:
        """Returns the validation windows of all domains, in order."""
        rank, world_size = self._rank_and_world_size()
        return ValidationLoader(
            [store.validation for store in self.stores],
            self.sequence_length,
            self.batch_size,
            self.tokenizer.eos_id,
            self._max_windows,
            rank,
            world_size,
        )

    def test_dataloader(self) -> ValidationLoader:
        """The same as ``val_dataloader``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ValidationLoader:
        """The same as ``val_dataloader``."""
        return self.val_dataloader()

    @property
    def _max_windows(self) -> list[int | None]:
        streaming = self.max_validation_windows or STREAMING_VALIDATION_WINDOWS
        return [streaming if config.streaming else self.max_validation_windows for config in self.sources]

    def probe_batch(self, num_sequences: int, split: Literal["train", "validation"] = "validation") -> Batch:
        """Returns a fixed batch for probes: whole windows, evenly spread over each domain, the domains in turn.

        Args:
            num_sequences: Rows (B).
            split: Which split; a streaming domain has no training windows to give.

        Returns:
            A batch of ``num_sequences`` rows, the same in every call and on every rank.

        Raises:
            UserError: If all domains together have too few windows.
        """
        streams = [getattr(store, split) for store in self.stores]
        counts = [0 if stream is None else (len(stream) - 1) // self.sequence_length for stream in streams]
        turns = sorted(
            (turn, domain) for domain, count in enumerate(counts) for turn in range(min(count, num_sequences))
        )
        if len(turns) < num_sequences:
            raise UserError(
                f"a probe batch of {num_sequences} sequences was asked for, but the {split} split has only "
                f"{len(turns)} whole sequences of {self.sequence_length} tokens; ask for fewer or give more text"
            )
        turns = turns[:num_sequences]
        taken = [sum(domain == other for _, other in turns) for domain in range(len(streams))]
        windows = [
            # Evenly over the domain, so that as many documents as can be are seen.
            window_at(
                streams[domain],
                domain,
                turn * counts[domain] // taken[domain] * self.sequence_length,
                self.sequence_length,
            )
            for turn, domain in turns
        ]
        return collate(windows, num_sequences, self.sequence_length, self.tokenizer.eos_id)

    # ---- what the rest of a run asks ---------------------------------------------------------------------------------

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks that a model has a row for every id; raises ConfigError if not.

        Args:
            vocab_size: The model's vocabulary size.
        """
        needed = self.tokenizer.vocab_size
        if needed > vocab_size:
            raise ConfigError(
                f"tokenizer has {needed} ids but the model's vocab_size is {vocab_size}: set "
                f"model.config.vocab_size to at least {needed}, or choose a smaller data.tokenizer"
            )

    def save_tokenizer(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder, such as the run's; :func:`load_tokenizer` opens it.

        Args:
            folder: Made if need be.
        """
        self.tokenizer.save(folder)

    def gzip_bits_per_byte(self) -> dict[str, float]:
        """Returns what ``gzip -9`` needs for the validation text, in bits per byte of text.

        It is the baseline of a model's bits per byte, on exactly the bytes that the validation windows predict: with
        ``max_validation_windows`` only the text of those windows, cut at the same byte. Each domain is compressed as
        one file of its documents end to end, so gzip may look back across windows and documents, and does not pay for
        where documents end (the model does, in its loss on EOS tokens). Like the model's, its number for all domains
        is total bits over total bytes.

        Returns:
            Bits per byte of each domain by name, and of all together as ``all``.
        """
        limits = zip(self.stores, self._max_windows, strict=True)
        texts = [store.validation_text(self.sequence_length, limit) for store, limit in limits]
        sizes = [gzip_size(text) for text in texts]
        result = {name: 8 * n / len(text) for name, n, text in zip(self.domains, sizes, texts, strict=True)}
        return result | {"all": 8 * sum(sizes) / sum(map(len, texts))}

    def planted(self) -> dict[str, dict[str, Any]]:
        """Returns what is known of each planted domain, and of all together (see :func:`floors`)."""
        limits = (limit or sys.maxsize for limit in self._max_windows)
        sizes = [
            min(len(store.validation) - 1, limit * self.sequence_length)
            for store, limit in zip(self.stores, limits, strict=True)
        ]
        return floors(self.sources, sizes)

    def summary(self) -> list[DomainSummary]:
        """Returns a row for each domain: its documents, tokens and bytes in each split, and bytes per token."""
        return [store.summary() for store in self.stores]


def _training_text(sources: list[Source], share: int, validation_fraction: float) -> Iterator[str]:
    """Yields training documents of each source in turn, up to ``share`` bytes from each."""
    for source in sources:
        left = share
        for text in source.stored_documents():
            if left <= 0:
                break
            if not is_validation(text, validation_fraction):
                left -= len(text.encode())
                yield text
