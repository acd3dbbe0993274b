"""domain_share: shares by hand, its statistics, and the published counts of Mixtral."""

import json
import math

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view, text_of

from moebed.views.layer import LayerView
from probes.balance import unevenness
from probes.contract import by_part
from probes.domain_share import RAISED, DomainShare, divergence, shares_of_counts
from probes.figures.drawing import to_rgb
from probes.measures.choices import domain_keys, first_middle_last, overlap_by_chance
from probes.measures.resampling import p_value, shuffle_labels, smallest_p
from tests.conftest import SHARED

PUBLISHED = "data/published_mixtral_expert_counts.json"


def domain_share(views):
    return probe(views, "domain_share")["domain_share"]


def two_domains(unsorted=False):
    text = text_of([[1, 2, 3], [4], [5, 6]], [0, 1, 0], ("code", "prose"))
    choices = [[0, 1], [0, 2], [1, 0], [3, 2], [0, 1], [1, 3]]
    return chosen_view(choices, 4, text, index=5, unsorted=unsorted)


@pytest.mark.parametrize("unsorted", [False, True])
def test_shares_by_hand(unsorted):
    arrays = domain_share([two_domains(unsorted)]).arrays
    assert arrays["share_first/5/code"] == pytest.approx([3 / 5, 2 / 5, 0, 0])
    assert arrays["share_second/5/code"] == pytest.approx([1 / 5, 2 / 5, 1 / 5, 1 / 5])
    assert arrays["share_any/5/code"] == pytest.approx([4 / 10, 4 / 10, 1 / 10, 1 / 10])
    assert arrays["share_tokens_any/5/code"] == pytest.approx([4 / 5, 4 / 5, 1 / 5, 1 / 5])
    assert arrays["share_first/5/prose"] == pytest.approx([0, 0, 0, 1])
    assert arrays["count_first/5"].tolist() == [[2, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    assert arrays["count_any/5"].sum(axis=1).tolist() == [6, 2, 4]
    assert arrays["domain"].tolist() == [0, 1, 0]
    assert arrays["domain_names"].tolist() == ["code", "prose"]


def test_divergence_by_hand():
    code, prose = np.array([0.4, 0.4, 0.1, 0.1]), np.array([0, 0, 0.5, 0.5])
    mixed = (code + prose) / 2
    wanted = sum(0.5 * sum(p * math.log(p / m) for p, m in zip(q, mixed, strict=True) if p) for q in (code, prose))
    result = domain_share([two_domains()])
    assert float(result.arrays["divergence/5"]) == pytest.approx(wanted, rel=1e-5)
    assert result.headlines["divergence"].value == pytest.approx(wanted, rel=1e-5)
    assert divergence(np.eye(3)) == pytest.approx(math.log(3))
    assert divergence(np.full((2, 4), 0.25)) == 0


def test_three_texts_are_too_few_to_tell_and_it_says_so():
    result = domain_share([two_domains()])
    assert "p below 0.33" in result.notes[0]
    assert float(result.arrays["mean_divergence_p"]) >= 0.3
    assert smallest_p(np.array([0, 0, 1])) == pytest.approx(1 / 3)
    assert smallest_p(np.array([0, 0, 1, 1])) == pytest.approx(1 / 3)  # the two pairs may change places


def many_texts(apart: float, layers=(0, 3), experts=(4, 6), seed=0):
    """40 texts of 30 tokens, each with its own taste; domains differ by ``apart`` besides."""
    random = torch.Generator().manual_seed(seed)
    text = text_of([list(range(30))] * 40, [n % 2 for n in range(40)], ("a/b", "a%2Fb"))
    views = []
    for layer, count in zip(layers, experts, strict=True):
        taste = (
            0.7 * torch.randn(40, count, generator=random)
            + apart * torch.randn(2, count, generator=random)[text.domain]
        )
        logits = taste[text.sequence] + torch.randn(1200, count, generator=random)
        views.append(chosen_view(logits.topk(2).indices, count, text, layer))
    return views


def test_domains_that_differ_stand_out_of_the_null_and_others_do_not():
    apart, alike = domain_share(many_texts(1.0)), domain_share(many_texts(0.0, seed=3))
    measured, null = (float(apart.arrays[key].flat[0]) for key in ("mean_divergence", "mean_divergence_null"))
    assert float(apart.arrays["mean_divergence_p"]) == pytest.approx(1 / 1001)
    assert measured > 3 * null > 0
    assert measured > float(apart.arrays["mean_divergence_null"][1])
    assert float(alike.arrays["mean_divergence_p"]) > 0.05
    assert alike.headlines["divergence"].value > 0  # never 0, and still no finding
    assert "p = 0.001" in apart.headlines["divergence"].sentence
    assert apart.notes == [f"divergence: {RAISED}"]


def test_the_null_is_that_of_shuffled_labels():
    arrays = domain_share(many_texts(0.3)).arrays
    random, domain, null = np.random.default_rng(9), arrays["domain"].copy(), {0: [], 3: []}
    for _ in range(400):
        random.shuffle(domain)
        for layer, found in null.items():
            count = arrays[f"count_any/{layer}"]
            shares = np.stack(
                [count[domain == number].sum(axis=0) / count[domain == number].sum() for number in (0, 1)]
            )
            found.append(float(divergence(shares)))
    for layer, found in null.items():
        wanted = [np.mean(found), np.quantile(found, 0.95)]
        assert arrays[f"divergence_null/{layer}"] == pytest.approx(wanted, rel=0.15)
    over_layers = np.mean(list(null.values()), axis=0)
    wanted = [np.mean(over_layers), np.quantile(over_layers, 0.95)]
    assert arrays["mean_divergence_null"] == pytest.approx(wanted, rel=0.15)


def test_the_same_text_gives_the_same_intervals():
    one, two = domain_share(many_texts(0.5)).arrays, domain_share(many_texts(0.5)).arrays
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_intervals_hold_the_share_and_widen_with_fewer_texts():
    arrays = domain_share(many_texts(0.5)).arrays
    share, ends = arrays["share_any/0/a%2Fb"], arrays["share_any_interval/0/a%2Fb"]
    assert ends.shape == (2, 4)
    assert (ends[0] <= share).all()
    assert (share <= ends[1]).all()
    means = arrays["count_any/0"][::2] / 60.0  # each text's own shares, which all have as many tokens
    assert (ends[1] - ends[0]) == pytest.approx(2 * 1.96 * means.std(axis=0) / math.sqrt(20), rel=0.2)


def test_odd_names_make_different_keys():
    assert domain_keys(["a/b", "a%2Fb", "", "all", "x", "x", "\x00"]) == [
        "a%2Fb", "a%252Fb", "%", "all%2", "x", "x%2", "%00",
    ]  # fmt: skip
    found = by_part(domain_share(many_texts(0.5)).arrays, "share_first")
    assert list(found) == ["a%2Fb", "a%252Fb"]
    assert [value.shape for value in found["a%2Fb"].values()] == [(4,), (6,)]


def test_one_domain_has_shares_and_a_note():
    text = text_of([[1, 2], [3, 4]], [0, 0], ("all", "empty"))
    result = domain_share([chosen_view([[0], [1], [1], [1]], 2, text)])
    assert result.arrays["share_first/0/all%2"] == pytest.approx([0.25, 0.75])
    assert "share_second/0/all%2" not in result.arrays
    assert "divergence/0" not in result.arrays
    assert not result.headlines
    assert "one domain" in result.notes[0]
    for build in result.figures.values():
        assert to_rgb(build()).std() > 1


@pytest.mark.parametrize("experts", [3, 40])
def test_pictures_of_few_and_of_many_experts(experts):
    figures = domain_share(many_texts(0.5, experts=(experts, 5))).figures
    assert set(figures) == {"share_first", "share_second", "share_any", "divergence"}
    assert to_rgb(figures["share_second"]()).std() > 1


def test_one_expert():
    text = text_of([[1, 2], [3, 4]], [0, 1], ("a", "b"))
    result = domain_share([chosen_view([0, 0, 0, 0], 1, text)])
    assert float(result.arrays["divergence/0"]) == 0
    assert float(result.arrays["divergence_p/0"]) == 1
    for build in result.figures.values():
        assert to_rgb(build()).std() > 1


def test_dense_layers_are_passed_over():
    result = domain_share([LayerView(0, 2, 0, 0, None), two_domains()])
    assert {int(key.split("/")[1]) for key in result.arrays if "/" in key} == {5}
    assert domain_share([LayerView(0, 1, 0, 0, None)]).notes


def test_describe_needs_the_arrays_alone():
    result = domain_share(many_texts(0.5))
    again = DomainShare.describe(dict(result.arrays))
    assert again.scalars == result.scalars
    assert again.headlines == result.headlines


def test_shuffled_labels_keep_the_groups_sizes():
    group = np.array([0, 1, 0, 0, 1, 2])
    shuffled = shuffle_labels(group, draws=50)
    assert (np.sort(shuffled, axis=1) == np.sort(group)).all()
    assert len(np.unique(shuffled, axis=0)) > 20
    assert p_value(2.0, np.array([1.0, 2.0, 3.0])) == pytest.approx(3 / 4)


def test_chance_and_the_layers_pictured():
    assert overlap_by_chance(8, 2) == pytest.approx(0.464, abs=5e-4)
    assert overlap_by_chance(4, 3) == 1
    assert first_middle_last(range(32)) == [0, 15, 31]
    assert first_middle_last([7]) == [7]
    assert first_middle_last([]) == []


@pytest.mark.shared(PUBLISHED)
def test_the_published_counts_of_mixtral():
    published = json.loads((SHARED / PUBLISHED).read_text())
    for name, entry in published.items():
        counts, tokens = entry["counts"], entry["tokens"]
        chosen = 2 if "|topk|" in name else 1
        assert sum(counts) == chosen * tokens
        share = shares_of_counts(np.array(counts))
        assert share == pytest.approx([count / (chosen * tokens) for count in counts])
        assert shares_of_counts(np.array(counts), tokens) == pytest.approx([count / tokens for count in counts])
        uneven = unevenness(np.array(counts, dtype=float))
        mean = sum(counts) / 8
        assert uneven.max_violation == pytest.approx(max(counts) / mean - 1)
        assert uneven.cv == pytest.approx(math.sqrt(sum((count - mean) ** 2 for count in counts) / 8) / mean)
        entropy = -sum(count / sum(counts) * math.log(count / sum(counts)) for count in counts) / math.log(8)
        assert uneven.entropy == pytest.approx(entropy)
        assert uneven.dead == 0
        assert 0 < share.min() < 1 / 8 < share.max() < 2 / 8
    last = [np.array(published[f"mistral|topk|{domain}|layer15"]["counts"]) for domain in ("github", "c4")]
    assert 0 < divergence(shares_of_counts(np.stack(last))) < math.log(2)
