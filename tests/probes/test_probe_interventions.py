"""The probe of interventions: planted harm, sums by text, what chance does, and what it says."""

import dataclasses

import numpy as np
import pytest
import torch
from probe_cases import make_text

from moebed.errors import ConfigError
from moebed.views.layer import HeadView, Need
from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.interventions import Interventions, by_confidence, slug, table
from probes.measures.effects import effect_of
from probes.measures.significance import holm, sign_flip_p
from probes.running.driver import run_probes


def made(rises, lengths=(40,) * 8, asked="mask 1; mask 2", noise=0.0, loss=None):
    """The probe's result on given rises (T,) by name."""
    text = make_text(list(lengths), width=max(lengths))
    loss = torch.linspace(1, 5, len(text.targets)) if loss is None else loss
    loss = torch.where(text.targets < 0, torch.nan, loss)

    def under(interventions):
        names = [one.name for one in interventions]
        assert names[0] == "identity"
        given = {"identity": torch.full_like(loss, noise), **rises(text)}
        return {name: torch.where(loss.isnan(), torch.nan, given[name]) for name in names}

    probe = Interventions()
    probe.options = probe.Options(asked)
    probe.update_head(HeadView(text, torch.zeros_like(text.targets), loss, under=under))
    return probe.compute()


def test_a_planted_harm_on_half_the_texts_is_found():
    """.1 nats on every other text, beside noise of 2 nats a token that means nothing."""
    generator = np.random.default_rng(4)

    def rises(text):
        noise = lambda: torch.from_numpy(generator.normal(0, 0.2, len(text.targets))).float()  # noqa: E731
        return {"mask 1 refill": 0.1 * (text.sequence % 2) + noise(), "mask 2 refill": noise()}

    result = made(rises, lengths=(120,) * 24)
    harmful, harmless = (row for row in table(result.arrays) if row.name != "identity")
    assert harmful.effect.mean == pytest.approx(0.05, abs=0.02)
    assert harmful.called
    assert harmful.effect.interval[0] > 0
    assert not harmless.called
    assert "than texts differ by chance" in result.headlines["mask_2_refill"].sentence
    assert "chance" not in result.headlines["mask_1_refill"].sentence
    for build in result.figures.values():
        to_rgb(build())


@pytest.mark.parametrize("texts", [8, 20])
def test_p_is_uniform_where_signs_mean_nothing(texts):
    generator = np.random.default_rng(1)
    found = np.array([sign_flip_p(generator.standard_t(3, texts)) for _ in range(400)])
    for level in (0.1, 0.3, 0.5, 0.8):
        assert abs((found <= level).mean() - level) < 3.5 * (level * (1 - level) / 400) ** 0.5 + 2 / 2**texts


def test_p_by_hand():
    assert sign_flip_p(np.array([1.0, 2, 3, 4])) == 2 / 16
    assert sign_flip_p(np.array([1.0, -1])) == 1
    assert sign_flip_p(np.array([0.0, 0, 5])) == 1  # one text
    assert sign_flip_p(np.zeros(4)) == 1
    assert holm([0.01, 0.04]) == [0.02, 0.04]


def test_sums_by_text_and_bin():
    result = made(lambda text: {"mask 1 refill": torch.ones(16), "mask 2 refill": -torch.arange(16.0)}, (5, 1, 10))
    arrays = result.arrays
    assert arrays["tokens"].tolist() == [4, 0, 9]  # the last one of a text predicts nothing
    assert arrays["names"].tolist() == ["identity", "mask 1 refill", "mask 2 refill"]
    assert arrays["delta"].tolist() == [[0, 0, 0], [4, 0, 9], [-6, 0, -sum(range(6, 15))]]
    assert arrays["worse_share"].tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert arrays["bin_tokens"].sum() == 13
    np.testing.assert_allclose(arrays["delta_by_bin"].sum(axis=2), arrays["delta"])
    rise = by_confidence(arrays, ["mask 2 refill"])["mask 2 refill"]
    assert (np.diff(rise) < 0).all()  # the loss as it is grows along the text


def test_an_effect_is_the_mean_over_tokens():
    effect = effect_of(np.array([4.0, 0, 9]), np.array([4, 0, 9]), np.array([0, 0, 1]))
    assert effect.mean == 1
    assert effect.interval is None  # one text of each domain
    both = effect_of(np.array([4.0, 2, 9]), np.array([4, 4, 9]), np.zeros(3, int))
    assert both.mean == pytest.approx(15 / 17)  # not of the texts' means
    assert both.interval[0] < both.mean < both.interval[1]


def test_what_the_pass_itself_changes_is_no_finding():
    rises = {"mask 1 refill": torch.full((320,), 1e-6), "mask 2 refill": torch.zeros(320)}
    result = made(lambda text: rises, noise=1e-6)
    assert "no more than the rounding" in result.headlines["mask_1_refill"].sentence
    assert "no more than the rounding" in result.headlines["mask_2_refill"].sentence


def test_where_numbers_overflow_it_says_so():
    rises = {"mask 1 refill": torch.full((320,), torch.nan), "mask 2 refill": torch.ones(320)}
    result = made(lambda text: rises)
    assert set(result.headlines) == {"mask_2_refill"}
    assert any("mask 1 refill: hidden states overflow" in note for note in result.notes)


def test_on_a_live_model_as_by_name(make_decoder, text):
    decoder, probe = make_decoder(), Interventions()
    probe.options = probe.Options("mask 1 zero @ layer 1; identity; swap @ layer 2")
    result = run_probes(walk(decoder, text, frozenset({Need.PREDICTIONS})), [probe])["interventions"]
    assert result.arrays["names"].tolist() == ["identity @ layers 1,2", "mask 1 zero @ layer 1", "swap @ layer 2"]
    head = list(walk(decoder, text, frozenset({Need.PREDICTIONS})))[-1]
    rise = head.under(probe.interventions(decoder.config))["swap @ layer 2"]
    wanted = [float(rise[(text.sequence == row) & (text.targets >= 0)].sum()) for row in range(3)]
    np.testing.assert_allclose(result.arrays["delta"][2], wanted, atol=1e-5)


def test_without_anything_to_change_it_says_so(make_decoder, text):
    result = run_probes(walk(make_decoder(), text, frozenset({Need.PREDICTIONS})), [Interventions()])
    assert "--intervene" in result["interventions"].notes[0]
    one_each = make_text([1, 1], width=1)
    probe = Interventions()
    probe.options = probe.Options("swap")
    assert "no token is followed" in run_probes(walk(make_decoder(), one_each, probe.needs), [probe])[
        "interventions"
    ].notes[0]  # fmt: skip


def test_settings_are_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean 'swap'"):
        Interventions.Options("swp")
    assert dataclasses.fields(Interventions.Options)[0].name == "apply"
    assert slug("mask 3,4 drop_norm @ layer 5") == "mask_3_4_drop_norm_layer_5"
