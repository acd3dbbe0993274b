"""Intervals: what they hold, by simulation; their formula; and words where there is none."""

import math

import numpy as np
import pytest
import torch
from probe_cases import all_needs, make_text
from simulate_intervals import coverage
from simulate_shares import coverage as coverage_of_shares

from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.measures.resampling import (
    LARGEST,
    MOST_UNITS,
    SHARE,
    Units,
    jackknife,
    sequence_units,
    units_of,
    without,
)
from probes.registry import PROBES
from probes.running.driver import run_probes
from probes.running.provenance import weights_alone

LEAST, MOST = 0.92, 0.97


def leeway(held: float, simulated: int) -> float:
    """Two standard errors of a share that was found in so many simulations."""
    return 2 * math.sqrt(held * (1 - held) / simulated)


def require(found, simulated):
    """Every interval holds 92 to 97 %, or is not known to hold less or more; that of what no text changes, always."""
    wrong = {
        key: held
        for key, (held, width) in found.items()
        if not (held == 1 and width == 0)
        and not LEAST - leeway(LEAST, simulated) <= held <= MOST + leeway(MOST, simulated)
    }
    assert not wrong


@pytest.mark.parametrize(
    "texts", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(12, marks=pytest.mark.slow)]
)
def test_intervals_hold_what_they_say(texts):
    """A few of them, give or take what 250 simulations leave open: 88.6 to 99.2 %."""
    found = coverage(texts, 250, names=("router_state", "routing", "repeats", "prediction"))
    assert len(found) == 6
    require(found, 250)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("texts", [1, 2, 3, 5, 8, 12])
def test_every_headline_holds_what_it_says(texts, domains, make_decoder):
    """Of all probes there are, give or take what 1000 simulations leave open: 90.3 to 98.1 %."""
    found = coverage(texts, 1000 if texts > domains else 1, domains)
    if texts <= domains:
        assert found == {}
        return
    shown = {
        f"{name}/{key}"
        for name, result in _probed(make_decoder, make_text([40] * 6, width=40)).items()
        for key, headline in result.headlines.items()
        if headline.interval is not None
    }
    assert shown <= set(found)
    require(found, 1000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("texts", [2, 3, 5, 8, 12])
def test_headlines_of_layers_and_of_scores_that_are_norms_hold_what_they_say(texts):
    found = coverage(texts, 1000, router="expert_norm")
    assert {"norm_origin/score_choice", "repeats/repeat_first_layer_0"} <= set(found)
    require(found, 1000)


def test_of_a_mean_it_is_students():
    from scipy import stats

    values, one = np.array([1.0, 4.0, 2.5, 7.0]), np.zeros(4, int)
    low, high = jackknife(values.mean(), without(values, one) / 4, one)
    want = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(want)
    assert np.isnan(jackknife(1.0, np.array([np.nan]), np.zeros(1))).all()
    assert jackknife(0.9, np.array([0.85, 0.95]), np.zeros(2), SHARE)[1] == 1.0


def test_what_differs_between_domains_is_no_spread():
    """Two domains far apart, each alike in itself."""
    values, domain = np.array([0.0, 0.1, 0.05, 10.0, 10.1, 10.05]), np.array([0, 0, 0, 1, 1, 1])
    unit, stratum = sequence_units(domain)
    low, high = jackknife(values.mean(), without(values, stratum) / 6, stratum)
    assert high - low < 0.5
    low, high = jackknife(values.mean(), without(values, np.zeros(6)) / 6, np.zeros(6))
    assert high - low > 5
    assert sorted(unit.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("units", "strata"),
    [(3, 2), (5, 4), (12, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 2), (8, 2), (12, 1)))],
)
def test_strata_neither_narrow_an_interval_nor_widen_it(units, strata):
    """Of a mean over units of equal spread in strata far apart, some of one unit: 95 %, sd .4 of 3000."""
    rng, stratum = np.random.default_rng(units), np.arange(units) % strata
    held = 0
    for values in rng.normal(10.0 * stratum, size=(3000, units)):
        low, high = jackknife(values.mean(), without(values, stratum) / units, stratum)
        held += low <= 10 * stratum.mean() <= high
    assert held / 3000 == pytest.approx(0.95, abs=0.015)


def test_what_is_near_0_varies_upwards():
    """Shares of 64 experts in three texts of a domain, of which a symmetric interval holds 61 % if rare."""
    found = coverage_of_shares(64, 1, 1, 6, 60)
    assert 0.92 < found.common < 0.99
    assert 0.93 < found.rare <= 1


def test_many_texts_are_put_together_within_their_domain():
    domain = np.array([0, 1] * 100 + [1] * 30)
    unit, stratum = sequence_units(domain)
    assert len(stratum) <= MOST_UNITS + 1
    assert all(len(np.unique(domain[unit == one])) == 1 for one in range(len(stratum)))


def _probed(make_decoder, text):
    probes = [kind() for kind in PROBES.values()]
    decoder = make_decoder(num_hidden_layers=3, num_experts=6, num_shared_experts=1)
    return run_probes(walk(decoder, text, all_needs()), probes)


def test_every_headline_of_text_has_an_interval_or_says_why_not(make_decoder):
    """Of all probes there are."""
    found = _probed(make_decoder, make_text([40] * 6, width=40))
    count = 0
    for name, result in found.items():
        for key, headline in result.headlines.items():
            of_text = not weights_alone(name)
            assert (headline.interval is not None) == (of_text and not headline.no_interval), (name, key)
            if headline.no_interval:
                assert any(key in note and note.endswith(headline.no_interval) for note in result.notes), (name, key)
            if headline.interval is not None:
                low, high = headline.interval
                assert low - 1e-6 <= headline.value <= high + 1e-6
                assert math.isfinite(low + high)
                count += 1
    assert count >= 15
    assert found["balance"].headlines["max_violation"].no_interval == LARGEST


@pytest.mark.parametrize(("texts", "domains", "said"), [(1, 1, "one text: "), (2, 2, "one text of each domain: ")])
def test_too_few_texts_say_so(make_decoder, texts, domains, said):
    ids = torch.randint(64, (texts, 30), generator=torch.Generator().manual_seed(2))
    domain = torch.arange(texts) % domains
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), domain, ("a", "b")[:domains])
    for name, result in _probed(make_decoder, text).items():
        assert not any(headline.interval for headline in result.headlines.values()), name
        could = not weights_alone(name) and any(not headline.no_interval for headline in result.headlines.values())
        assert any(note.startswith(said) for note in result.notes) == could, name


def test_units_of_a_text():
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3, [True] * 3])
    units = units_of(ProbeText(torch.zeros(4, 3, dtype=torch.int64), mask, torch.tensor([0, 1, 0, 0]), ("a", "b")), 7)
    assert units.of_token.tolist() == [0, 0, 0, 2, 1, 1, 1]  # an empty sequence is none
    assert units.stratum.tolist() == [0, 0, 1]
    values = np.arange(7.0)
    # The other text of its domain takes the place of the one that is left out.
    assert units.means_without(values)[0] == pytest.approx((2 * (4 + 5 + 6) + 3) / 7)
    assert units.means_without(values)[2] == pytest.approx(values.mean())
    assert units_of(None, 5).stratum.tolist() == [0]
    assert isinstance(units, Units)
