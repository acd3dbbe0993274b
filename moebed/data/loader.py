"""Batches of packed windows, for training (endless, resumable to the sample) and for validation (complete, in order).

Shapes: B sequences a batch and rank, S tokens a sequence. A batch is a dict:

- ``input_ids (B, S)`` int64;
- ``labels (B, S)`` int64: the token after each, already shifted; -100 where nothing is to be predicted;
- ``label_bytes (B, S)`` int32: bytes of text each label accounts for, 0 for special tokens and for padding;
- ``domain (B,)`` int64: index into the data module's ``domains``; 0 for rows that are padding altogether;
- ``token_domain (B, S)`` int64, only of data in which a sequence may be of several domains: which one each input token
  is of, by the source's own numbers.

A window is S + 1 tokens of one domain's stream, whose documents follow one another; windows lie S tokens apart.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moebed.data.mixture import DomainDraws, WindowOrder
from moebed.data.store import TokenStream
from moebed.data.streaming import StreamPacker, whole_state
from moebed.errors import UserError

IGNORED = -100
_READ_AHEAD = 4  # batches
Batch = dict[str, Tensor]
# Domain, ids, byte lengths, and the domain of each token where the text tells it.
_Window = tuple[int, np.ndarray, np.ndarray, np.ndarray | None]


def collate(windows: Sequence[_Window], rows: int, sequence_length: int, padding_id: int) -> Batch:
    """Makes a batch of windows.

    Args:
        windows: At most ``rows`` of (domain, ids, byte lengths, domains of tokens), each of 2 to S + 1 tokens.
        rows: Rows of the batch (B); those without a window are padding.
        sequence_length: S.
        padding_id: Input id where there is no text.

    Returns:
        The batch.
    """
    tokens = np.full((rows, sequence_length + 1), padding_id, dtype=np.int64)
    labels = np.full((rows, sequence_length), IGNORED, dtype=np.int64)
    label_bytes = np.zeros((rows, sequence_length), dtype=np.int32)
    domain = np.zeros(rows, dtype=np.int64)
    token_domain = np.zeros((rows, sequence_length), dtype=np.int64)
    for row, (index, ids, lengths, token_domains) in enumerate(windows):
        tokens[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = ids[1:]
        label_bytes[row, : len(ids) - 1] = lengths[1:]
        domain[row] = index
        token_domain[row, : len(ids)] = index if token_domains is None else token_domains[:sequence_length]
    arrays = {"input_ids": tokens[:, :-1].copy(), "labels": labels, "label_bytes": label_bytes, "domain": domain}
    if any(token_domains is not None for *_, token_domains in windows):
        arrays["token_domain"] = token_domain
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def domains_of_tokens(batch: Batch) -> Tensor:
    """Returns which domain each input token of a batch is of (B, S): its own, or that of its sequence."""
    return batch.get("token_domain", batch["domain"].unsqueeze(1).expand_as(batch["input_ids"]))


def documents_of_tokens(ids: Tensor, end: int) -> Tensor:
    """Returns which document each token of a batch is of.

    A document that goes on beyond a window, or stands in two of them, is one document in each.

    Args:
        ids: ``(B, S)``.
        end: Id that ends a document, and belongs to it.

    Returns:
        ``(B, S)`` int64: S times the row, and the documents that ended before in the row.
    """
    ends = (ids == end).to(torch.int64)
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return rows * ids.shape[1] + ends.cumsum(dim=1) - ends


def window_at(stream: TokenStream, domain: int, start: int, sequence_length: int) -> _Window:
    """Returns the window that starts at a token; it is shorter at the end of the stream."""
    end = start + sequence_length + 1
    domains = None if stream.token_domains is None else stream.token_domains[start:end]
    return domain, stream.tokens[start:end], stream.token_bytes[start:end], domains


class PackedLoader:
    """Endless training batches of a mixture of domains.

    Sample i is a function of the seed, i and the data alone, and in streaming domains of the rows of the global batch
    too. Batch b of rank r holds samples ``b * B * world_size + r * B`` and on: the global batch is the same whatever
    the number of ranks. Of a streaming domain each rank tokenizes what its own rows are dealt (see
    :mod:`moebed.data.streaming`).

    Its state is a position in the *consumed* samples, and in streaming domains the places of all rows. Lightning
    fetches a batch ahead of training, so a loader that only counted what it gave would skip a batch on resuming:
    with ``tracked``, the owner says through :meth:`take` when training takes a batch.

    The domains' weights may change while it trains (:meth:`change_weights`): from the next batch on that training
    takes. What was fetched ahead is fetched anew, so nothing is trained on that was drawn by weights of before.

    Args:
        domains: For each domain, its training stream or the packer of its streaming source, which is given this
            rank's rows ``r * B`` to ``(r + 1) * B`` of ``B * world_size``.
        weights: Chance of each domain ``(D,)``.
        sequence_length: S.
        batch_size: Sequences of this rank's batch (B).
        seed: Seed.
        rank: This process.
        world_size: Number of processes.
        tracked: Count a batch as consumed only when told.
        identity: What a checkpoint's data should have in common with this; a difference on resuming is warned about.
        rows_by_domain: Order the rows of every global batch by domain, so that ranks see domains of their own; of
            domains that do not stream it holds the same samples either way.
    """

    def __init__(
        self,
        domains: Sequence[TokenStream | StreamPacker],
        weights: np.ndarray,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        tracked: bool = False,
        identity: str = "",
        rows_by_domain: bool = False,
    ) -> None:
        self._draws = DomainDraws(seed, weights)
        self._streams = {index: d for index, d in enumerate(domains) if isinstance(d, TokenStream)}
        self._orders = {i: WindowOrder(seed, i, len(d), sequence_length) for i, d in self._streams.items()}
        self._packers = {index: d for index, d in enumerate(domains) if isinstance(d, StreamPacker)}
        self._sequence_length, self._batch_size = sequence_length, batch_size
        self._rank, self._world_size = rank, world_size
        self._tracked, self._identity = tracked, identity
        self._rows_by_domain = rows_by_domain
        self._position = 0
        self._consumed = self._snapshot()
        self._whole: dict[str, Any] | None = None  # of all ranks, when it was last asked for
        # Of each batch fetched and not consumed: what to take in its place, if that is another, and the place after it.
        self._ahead: deque[tuple[Batch | None, dict[str, Any]]] = deque()
        self._source = self._fetched()
        self._reader: ThreadPoolExecutor | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Goes on after the last batch consumed; what was fetched but not consumed comes again."""
        self._go_back()
        self._ahead.clear()
        while True:
            batch, snapshot = next(self._source)
            self._ahead.append((None, snapshot))
            if not self._tracked:
                self.take(batch)
            yield batch

    def _go_back(self) -> None:
        """What is fetched next comes after the last batch consumed."""
        self._stop_reading()
        if self._consumed["position"] != self._position:
            self._restore(self._consumed)
        self._source = self._fetched()

    def _fetched(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches, each with the place after it; of streaming sources some are read ahead in a thread of its own."""
        if not self._packers:
            while True:
                yield self._fetch()
        self._reader = reader = ThreadPoolExecutor(1, "stream")
        waiting = deque(reader.submit(self._fetch) for _ in range(_READ_AHEAD))
        try:
            while True:
                yield waiting.popleft().result()
                waiting.append(reader.submit(self._fetch))
        finally:
            # Of a loader that nobody has any more this is called by the garbage collector, amid anything: in a thread
            # that begins, and holds the lock that an ending one needs, who waited here would wait for himself.
            reader.shutdown(wait=False, cancel_futures=True)

    def _fetch(self) -> tuple[Batch, dict[str, Any]]:
        return self._next_batch(), self._snapshot()

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def take(self, batch: Batch) -> Batch:
        """Says that training takes the oldest batch not yet consumed.

        Args:
            batch: That batch.

        Returns:
            The batch to train on: another one where weights have changed since it was fetched.
        """
        anew, self._consumed = self._ahead.popleft()
        return batch if anew is None else anew

    @property
    def weights(self) -> np.ndarray:
        """Chance of each domain ``(D,)``, as it is now."""
        return self._draws.weights

    def change_weights(self, weights: np.ndarray) -> None:
        """Gives every domain another chance ``(D,)`` from the next batch that is taken on; all ranks do so together."""
        self._stop_reading()  # which draws by the weights too
        self._draws.change(self._consumed["position"], weights)
        self._consumed, self._whole = {**self._consumed, "draws": self._draws.state_dict()}, None
        self._go_back()
        self._ahead = deque(next(self._source) for _ in range(len(self._ahead)))

    def upcoming(self, count: int) -> list[Batch]:
        """Returns the batches that training takes next, without taking them.

        Args:
            count: How many.

        Raises:
            UserError: There are streaming domains, whose text is read once.
        """
        if self._packers:
            raise UserError(
                "model.config.router_aux_loss_scope window looks at the batches of a step before it trains on them, "
                "which text that is streamed does not allow; use global, or data that do not stream"
            )
        size = self._batch_size * self._world_size
        return [self._batch_at(self._consumed["position"] + number * size) for number in range(count)]

    def _next_batch(self) -> Batch:
        batch = self._batch_at(self._position)
        self._position += self._batch_size * self._world_size
        return batch

    def _batch_at(self, position: int) -> Batch:
        first = self._rank * self._batch_size
        samples = self._samples(position)
        windows = [self._window(row, samples[row]) for row in range(first, first + self._batch_size)]
        return collate(windows, self._batch_size, self._sequence_length, padding_id=0)

    def _samples(self, position: int) -> Sequence[int]:
        """Which sample each row of the global batch that begins there is."""
        samples = range(position, position + self._batch_size * self._world_size)
        return sorted(samples, key=self._draws.domain) if self._rows_by_domain else samples

    def _window(self, row: int, sample: int) -> _Window:
        """The next window of a row of the global batch, which is this sample."""
        domain, index = self._draws.locate(sample)
        if (packer := self._packers.get(domain)) is not None:
            ids, lengths, *token_domains = packer.next_window(row)
            return domain, ids, lengths, token_domains[0] if token_domains else None
        return window_at(self._streams[domain], domain, self._orders[domain].start(index), self._sequence_length)

    def _snapshot(self) -> dict[str, Any]:
        streams = {str(index): packer.state_dict() for index, packer in self._packers.items()}
        snapshot = {"position": self._position, "identity": self._identity, "streams": streams}
        return {**snapshot, "draws": draws} if (draws := self._draws.state_dict()) else snapshot

    def _restore(self, state: dict[str, Any]) -> None:
        self._position = state["position"]
        for index, packer in self._packers.items():
            if (stream := state["streams"].get(str(index))) is not None:
                packer.load_state_dict(stream)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of samples consumed by all ranks, the weights if they changed, and the places of all rows
        in streaming sources.

        Where there are streaming sources, ranks that talk to each other call this together.
        """
        if self._packers and self._world_size > 1 and dist.is_initialized():
            if (
                self._whole is None or self._whole["position"] != self._consumed["position"]
            ):  # asked twice at each checkpoint
                states: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(states, self._consumed)
                self._whole = whole_loader_state(states)
            return self._whole
        return self._consumed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next batch the one after those consumed; the number of ranks and B may differ from before.

        Where their product differs, a streaming source goes on after the document furthest read: what was tokenized
        and not yet used is left out.
        """
        self._stop_reading()
        if state_dict["identity"] == self._identity:
            self._draws.load_state_dict(state_dict.get("draws", {}))
        else:
            rank_zero_warn(
                "the checkpoint was trained on other data (sources, tokenizer, sequence length, weights or seed): "
                f"going on at sample {state_dict['position']} of this data"
            )
        self._restore(state_dict)
        self._source = self._fetched()
        self._ahead.clear()
        self._consumed = self._whole = state_dict


def whole_loader_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the state of a loader with the rows of all ranks, of which ``states`` are."""
    streams = {name: whole_state([state["streams"][name] for state in states]) for name in states[0]["streams"]}
    return states[0] | {"streams": streams}


class ValidationLoader:
    """Every window of each domain's validation stream, in order, once.

    Windows do not overlap in what they predict, so each token of a stream but its opening one is predicted once. All
    ranks get the same number of batches, all of B rows: rows left over are padding, with every label -100.

    Args:
        streams: Validation stream of each domain.
        sequence_length: S.
        batch_size: Sequences of this rank's batch (B).
        padding_id: Input id where there is no text.
        max_windows: For each domain, take only the first so many windows; None takes all.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        sequence_length: int,
        batch_size: int,
        padding_id: int,
        max_windows: Sequence[int | None],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._streams = list(streams)
        self._sequence_length, self._batch_size, self._padding_id = sequence_length, batch_size, padding_id
        self._rank, self._world_size = rank, world_size
        counts = [s.num_windows(sequence_length, limit) for s, limit in zip(streams, max_windows, strict=True)]
        self._windows = [(domain, window) for domain, count in enumerate(counts) for window in range(count)]

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self._windows) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yields this rank's batches."""
        for batch in range(len(self)):
            first = (batch * self._world_size + self._rank) * self._batch_size
            windows = [
                window_at(self._streams[domain], domain, window * self._sequence_length, self._sequence_length)
                for domain, window in self._windows[first : first + self._batch_size]
            ]
            yield collate(windows, self._batch_size, self._sequence_length, self._padding_id)
