"""Training batches are pure functions of position; validation predicts every token once."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebed.data.loader import Batch, PackedLoader, ValidationLoader
from moebed.data.mixing import start_weights
from moebed.data.mixture import DomainDraws, WindowOrder
from moebed.data.sources import SourceConfig
from moebed.data.store import TokenStream

S = 8


def stream(size: int, base: int) -> TokenStream:
    """A stream whose tokens say where they are: token i of the domain that starts at ``base`` is ``base + i``."""
    tokens = np.arange(base, base + size, dtype=np.uint32)
    return TokenStream(tokens, (tokens % 7).astype(np.uint16), np.array([1]))


STREAMS = [stream(1000, 0), stream(400, 10_000), stream(S + 1, 20_000)]
WEIGHTS = np.array([0.6, 0.3, 0.1])


def _loader(batch_size: int = 4, rank: int = 0, world_size: int = 1, **options: int) -> PackedLoader:
    return PackedLoader(STREAMS, WEIGHTS, S, batch_size, rank=rank, world_size=world_size, **options)


def _equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_shapes_types_and_shift() -> None:
    batch = next(iter(_loader()))
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "input_ids": ((4, S), torch.int64),
        "labels": ((4, S), torch.int64),
        "label_bytes": ((4, S), torch.int32),
        "domain": ((4,), torch.int64),
    }
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert torch.equal(batch["label_bytes"].long(), batch["labels"] % 7)
    assert torch.equal(batch["domain"], batch["input_ids"][:, 0] // 10_000)


def test_an_epoch_takes_each_window_once_and_the_next_another_cut() -> None:
    order = WindowOrder(0, 0, 1000, S)
    windows = order.windows_per_epoch
    epochs = [[order.start(epoch * windows + i) for i in range(windows)] for epoch in range(6)]
    for starts in epochs:
        assert len({start % S for start in starts}) == 1
        assert len(set(starts)) == windows == 124
        assert min(starts) >= 0
        assert max(starts) + S + 1 <= 1000
        assert sorted(starts) != starts
    assert len({starts[0] % S for starts in epochs}) > 1
    assert order.start(3) == epochs[0][3]  # going back gives the same


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_by_domain_are_the_same_samples_in_another_order(world_size) -> None:
    """Ranks see domains of their own; what a step sees, and where a resumed run goes on, stays."""

    def batches(**options) -> list[Batch]:
        loaders = [_loader(8 // world_size, rank, world_size, **options) for rank in range(world_size)]
        steps = zip(*(islice(loader, 6) for loader in loaders), strict=True)
        return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in steps]

    plain, sorted_rows = batches(), batches(rows_by_domain=True)
    for one, other in zip(plain, sorted_rows, strict=True):
        assert bool((other["domain"].diff() >= 0).all())
        order = one["domain"].argsort(stable=True)
        assert _equal({key: value[order] for key, value in one.items()}, other)
    assert not all(_equal(*pair) for pair in zip(plain, sorted_rows, strict=True))


@given(size=st.integers(S + 1, 60), index=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_windows_of_small_streams_are_inside(size: int, index: int) -> None:
    assert 0 <= WindowOrder(1, 0, size, S).start(index) <= size - S - 1


def test_draws_follow_the_weights_and_count_exactly() -> None:
    draws = DomainDraws(3, WEIGHTS)
    located = [draws.locate(i) for i in range(10_000)]
    seen: Counter[int] = Counter()
    for domain, index in located:
        assert index == seen[domain]
        seen[domain] += 1
    np.testing.assert_allclose([seen[d] / 10_000 for d in range(3)], WEIGHTS, atol=0.02)
    assert DomainDraws(3, WEIGHTS).locate(9_999) == located[9_999]
    assert DomainDraws(4, WEIGHTS).locate(9_999) != located[9_999]


@pytest.mark.parametrize(
    ("weights", "tokens", "expected"),
    [
        ([None, None], [300, 100], [0.75, 0.25]),
        ([None, 3.0], [300, 100], [0.25, 0.75]),
        ([1.0, 1.0], [300, 100], [0.5, 0.5]),
        ([None, None], [300, None], [0.5, 0.5]),
    ],
)
def test_start_weights(weights: list, tokens: list, expected: list) -> None:
    configs = [SourceConfig("code", weight=weights[0]), SourceConfig("math", weight=weights[1])]
    np.testing.assert_allclose(start_weights(configs, tokens), expected)


def test_seeds_differ() -> None:
    assert not _equal(next(iter(_loader())), next(iter(_loader(seed=1))))


def test_the_global_batch_does_not_depend_on_the_world_size() -> None:
    alone = list(islice(_loader(batch_size=8), 30))
    ranks = [list(islice(_loader(4, rank, 2), 30)) for rank in range(2)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert _equal(whole, {key: torch.cat([first[key], second[key]]) for key in whole})


def test_state_resumes_exactly_also_with_another_world_size() -> None:
    loader = _loader(batch_size=8)
    iterator = iter(loader)
    for _ in range(13):
        next(iterator)
    state = loader.state_dict()
    rest = list(islice(iterator, 5))
    resumed = _loader(batch_size=8)
    resumed.load_state_dict(state)
    assert all(_equal(a, b) for a, b in zip(islice(resumed, 5), rest, strict=True))
    second = _loader(4, rank=1, world_size=2)
    second.load_state_dict(state)
    assert torch.equal(next(iter(second))["labels"], rest[0]["labels"][4:])


def test_what_was_fetched_but_not_consumed_comes_again() -> None:
    loader = PackedLoader(STREAMS, WEIGHTS, S, 4, tracked=True)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(3)]
    assert loader.state_dict()["position"] == 0
    assert loader.take(batches[0]) is batches[0]
    assert loader.state_dict()["position"] == 4
    assert _equal(next(iter(loader)), batches[1])


def test_resuming_on_other_data_warns() -> None:
    loader = PackedLoader(STREAMS, WEIGHTS, S, 4, identity="a")
    with pytest.warns(UserWarning, match="trained on other data"):
        PackedLoader(STREAMS, WEIGHTS, S, 4, identity="b").load_state_dict(loader.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [S + 1, S + 2, 5 * S, 5 * S + 1])
def test_validation_predicts_every_token_but_the_first_once(size: int, world_size: int) -> None:
    streams = [stream(size, 0), stream(3 * S + 4, 10_000)]
    loaders = [ValidationLoader(streams, S, 2, 77, [None, None], rank, world_size) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    predicted: Counter[int] = Counter()
    num_bytes = 0
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch["labels"].shape == (2, S)
            valid = batch["labels"] != -100
            assert torch.equal(batch["labels"][valid], batch["input_ids"][valid] + 1)
            assert (batch["label_bytes"][~valid] == 0).all()
            assert torch.equal(batch["domain"][:, None].expand(-1, S)[valid], batch["labels"][valid] // 10_000)
            predicted.update(batch["labels"][valid].tolist())
            num_bytes += int(batch["label_bytes"].sum())
    tokens = [*range(1, size), *range(10_001, 10_000 + 3 * S + 4)]
    assert predicted == Counter(tokens)
    assert num_bytes == sum(token % 7 for token in tokens)


def test_validation_can_be_limited_by_domain() -> None:
    loader = ValidationLoader(STREAMS, S, 4, 0, [2, 3, None])
    domains = torch.cat([batch["domain"][batch["labels"][:, 0] >= 0] for batch in loader])
    assert domains.tolist() == [0, 0, 1, 1, 1, 2]
