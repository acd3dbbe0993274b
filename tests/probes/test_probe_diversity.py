"""layer_diversity and weight_vs_output: arithmetic on given similarities, exact p values, few layers."""

import numpy as np
import pytest
from scipy.stats import linregress, spearmanr

from moebed.views.layer import MATRICES
from probes.contract import Probe, ProbeResult
from probes.figures.drawing import to_rgb
from probes.layer_diversity import LayerDiversity, deviation, trend
from probes.running.driver import ProbePass, run_probes
from probes.weight_vs_output import WeightVsOutput


def square(pairs, extra=0.9):
    """A symmetric matrix of three experts and one that is not routed, from its three pairs (1,0), (2,0), (2,1)."""
    matrix = np.full((4, 4), extra, np.float32)
    matrix[[1, 2, 2], [0, 0, 1]] = matrix[[0, 0, 1], [1, 2, 2]] = pairs
    np.fill_diagonal(matrix, 1)
    return matrix


def sources(layers, weights, outputs, reordered=None):
    """Arrays of the source probes, pairs of three experts by layer."""
    count = {f"num_experts/{layer}": np.asarray(3) for layer in layers}
    angular = {f"output_angular_mean/{layer}": square(outputs[layer]) for layer in layers}
    # Three texts, of which each alone makes the outputs of the first pair a little more alike.
    pairs = {n: np.r_[outputs[n], [0.9] * 3].astype(np.float32) for n in layers}
    angular |= {f"pairs_without/{n}": pairs[n] + np.eye(3, 6, dtype=np.float32) * 0.01 for n in layers}
    angular |= {"unit_stratum": np.zeros(3, np.int16)}
    found = {
        "expert_outputs": count | angular,
        "matrix_similarity": {f"matrix_cos/{n}/{m}": square(weights[n]) for n in layers for m in MATRICES},
        "neuron_similarity": {f"neuron_mean_cos/{n}/{m}": square(-weights[n]) for n in layers for m in MATRICES},
    }
    if reordered is not None:
        found["neuron_matching"] = {f"reorder_cos/{n}/{m}": square(reordered[n]) for n in layers for m in MATRICES}
    return found


def result_of(probe, found):
    probe.derive(found)
    return probe.compute()


def test_r_by_hand():
    weights, outputs = {2: np.array([0.1, 0.2, 0.6])}, {2: np.array([0.5, 0.7, 0.6])}
    result = result_of(WeightVsOutput(), sources([2], weights, outputs))
    r = np.corrcoef(weights[2], outputs[2])[0, 1]
    for name in MATRICES:
        assert result.arrays[f"weight_output_r/2/{name}"] == pytest.approx(r, abs=1e-6)
        assert result.arrays[f"weight_output_r_mean/2/{name}"] == pytest.approx(-r, abs=1e-6)
        assert result.headlines[f"r_{name}"].value == pytest.approx(r, abs=1e-6)
    assert not any("reordered" in key for key in [*result.arrays, *result.headlines, *result.figures])


def test_reordered_where_matching_ran_as_well():
    values = {0: np.array([0.1, 0.2, 0.6])}
    result = result_of(WeightVsOutput(), sources([0], values, values, {0: values[0] ** 2}))
    assert result.headlines["r_reordered_down"].value == pytest.approx(np.corrcoef(values[0], values[0] ** 2)[0, 1])
    for build in result.figures.values():
        to_rgb(build())


def test_equal_pairs_have_no_r_and_are_drawn_all_the_same():
    layers = [0, 1]
    weights = {0: np.full(3, 0.5), 1: np.array([0.1, 0.2, 0.3])}
    outputs = {layer: np.array([0.5, 0.6, 0.7]) for layer in layers}
    result = result_of(WeightVsOutput(), sources(layers, weights, outputs))
    assert np.isnan(result.arrays["weight_output_r/0/up"])
    assert result.scalars["r_up"] == pytest.approx(1)
    assert "r_up/layer_00" not in result.scalars
    for build in result.figures.values():
        to_rgb(build())
    none = result_of(WeightVsOutput(), sources([0], weights, outputs))
    assert not none.headlines
    assert none.notes


def test_two_experts_are_too_few_for_r():
    found = sources([0], {0: np.zeros(3)}, {0: np.zeros(3)})
    found["expert_outputs"]["num_experts/0"] = np.asarray(2)
    result = result_of(WeightVsOutput(), found)
    assert result.notes
    assert not result.figures
    assert "diversity/0/outputs" in result_of(LayerDiversity(), found).arrays


def test_diversity_leaves_out_what_is_not_routed():
    pairs = {0: np.array([0.1, 0.2, 0.6])}
    arrays = result_of(LayerDiversity(), sources([0], pairs, pairs)).arrays
    assert arrays["diversity/0/outputs"] == pytest.approx(0.7)
    assert arrays["diversity/0/matrix_up"] == pytest.approx(0.7)
    assert arrays["diversity/0/neuron_down"] == pytest.approx(1.3)


def rising(count, last):
    values = {layer: np.full(3, 0.9 - 0.05 * layer) for layer in range(count)}
    values[count - 1] = np.full(3, last)
    return values


def test_a_rise_but_for_the_last_layer():
    values = rising(8, last=0.95)
    result = result_of(LayerDiversity(), sources(range(8), values, values))
    assert result.headlines["rises_outputs"].value == pytest.approx(1)
    assert "rises with depth" in result.headlines["rises_outputs"].sentence
    assert result.headlines["last_layer_outputs"].value < -10
    assert "stands out" in result.headlines["last_layer_weights"].sentence
    assert "below" in result.headlines["last_layer_weights"].sentence
    to_rgb(result.figures["over_depth"]())


def test_a_straight_line_has_no_outlier():
    values = rising(8, last=0.9 - 0.05 * 7)
    headline = result_of(LayerDiversity(), sources(range(8), values, values)).headlines["last_layer_outputs"]
    assert headline.value == pytest.approx(0, abs=0.01)
    assert "does not surely stand out" in headline.sentence


def test_four_layers_are_too_few():
    values = rising(4, last=0.1)
    result = result_of(LayerDiversity(), sources(range(4), values, values))
    assert list(result.headlines) == ["diversity_outputs"]
    assert "fewer than 5 layers" in result.notes[0]


def test_five_layers_can_rise_but_not_surely():
    values = rising(5, last=0.1)
    sentence = result_of(LayerDiversity(), sources(range(5), values, values)).headlines["rises_outputs"].sentence
    assert "shows no sure trend" in sentence
    assert "p = 0.083" in sentence  # 2 of 4! orders


def test_trend_is_scipys_and_exact_for_few():
    values = np.array([0.3, 0.1, 0.5, 0.4, 0.6, 0.2, 0.9, 0.8, 0.7])
    want = spearmanr(np.arange(9), values)
    assert trend(values).value == pytest.approx(want.statistic)
    assert trend(values).p == pytest.approx(want.pvalue)
    assert trend(np.array([1.0, 2, 3, 4])) == (pytest.approx(1), pytest.approx(2 / 24))
    assert trend(np.array([4.0, 3, 2, 1])).value == pytest.approx(-1)
    assert trend(np.ones(6)) == (0.0, 1.0)


def test_deviation_is_that_of_a_predicted_point():
    generator = np.random.default_rng(0)
    layers = np.array([0, 1, 2, 4, 5, 7])
    values = 0.3 * layers + generator.normal(size=6)
    fit = linregress(layers[:-1], values[:-1])
    away = values[-1] - fit.intercept - fit.slope * 7
    mean = layers[:-1].mean()
    spread = np.sqrt(((values[:-1] - fit.intercept - fit.slope * layers[:-1]) ** 2).sum() / 3)
    error = spread * np.sqrt(1 + 1 / 5 + (7 - mean) ** 2 / ((layers[:-1] - mean) ** 2).sum())
    found, (value, p) = deviation(layers, values)
    assert found == pytest.approx(away)
    assert value == pytest.approx(away / error)
    assert 0 < p < 1


def test_a_last_layer_like_the_others_rarely_stands_out():
    generator = np.random.default_rng(0)
    share = np.mean([deviation(np.arange(6), generator.normal(size=6))[1].p < 0.05 for _ in range(2000)])
    assert share == pytest.approx(0.05, abs=0.015)


def test_optional_sources_are_given_only_where_they_run():
    class Named(Probe):
        name, needs = "one", frozenset()

    class Other(Named):
        name = "two"

    class Derived(Named):
        name, sources, optional_sources = "three", ("one",), ("two",)

        def derive(self, found):
            self.given = list(found)

        @classmethod
        def describe(cls, arrays):
            return ProbeResult(arrays)

    alone, both = Derived(), Derived()
    run_probes([], [alone, Named()])
    assert alone.given == ["one"]
    ProbePass([both, Other(), Named()]).results()
    assert both.given == ["one", "two"]
