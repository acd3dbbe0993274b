"""routing_ladder: routings that follow from one thing alone, random ones, and what reading the layer's input finds."""

import numpy as np
import pytest
import torch
from probe_cases import make_text
from routed_cases import chosen_view, text_of

from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.measures.held_out import Choices, Column, Features, Keys, split_of
from probes.routing_ladder import FEW, RoutingLadder
from probes.running.driver import run_probes

TEXTS, LENGTH, IDS, EXPERTS = 10, 48, 6, 4
RNG = np.random.default_rng(3)
IDS_OF = RNG.integers(IDS, size=(TEXTS, LENGTH))
SETS = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
SHARES = {0: "token", 1: "previous", 2: "position"}


def found(*choices, inputs=None, logits=None, domains=1):
    """The result on texts whose tokens go to these pairs of experts (T, 2), one array a layer."""
    text = text_of(IDS_OF.tolist(), [n % domains for n in range(TEXTS)], ("books", "code")[:domains])
    views = []
    for layer, choice in enumerate(choices):
        view = chosen_view(choice, EXPERTS, text, layer)
        view.moe_input = torch.from_numpy(RNG.standard_normal((len(choice), 5)).astype(np.float32))
        if inputs is not None:
            view.moe_input, view.routing = inputs, view.routing._replace(router_logits=logits)
        views.append(view)
    return run_probes(views, [RoutingLadder()])["routing_ladder"]


def shares(result):
    return {rung: result.scalars[f"share_{rung}"] for rung in ("token", "previous", "bigram", "position", "target")}


def test_each_rung_finds_what_routing_follows_from():
    """A hash of the id, of the one before, of the place, round robin; and what it follows from explains all."""
    previous = np.roll(IDS_OF, 1, axis=1)
    place = np.tile(np.arange(LENGTH), (TEXTS, 1))
    by_token, by_previous, by_place = (
        shares(found(SETS[key.ravel() % IDS])) for key in (IDS_OF, previous, place % EXPERTS)
    )
    assert by_token["token"] > 0.97
    assert by_token["bigram"] == pytest.approx(by_token["token"], abs=0.01)
    assert by_previous["token"] < 0.01
    assert by_previous["bigram"] > 0.9
    assert by_previous["previous"] > 0.9
    assert by_place["position"] > 0.97
    assert max(by_token["position"], by_place["token"], by_place["bigram"], by_token["target"]) < 0.01


def test_random_choices_follow_from_nothing_but_the_very_same_text():
    result = found(*(SETS[RNG.integers(IDS, size=TEXTS * LENGTH)] for _ in range(2)), domains=2)
    explained = {name: value for name, value in result.scalars.items() if name.count("/") == 0 and "share_" in name}
    memorised = explained.pop("share_bigram_in_sample")
    assert len(explained) >= 12 * 3
    assert all(value < 0.01 for value in explained.values())
    assert memorised > 0.03
    for name in ("share_token", "share_domain", "share_layer_before", "share_input_before"):
        assert result.headlines[name].sentence.endswith("no more than chance.")
    assert all(headline.interval is None and headline.no_interval for headline in result.headlines.values())
    assert any("varies with the texts" in note for note in result.notes)
    for build in result.figures.values():
        to_rgb(build())


def test_the_layers_own_input_is_a_ceiling_and_the_layer_before_tells_what_it_shares():
    inputs = torch.from_numpy(RNG.standard_normal((TEXTS * LENGTH, 6)).astype(np.float32))
    logits = inputs @ torch.from_numpy(RNG.standard_normal((6, EXPERTS)).astype(np.float32))
    choice = logits.topk(2, dim=1).indices.numpy()
    result = found(choice, choice, inputs=inputs, logits=logits)
    assert result.scalars["share_input"] > 0.9
    assert result.scalars["share_input_before"] > 0.9
    assert result.scalars["share_layer_before"] > 0.6  # a product over experts that are not independent
    assert result.scalars["share_input_shuffled"] < 0.01
    assert "share_input_before/layer_00" not in result.scalars
    assert result.scalars["recall_input"] > 0.95
    assert "90%" not in result.headlines["share_token"].sentence


def test_counts_leave_out_the_tokens_own_fold_and_one_more():
    domain, sequence = np.zeros(6, int), np.repeat(np.arange(6), 4)
    split = split_of(domain, sequence)
    choices = Choices(RNG.integers(3, size=(24, 1)), 3)
    key = RNG.integers(3, size=24)
    for fold in range(split.folds):
        count = Keys(key, split, choices).without(fold)
        for token in range(24):
            left = (split.fold != fold) & (split.fold != split.fold[token]) & (key == key[token])
            np.testing.assert_allclose(count[token], choices.share[left].sum(axis=0))
        marginal = np.exp(Column(fold, split, choices).marginal)
        for token in range(24):
            left = (split.fold != fold) & (split.fold != split.fold[token])
            total = choices.share[left].sum(axis=0) + 1 / 3
            np.testing.assert_allclose(marginal[token], total / total.sum(), rtol=1e-5)
    assert split_of(domain[:2], sequence[:8]) is None


def test_read_outs_leave_out_the_tokens_own_fold_and_one_more():
    """What these tokens' experts are changes nothing that is predicted of them."""
    domain, sequence = np.zeros(6, int), np.repeat(np.arange(6), 10)
    rng, split = np.random.default_rng(1), split_of(domain, sequence)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(60, 3))
    for one, other in ((0, 0), (0, 3)):
        changed, seen = y.copy(), split.fold == other
        changed[(split.fold == one) | seen] += rng.normal(size=3)
        (before,), (after,) = (Features(x, split, of)._predicted(one, 1e-3) for of in (y, changed))
        np.testing.assert_allclose(before[seen], after[seen], rtol=1e-9)
        assert np.abs(before - after).max() > 0 or one == other


def test_what_cannot_be_predicted_says_so(make_decoder):
    def run(decoder, text):
        return run_probes(walk(decoder, text, RoutingLadder.needs), [RoutingLadder()])["routing_ladder"]

    texts = make_text([8, 8, 8, 8], width=8)
    assert "no layer has two experts" in run(make_decoder(num_experts=0), texts).notes[0]
    assert run(make_decoder(), make_text([8, 8], width=8)).notes == [FEW]
    assert "nothing is to be predicted" in run(make_decoder(num_experts_per_tok=4), texts).notes[0]
    ragged = run(make_decoder(num_experts=[0, 4, 6], router="relu"), texts)
    assert ragged.headlines
    assert all(np.isfinite(value) for value in ragged.scalars.values())
