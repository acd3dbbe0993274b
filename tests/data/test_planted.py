"""Planted text is what its settings say, and its entropy what a predictor that knows them pays."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moebed.data.datamodule import TextDataModule
from moebed.data.loader import PackedLoader
from moebed.data.planted import PlantedConfig, PlantedLanguage
from moebed.data.sources import Source, SourceConfig
from moebed.data.streaming import StreamPacker
from moebed.data.tokenizer import SymbolsTokenizer, TokenizerConfig, load_tokenizer
from moebed.errors import ConfigError, UserError

SMALL = PlantedConfig(domains=2, symbols=6, branching=2, mean_document=40)


def documents_of(language: PlantedLanguage, blocks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Domains and symbols of each document."""
    config = language.config
    tokenizer = SymbolsTokenizer(config.domains, config.symbols, shared_alphabet=True)
    texts = [text for number in range(blocks) for text in language.draw(number)]
    ids = [tokens for tokens, _ in tokenizer.encode_documents(texts)]
    return list(zip(map(tokenizer.token_domains, texts), ids, strict=True))


def nats_by_document(language: PlantedLanguage, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """What each document costs whoever knows the language, EOS included, and its tokens; walked symbol by symbol."""
    config, found, sizes = language.config, [], []
    chance = language.contexts / language.contexts.sum()
    going_on = math.log(1 - 1 / (config.mean_document - 1))
    stay, away = math.log(1 - config.switch), math.log(config.switch / max(1, config.domains - 1) or 1)
    for domains, symbols in documents_of(language, blocks):
        parts = domains if config.switch else np.zeros_like(domains)
        cost = -math.log(chance[parts[0], symbols[0], symbols[1]])
        for i in range(2, len(symbols)):
            cost -= math.log(language.tables[parts[i], symbols[i - 2], symbols[i - 1], symbols[i]]) + going_on
            if config.switch:
                cost -= stay if parts[i] == parts[i - 1] else away
        found.append(cost - math.log(1 / (config.mean_document - 1)))
        sizes.append(len(symbols) + 1)
    return np.array(found), np.array(sizes)


@pytest.mark.parametrize("settings", [{}, {"switch": 0.2}, {"domains": 1, "symbols": 9, "branching": 9}])
def test_the_floor_is_what_a_predictor_that_knows_the_language_pays(settings: dict) -> None:
    language = PlantedLanguage(dataclasses.replace(SMALL, **settings))
    nats, tokens = nats_by_document(language, 20)
    residual = nats - language.floor * tokens  # of a ratio of sums, by the delta method
    error = residual.std() / math.sqrt(len(nats)) / tokens.mean()
    assert nats.sum() / tokens.sum() == pytest.approx(language.floor, abs=4 * error)
    assert 4 * error < 0.015


def test_where_the_alphabet_is_shared_and_domains_switch_the_domain_is_known_to_the_floor() -> None:
    apart = PlantedLanguage(dataclasses.replace(SMALL, switch=0.2))
    shared = PlantedLanguage(dataclasses.replace(SMALL, switch=0.2, shared_alphabet=True))
    assert shared.entropy_rate == apart.entropy_rate
    # What it does not pay: which domain each document begins in, and each of the switches after two symbols.
    switching = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert (apart.floor - shared.floor) * 41 == pytest.approx(math.log(2) + 38 * switching, rel=1e-9)


def test_the_entropy_rate_of_tables_of_one_successor_is_that_of_their_smoothing() -> None:
    language = PlantedLanguage(dataclasses.replace(SMALL, branching=1))
    rare = 0.01 / 6
    assert language.entropy_rate == pytest.approx(-(0.99 + rare) * math.log(0.99 + rare) - 5 * rare * math.log(rare))


def test_at_depth_two_the_entropy_rate_is_that_of_what_followed_last() -> None:
    language = PlantedLanguage(dataclasses.replace(SMALL, depth=2, mean_document=2000))
    (table,), cost, pairs = language.tables, [], {}
    for _, symbols in documents_of(language, 1):
        memory: dict[int, int] = {}
        for here, then in zip(symbols.tolist(), symbols.tolist()[1:], strict=False):
            if here in memory:
                cost.append(-math.log(table[memory[here], here, then]))
            memory[here] = then
            pairs[here, then] = pairs.get((here, then), 0) + 1
    assert np.mean(cost) == pytest.approx(language.entropy_rate, abs=0.01)
    # Whoever knows the symbol before alone pays the entropy of what follows it, which is much more.
    follows = language.contexts[0].T
    known = follows / follows.sum(1, keepdims=True)
    assert -(follows * np.log(known)).sum() > language.entropy_rate + 0.3
    for (here, then), number in pairs.items():
        assert number / sum(pairs.values()) == pytest.approx(follows[here, then], abs=0.01)


def test_how_often_contexts_are_met_is_how_often_they_stand_in_the_text() -> None:
    language = PlantedLanguage(dataclasses.replace(SMALL, switch=0.2))
    counts = np.zeros_like(language.contexts)
    for domains, symbols in documents_of(language, 40):
        np.add.at(counts, (domains[1:], symbols[:-1], symbols[1:]), 1)
    assert counts / counts.sum() == pytest.approx(language.contexts, abs=0.003)


def test_shared_tables_are_equal_in_every_domain_and_others_are_not() -> None:
    def equal(share: float) -> float:
        settings = dataclasses.replace(SMALL, symbols=20, branching=3, shared_tables=share)
        one, other = (PlantedLanguage(dataclasses.replace(settings, domain=d)).tables[0] for d in range(2))
        return float((one == other).all(-1).mean())

    assert [equal(0), equal(1)] == [0, 1]
    assert equal(0.5) == pytest.approx(0.5, abs=0.1)


def test_text_follows_from_the_seeds() -> None:
    def text(**settings: int) -> str:
        return "|".join(PlantedLanguage(dataclasses.replace(SMALL, **settings)).draw(3))

    assert text() == text()
    assert len({text(), text(seed=1), text(text_seed=1), text(domain=1)}) == 4
    held_out = PlantedLanguage(dataclasses.replace(SMALL, text_seed=1))
    assert (held_out.tables == PlantedLanguage(SMALL).tables).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"domain": 2}, r"planted.domain is 2; it must be between 0 and 1"),
        ({"branching": 7}, r"planted.branching is 7; it must be between 1 and 6"),
        ({"switch": 0.1, "depth": 2}, r"planted.switch and depth 2 do not go together"),
        ({"switch": 0.1, "domains": 1}, r"there is one domain"),
        ({"symbols": 4000}, r"tables of 64,000,000,000 entries"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(SMALL, **settings)


def test_a_source_says_that_it_is_planted() -> None:
    with pytest.raises(ConfigError, match="kind planted needs planted"):
        SourceConfig("mine", "planted")
    with pytest.raises(ConfigError, match="no other kind has them"):
        SourceConfig("math", planted=SMALL)


# ---- through the data module -----------------------------------------------------------------------------------------


def sources(streaming: bool = False, **settings: object) -> list[SourceConfig]:
    """A source for each domain, or one where they switch."""
    given = dataclasses.replace(SMALL, **settings)  # type: ignore[arg-type]
    size = None if streaming else 20_000
    return [
        SourceConfig(f"d{domain}", "planted", streaming=streaming, max_bytes=size, planted=planted)
        for domain in range(1 if given.switch else given.domains)
        for planted in [dataclasses.replace(given, domain=domain)]
    ]


@pytest.fixture
def planted_data(make_data: Callable[..., TextDataModule]) -> Callable[..., TextDataModule]:
    def make(streaming: bool = False, **settings: object) -> TextDataModule:
        data = make_data(sources=sources(streaming, **settings), tokenizer=TokenizerConfig("symbols"))
        data.setup()
        return data

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_ids_and_domains_of_tokens(planted_data: Callable, shared: bool, streaming: bool) -> None:
    data = planted_data(streaming, shared_alphabet=shared, switch=0.2)
    assert data.tokenizer.vocab_size == (7 if shared else 13)
    loaders = iter(data.train_dataloader()), iter(data.val_dataloader())
    for batch in (next(loaders[0]), next(loaders[1])):
        domain, ids = batch["token_domain"], batch["input_ids"]
        assert domain.shape == ids.shape == (4, 32)
        assert set(domain.flatten().tolist()) == {0, 1}
        if not shared:  # the id tells it too
            symbols = ids != data.tokenizer.eos_id
            assert (ids // 6 == domain)[symbols].all()


def test_domains_that_do_not_switch_are_told_by_sequence_alone(planted_data: Callable) -> None:
    batch = next(iter(planted_data().train_dataloader()))
    assert "token_domain" not in batch
    symbols = batch["input_ids"] != 12
    assert (batch["input_ids"] // 6 == batch["domain"].unsqueeze(1))[symbols].all()


def test_stored_and_streamed_text_are_the_same(planted_data: Callable) -> None:
    stored = planted_data(switch=0.2)
    texts = [t for t in Source(sources(switch=0.2)[0]).documents()]
    stream = Source(sources(True, switch=0.2)[0]).texts()
    assert [next(stream) for _ in texts[:-1]] == texts[:-1]  # the last is cut at max_bytes
    tokens, domains = stored.stores[0].train.tokens, stored.stores[0].train.token_domains
    packer = StreamPacker(Source(sources(True, switch=0.2)[0]), stored.tokenizer, 100, 0.2)
    ids, _, labels = packer.next_window(0)
    assert (ids == tokens[:101]).all()
    assert (labels == domains[:101]).all()


def test_a_streaming_loader_goes_on_where_it_was(planted_data: Callable) -> None:
    def loader() -> PackedLoader:
        return planted_data(True, switch=0.2).train_dataloader()

    batches, resumed = iter(first := loader()), loader()
    for _ in range(20):
        next(batches)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    ours, theirs = next(iter(resumed)), next(batches)
    assert ours.keys() == theirs.keys() >= {"token_domain"}
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_the_tokenizer_comes_back_and_refuses_other_text(tmp_path: Path) -> None:
    tokenizer = SymbolsTokenizer(2, 6, shared_alphabet=True)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    text = PlantedLanguage(SMALL).draw(0)[0]
    assert loaded.decode([*loaded.encode(text), loaded.eos_id]) == text
    with pytest.raises(UserError, match="character 'é' is none of the planted language; its 12 are ! to ,"):
        loaded.encode("!é")


def test_a_language_of_many_symbols_has_characters_of_one_size() -> None:
    tokenizer = SymbolsTokenizer(5, 20, shared_alphabet=False)
    ids, sizes = tokenizer.encode_documents([tokenizer.decode(range(100))])[0]
    assert ids.tolist() == list(range(100))
    assert set(sizes.tolist()) == {3}


def test_symbols_are_of_one_language(make_data: Callable) -> None:
    mixed = [*sources(), SourceConfig("other", "planted", planted=PlantedConfig(domains=3))]
    for given in (mixed, [*sources(), SourceConfig("math")]):
        with pytest.raises(ConfigError, match="symbols needs planted sources alone, with the same domains"):
            make_data(sources=given, tokenizer=TokenizerConfig("symbols"))


def test_domains_that_switch_need_a_tokenizer_that_tells_them(make_data: Callable) -> None:
    with pytest.raises(ConfigError, match=r"set data\.tokenizer\.kind to symbols"):
        make_data(sources=sources(switch=0.2), tokenizer=TokenizerConfig("bytes")).setup()


def test_the_floor_of_all_text_weighs_domains_by_what_is_validated(planted_data: Callable) -> None:
    data = planted_data()
    known = data.planted()
    sizes = [len(store.validation) - 1 for store in data.stores]
    expected = sum(known[f"d{i}"]["floor"] * size for i, size in enumerate(sizes)) / sum(sizes)
    assert known["all"]["floor"] == pytest.approx(expected)
    assert known["d0"]["floor"] != known["d1"]["floor"]
