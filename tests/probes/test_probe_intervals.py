"""Intervals: what they hold, by simulation; their formula; and words where there are too few texts."""

import math

import numpy as np
import pytest
import torch
from probe_cases import all_needs, make_text
from simulate_intervals import coverage, made_up

from moebed.views import Need, ProbeText
from moebed.walking import walk
from probes.driver import run_probes
from probes.registry import PROBES
from probes.resampling import MOST_UNITS, SHARE, jackknife, sequence_units, units_of, without

# Of these no interval can be had: a count of rare cases, a step of few, exact numbers of the weights, or a trend over
# layers, which has a p instead.
NONE = {"balance/dead_share", "saturation/settled_at"}
NONE |= {f"layer_diversity/{kind}_{what}" for kind in ("rises", "last_layer") for what in ("weights", "outputs")}


@pytest.mark.parametrize("texts", [1, 2, 3, 5, 8])
def test_intervals_hold_what_they_say(texts):
    """92 to 97 %, give or take what 250 simulations leave open (two standard errors are 3 %)."""
    found = coverage(texts, 250, ("router_state", "repeats", "routing"))
    assert len(found) >= (3 if texts == 1 else 5)
    for key, (held, _) in found.items():
        assert 0.92 - 0.03 <= held <= 0.97 + 0.025, (key, held)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xfail(reason="of the largest of several, and of the divergence, they hold up to 99.7 %: README")
@pytest.mark.parametrize("texts", [1, 2, 3, 4, 5, 8, 12])
def test_every_headline_of_routing_holds_what_it_says(texts):
    found = coverage(texts, 1000)
    assert len(found) >= (4 if texts == 1 else 8)
    for key, (held, _) in found.items():
        assert 0.92 - 0.014 <= held <= 0.97 + 0.014, (key, held)


def test_of_a_mean_it_is_students():
    from scipy import stats

    values = np.array([1.0, 4.0, 2.5, 7.0])
    low, high = jackknife(values.mean(), without(values) / 3)
    want = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(want)
    assert np.isnan(jackknife(1.0, np.array([np.nan]))).all()
    assert jackknife(0.9, np.array([0.85, 0.95]), within=SHARE)[1] == 1.0


def test_what_differs_between_domains_is_no_spread():
    """Two domains far apart, each alike in itself."""
    values, domain = np.array([0.0, 0.1, 0.05, 10.0, 10.1, 10.05]), np.array([0, 0, 0, 1, 1, 1])
    unit, stratum = sequence_units(domain)
    low, high = jackknife(values.mean(), without(values) / 5, stratum)
    assert high - low < 0.5
    low, high = jackknife(values.mean(), without(values) / 5)
    assert high - low > 5
    assert sequence_units(np.array([0, 1, 1]))[1].tolist() == [0, 0, 0]  # one text of a domain has no spread of its own
    assert sorted(unit.tolist()) == list(range(6))


@pytest.mark.parametrize(("units", "strata"), [(4, 2), (8, 2), (12, 3), (12, 1)])
def test_strata_neither_narrow_an_interval_nor_widen_it(units, strata):
    """Of a mean over units of equal spread, whatever they are compared within: 95 %, sd .4 of 3000."""
    rng, stratum = np.random.default_rng(units), np.arange(units) % strata
    held = 0
    for values in rng.normal(size=(3000, units)):
        low, high = jackknife(values.mean(), without(values) / (units - 1), stratum)
        held += low <= 0 <= high
    assert held / 3000 == pytest.approx(0.95, abs=0.015)


def test_many_texts_are_put_together_within_their_domain():
    domain = np.array([0, 1] * 100 + [1] * 30)
    unit, stratum = sequence_units(domain)
    assert len(stratum) <= MOST_UNITS + 1
    assert all(len(np.unique(domain[unit == one])) == 1 for one in range(len(stratum)))


def _probed(make_decoder, text):
    probes = [kind() for kind in PROBES.values()]
    decoder = make_decoder(num_hidden_layers=3, num_experts=6, num_shared_experts=1)
    return run_probes(walk(decoder, text, all_needs()), probes)


def test_every_headline_of_text_has_an_interval(make_decoder):
    """Of all probes there are, but for those of which none can be had."""
    found = _probed(make_decoder, make_text([40] * 6, width=40))
    missing = {
        f"{name}/{key}"
        for name, result in found.items()
        for key, headline in result.headlines.items()
        if headline.interval is None and not PROBES[name].needs <= {Need.WEIGHTS}
    }
    assert missing <= NONE
    count = 0
    for result in found.values():
        for headline in result.headlines.values():
            if headline.interval is not None:
                low, high = headline.interval
                assert low - 1e-6 <= headline.value <= high + 1e-6
                assert math.isfinite(low + high)
                count += 1
    assert count >= 25


@pytest.mark.parametrize(("tokens", "said"), [(60, "one short text"), (400, "one text")])
def test_one_text_says_so(make_decoder, tokens, said):
    """A long one has intervals of its own stretches, and says what they are; a short one none."""
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(2))
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    found = _probed(make_decoder, text)
    for name in ("balance", "router_state", "activations", "norm_vs_score", "prediction", "expert_outputs"):
        result = found[name]
        assert any(said in note for note in result.notes), name
        with_interval = [h for key, h in result.headlines.items() if h.interval and f"{name}/{key}" not in NONE]
        assert bool(with_interval) == (tokens == 400), name


def test_units_of_a_text():
    text = made_up(np.random.default_rng(0), 4)[0].text
    units = units_of(text, 480)
    assert units.texts == 4
    assert units.stratum.tolist() == [0, 0, 1, 1]
    values = np.arange(480.0)
    kept = np.arange(480) >= 120
    assert units.means_without(values)[units.of_token[0]] == pytest.approx(values[kept].mean())
