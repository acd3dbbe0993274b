"""Weights of domains that change: the rules' numbers; sample, batch and state follow from the weights' history."""

import json
import re
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebed.data.loader import Batch, PackedLoader
from moebed.data.mixing import PRESETS, MixingConfig, reference_losses, require_same_tokens, start_weights
from moebed.data.mixing_rules import RULES, ExcessLoss, GateLoad, changed_weights, excess_loss, gate_load_distance
from moebed.data.mixture import DomainDraws
from moebed.data.sources import Source, SourceConfig
from moebed.data.store import TokenStream
from moebed.data.streaming import StreamPacker
from moebed.data.tokenizer import BytesTokenizer
from moebed.errors import ConfigError, UserError

S = 8
# Of cc, c4, github, wiki, books, arxiv, stack: LLaMA2-7B's losses (2406.16554's code), and a model's now.
REFERENCE = np.array([1.6917, 2.0749, 0.6984, 1.5899, 1.9252, 1.2408, 1.4975])
NOW = np.array([1.728, 2.117, 0.705, 1.572, 2.071, 1.287, 1.491])
LLAMA = np.array(list(PRESETS["llama"].values()))
NAMES = ["a", "b", "c"]
EXCESS = MixingConfig(rule="excess_loss", reference=dict.fromkeys(NAMES, 2.0))


def _sources(*names: str, **options: Any) -> list[SourceConfig]:
    return [SourceConfig(name, kind="files", path="x.txt", **options) for name in names]


# ---- the rules' numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "smoothing", "wanted"),
    [
        (False, 1e-4, [0.66875, 0.15060, 0.04361, 0.04256, 0.05012, 0.02521, 0.01914]),
        (True, 0.0, [0.66820, 0.15047, 0.04356, 0.04328, 0.05007, 0.02518, 0.01924]),
    ],
    ids=["sheared_llama", "sheared_llama_paper"],
)
def test_1_8_6_the_published_rule_from_llamas_weights(clip: bool, smoothing: float, wanted: list[float]) -> None:
    found = changed_weights(LLAMA, excess_loss(NOW, REFERENCE, clip), 1.0, smoothing)
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # one in the last digit that is given
    assert found.sum() == pytest.approx(1.0, abs=1e-15)
    # A constant added to all losses changes nothing, unless losses below their reference count as none.
    shifted = changed_weights(LLAMA, excess_loss(NOW + 0.3, REFERENCE, clip), 1.0, smoothing)
    assert np.allclose(shifted, found, rtol=1e-12) != clip


def test_weights_keep_the_share_that_is_mixed_in() -> None:
    found = changed_weights(np.full(4, 0.25), np.array([0.0, 0.0, 0.0, 900.0]), 10.0, 0.05)
    np.testing.assert_allclose(found, [0.0125, 0.0125, 0.0125, 0.9625])


def test_gate_load_distance_is_the_mean_distance_of_shares() -> None:
    counts = np.array([[10.0, 0.0, 0.0], [0.0, 2.0, 0.0], [5.0, 5.0, 0.0]])
    far, near = np.sqrt(2.0), np.sqrt(0.5)
    np.testing.assert_allclose(gate_load_distance(counts), [(far + near) / 2, (far + near) / 2, near])
    np.testing.assert_allclose(gate_load_distance(counts[:, [2, 0, 1]] * 7), gate_load_distance(counts))


def test_published_weights_by_name() -> None:
    domains = ("CommonCrawl", "c4", "github", "Wikipedia", "books", "arxiv", "StackExchange")
    np.testing.assert_allclose(start_weights(_sources(*domains), [1] * 7, "llama"), LLAMA / LLAMA.sum())
    np.testing.assert_allclose(start_weights(_sources(*domains), [1] * 7, "sheared").round(3)[:2], [0.361, 0.492])
    few = start_weights(_sources("arxiv", "c4", "github", "wikipedia"), [5, 6, 7, 8], "sheared")
    np.testing.assert_allclose(few, np.array([0.007, 0.492, 0.008, 0.031]) / 0.538)
    np.testing.assert_allclose(start_weights(_sources("x", "y"), [1, None], "uniform"), [0.5, 0.5])
    with pytest.raises(ConfigError, match="llama has no weight for the domain 'poems'; it has cc, c4"):
        start_weights(_sources("c4", "poems"), [1, 1], "llama")
    with pytest.raises(ConfigError, match="uniform and the weight of data source 'x' exclude each other"):
        start_weights(_sources("x", "y", weight=2.0), [1, 1], "uniform")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "excess_loss"}, "needs data.mixing.reference"),
        ({"clip": True}, "data.mixing.clip does nothing with rule static; it is for excess_loss"),
        ({"smoothing": 0.0}, "data.mixing.smoothing does nothing with rule static"),
        ({"rule": "gate_load", "reference": {"a": 1.0}}, "data.mixing.reference does nothing with rule gate_load"),
        ({"rule": "gate_load", "every_n_steps": 0}, "every_n_steps is 0"),
        ({"rule": "gate_load", "step_size": -1.0}, "step_size is -1.0"),
        ({"rule": "gate_load", "smoothing": 1.0}, "smoothing is 1.0"),
    ],
)
def test_settings_that_do_nothing_or_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MixingConfig(**settings)


def test_one_domain_cannot_be_weighed() -> None:
    with pytest.raises(ConfigError, match="rule gate_load needs two domains or more, and 'only' is alone"):
        GateLoad(MixingConfig(rule="gate_load"), ["only"])


def test_reference_losses_are_given_or_read_from_a_run(tmp_path: Path) -> None:
    assert reference_losses({"b": 2, "a": 1.5, "other": 7.0}, ["a", "b"]).tolist() == [1.5, 2.0]
    with pytest.raises(ConfigError, match="reference has no finite loss for the domain 'c'"):
        reference_losses({"a": 1.0}, ["a", "c"])
    with pytest.raises(UserError, match=r"cannot read .*none.*; give a loss for each domain"):
        reference_losses(str(tmp_path / "none"), ["a"])
    (tmp_path / "run_summary.json").write_text(json.dumps({"val/loss": 9.0, "val/loss/a": 1.25, "val/loss/b": 2.5}))
    for run in (tmp_path, tmp_path / "run_summary.json"):
        assert reference_losses(str(run), ["b", "a"]).tolist() == [2.5, 1.25]
    BytesTokenizer().save(tmp_path / "tokenizer")
    require_same_tokens(str(tmp_path), BytesTokenizer(), "some text")

    class Other(BytesTokenizer):
        def encode_documents(self, texts: Any) -> Any:
            return [(ids + 1, sizes) for ids, sizes in super().encode_documents(texts)]

    with pytest.raises(ConfigError, match="has another tokenizer"):
        require_same_tokens(str(tmp_path), Other(), "some text")


# ---- samples ---------------------------------------------------------------------------------------------------------

_WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3).map(lambda w: np.array(w) / np.sum(w))
_CHANGES = st.lists(st.tuples(st.integers(0, 9000), _WEIGHTS), min_size=1, max_size=4)


@given(changes=_CHANGES, cut=st.integers(0, 9999))
@settings(max_examples=25, deadline=None)
def test_a_sample_follows_from_seed_and_history(changes: list[tuple[int, np.ndarray]], cut: int) -> None:
    """Samples of a domain are numbered without a gap, whatever changed; from a state on, all is as it was."""
    changes = sorted(changes, key=lambda change: change[0])
    draws, seen, resumed = DomainDraws(3, np.array([0.6, 0.3, 0.1])), np.zeros(3, dtype=int), None
    waiting = deque(changes)
    for sample in range(10_000):
        while waiting and waiting[0][0] == sample:
            draws.change(sample, waiting[0][1])
            if resumed is not None:
                resumed.change(sample, waiting[0][1])
            waiting.popleft()
        if sample == cut:
            resumed = DomainDraws(3, np.array([0.6, 0.3, 0.1]))
            resumed.load_state_dict(json.loads(json.dumps(draws.state_dict())))
        domain, index = draws.locate(sample)
        assert index == seen[domain]
        seen[domain] += 1
        if resumed is not None and sample % 7 == 0:
            assert resumed.locate(sample) == (domain, index)


def test_a_change_moves_no_more_samples_than_it_must() -> None:
    """Every sample has a random number of its own: a weight that moves by .1 moves a tenth of the samples."""
    before, after = DomainDraws(3, np.array([0.5, 0.5])), DomainDraws(3, np.array([0.5, 0.5]))
    after.change(5000, np.array([0.6, 0.4]))
    pairs = [(before.locate(i)[0], after.locate(i)[0]) for i in range(5000, 15_000)]
    assert all(new <= old for old, new in pairs)
    assert np.mean([old != new for old, new in pairs]) == pytest.approx(0.1, abs=0.01)


# ---- batches ---------------------------------------------------------------------------------------------------------


def _stream(size: int, base: int) -> TokenStream:
    tokens = np.arange(base, base + size, dtype=np.uint32)
    return TokenStream(tokens, (tokens % 7).astype(np.uint16), np.array([1]))


@pytest.fixture(params=["stored", "streaming"])
def make_loader(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Makes a loader of three domains, of which the third is streamed or not."""
    path = tmp_path / "third.jsonl"
    path.write_text("".join(json.dumps({"text": f"Story {i}: {i * i} cats. " * (1 + i % 5)}) + "\n" for i in range(99)))
    source = Source(SourceConfig("third", kind="files", path=str(path), streaming=True))

    def make(rank: int = 0, world_size: int = 1, **options: Any) -> PackedLoader:
        size, rows = 4 // world_size, range(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        third = StreamPacker(source, BytesTokenizer(), S, 0.1, rows, 4)
        domains = [_stream(1000, 0), _stream(400, 10_000), _stream(300, 20_000)]
        if request.param == "streaming":
            domains[2] = third
        return PackedLoader(domains, np.array([0.6, 0.3, 0.1]), S, size, rank=rank, world_size=world_size, **options)

    return make


def _equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


CHANGES = {5: np.array([0.1, 0.1, 0.8]), 6: np.array([0.2, 0.7, 0.1]), 20: np.array([0.05, 0.05, 0.9])}


def _train(loader: PackedLoader, ahead: int, steps: range) -> list[Batch]:
    """What training sees that fetches so many batches ahead, as Lightning does one, with changes after some."""
    fetched, iterator, seen = deque(), iter(loader), []
    for step in steps:
        while len(fetched) <= ahead:
            fetched.append(next(iterator))
        seen.append(loader.take(fetched.popleft()))
        if step + 1 in CHANGES:
            loader.change_weights(CHANGES[step + 1])
    return seen


@pytest.mark.parametrize("ahead", [1, 3])
def test_nothing_is_trained_on_by_weights_that_are_over(make_loader: Any, ahead: int) -> None:
    plain, wanted = iter(loader := make_loader()), []
    for step in range(40):
        wanted.append(next(plain))
        if step + 1 in CHANGES:
            loader.change_weights(CHANGES[step + 1])
    found = _train(make_loader(tracked=True), ahead, range(40))
    assert all(_equal(a, b) for a, b in zip(found, wanted, strict=True))
    domains = torch.stack([batch["domain"] for batch in found])
    assert domains[:5].float().mean() < 0.9  # mostly the first
    assert (domains[20:] == 2).float().mean() > 0.7


@pytest.mark.parametrize("cut", [3, 5, 6, 13, 30])
def test_a_resumed_loader_goes_on_with_the_weights_of_its_state(make_loader: Any, cut: int) -> None:
    whole = _train(make_loader(tracked=True), 1, range(40))
    first = make_loader(tracked=True)
    _train(first, 1, range(cut))
    state = json.loads(json.dumps(first.state_dict()))
    rest = make_loader(tracked=True)
    rest.load_state_dict(state)
    assert rest.weights.tolist() == first.weights.tolist()
    assert all(_equal(a, b) for a, b in zip(_train(rest, 1, range(cut, 40)), whole[cut:], strict=True))


def test_ranks_see_the_parts_of_what_one_process_sees(make_loader: Any) -> None:
    whole = _train(make_loader(tracked=True), 1, range(30))
    ranks = [_train(make_loader(rank, 2, tracked=True), 1, range(30)) for rank in range(2)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert _equal(batch, {key: torch.cat([first[key], second[key]]) for key in batch})


def test_weights_of_other_data_are_not_taken_over(make_loader: Any) -> None:
    first, other = make_loader(identity="a", tracked=True), make_loader(identity="b", tracked=True)
    _train(first, 1, range(10))
    with pytest.warns(UserWarning, match="trained on other data"):
        other.load_state_dict(first.state_dict())
    assert other.weights.tolist() == [0.6, 0.3, 0.1]
    assert next(iter(other))["input_ids"].shape == (4, S)


# ---- a rule over steps -----------------------------------------------------------------------------------------------


class Weights:
    """Stands for a loader: keeps every change."""

    def __init__(self) -> None:
        self.weights, self.changes = np.full(3, 1 / 3), []

    def change_weights(self, weights: np.ndarray) -> None:
        self.weights = weights
        self.changes.append(weights)


def _attached(config: MixingConfig) -> tuple[Any, Weights]:
    rule, loader = RULES[config.rule](config, NAMES), Weights()
    rule.attach(loader)
    return rule, loader


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    rule, loader = _attached(EXCESS)
    rule.end_validation(torch.tensor([2.5, 2.0, 1.5]))
    np.testing.assert_allclose(
        loader.weights, changed_weights(np.full(3, 1 / 3), np.array([0.5, 0.0, -0.5]), 1.0, 1e-4)
    )
    with pytest.warns(UserWarning, match="'b' has no finite validation loss"):
        rule.end_validation(torch.tensor([2.5, float("nan"), 1.5]))
    assert len(loader.changes) == 1


def test_another_reference_than_before_is_said() -> None:
    rule, _ = _attached(EXCESS)
    other = ExcessLoss(MixingConfig(rule="excess_loss", reference={"a": 2.0, "b": 3.0, "c": 2.0}), NAMES)
    other.load_state_dict(rule.state_dict())
    with pytest.warns(UserWarning, match=r"reference of 'b' was 2.0 in the checkpoint and is 3.0 now"):
        other.attach(Weights())  # type: ignore[arg-type]


def test_gate_load_counts_the_steps_that_are_taken() -> None:
    config = MixingConfig(rule="gate_load", every_n_steps=2)
    rule, loader = _attached(config)
    counts = torch.tensor([[8.0, 0.0], [4.0, 4.0], [0.0, 0.0]])
    rule.add(counts)
    rule.forget()  # the gradient was not finite
    for _ in range(3):
        rule.add(counts / 2)
        rule.add(counts / 2)  # two micro-batches
        rule.end_step()
    assert not loader.changes  # two steps and more, but nothing of the third domain yet
    resumed, again = _attached(config)
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    for one in (rule, resumed):
        one.add(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 6.0]]))
        one.end_step()
    gain = gate_load_distance(np.array([[24.0, 0.0], [12.0, 12.0], [0.0, 6.0]]))
    for one in (loader, again):
        assert len(one.changes) == 1
        np.testing.assert_allclose(one.weights, changed_weights(np.full(3, 1 / 3), gain, 10.0, 0.05), rtol=1e-14)
    assert rule.state_dict() == {"steps": 0, "counts": None}
    assert re.match("weight/a", next(iter(rule.numbers())))


def test_static_weights_are_no_state() -> None:
    rule, _ = _attached(MixingConfig())
    assert not rule.counts_load
    assert rule.numbers() == rule.state_dict() == {}
    loader = PackedLoader([_stream(1000, 0), _stream(400, 10_000)], np.array([0.5, 0.5]), S, 4)
    list(islice(loader, 3))
    assert "draws" not in loader.state_dict()
