"""committee: planted uses of experts, what finite text makes of equal ones, and the numbers by hand."""

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view, text_of

from probes.committee import gini, held_out_mass, overlap_of_top, parts
from probes.figures.drawing import to_rgb


def found(choices, experts, text):
    return probe([chosen_view(choices, experts, text)], "domain_share", "committee")["committee"]


def drawn(by_domain, texts=24, tokens=60, seed=0):
    """Texts whose tokens draw their expert with their domain's probabilities, and those of the text itself."""
    generator = np.random.default_rng(seed)
    domain = np.arange(texts) % len(by_domain)
    own = [generator.dirichlet(8 * np.asarray(by_domain[of]) + 1e-9) for of in domain]
    choices = np.concatenate([generator.choice(len(p), tokens, p=p) for p in own])
    names = tuple(f"d{number}" for number in range(len(by_domain)))
    return torch.from_numpy(choices), text_of([list(range(tokens))] * texts, domain.tolist(), names)


def test_domains_that_use_experts_alike_have_no_part():
    """One committee for all: what domains add is 0 within its interval, though no two texts are alike."""
    choices, text = drawn([[0.55, 0.25, 0.1, 0.06, 0.04]] * 3)
    result = found(choices, 5, text)
    value, (low, high) = result.headlines["interaction"].value, result.headlines["interaction"].interval
    assert abs(value) < 0.1
    assert low < 0 < high
    assert result.headlines["top_mass"].value == pytest.approx(0.55, abs=0.07)
    assert result.headlines["top_jaccard"].value == 1
    assert float(result.arrays["top_jaccard_p/0"]) == 1
    assert result.headlines["gini"].value > 0.4
    for build in result.figures.values():
        to_rgb(build())


def test_an_expert_for_each_domain_is_all_interaction():
    choices, text = drawn(np.eye(4), texts=16)
    result = found(choices, 4, text)
    assert result.headlines["interaction"].value == pytest.approx(1, abs=1e-6)
    assert result.scalars["expert_part"] == pytest.approx(0, abs=1e-6)
    assert result.scalars["domain_part"] == pytest.approx(3)  # E - 1: each domain's share is 4 of a mean of 1
    assert result.headlines["top_jaccard"].value == 0
    assert float(result.arrays["top_jaccard_null/0"][0]) > 0.1
    assert result.headlines["top_mass"].value == pytest.approx(0.25)
    assert result.headlines["gini"].value == pytest.approx(0, abs=1e-6)


def test_domains_with_other_favourites_are_told_from_chance():
    """Four of sixteen experts a token, and four favourites a domain, on texts that use all of them."""
    generator = np.random.default_rng(2)
    weight = [np.roll(np.repeat([0.16, 0.03], [4, 12]), 4 * number) for number in range(4)]
    choices = [generator.choice(16, 4, replace=False, p=weight[row % 4]) for row in range(24) for _ in range(30)]
    text = text_of([list(range(30))] * 24, [row % 4 for row in range(24)], ("a", "b", "c", "d"))
    result = found(torch.from_numpy(np.array(choices)), 16, text)
    assert result.headlines["top_jaccard"].value == 0
    assert float(result.arrays["top_jaccard_p/0"]) < 0.05
    assert result.scalars["top_jaccard_null"] > 0.1
    low, high = result.headlines["interaction"].interval
    assert 0.3 < low < result.headlines["interaction"].value < high


def test_even_experts_have_no_committee_however_few_texts():
    """Ranked and measured on the same texts the first of ten would seem to have far more than a tenth."""
    seen = [drawn([[0.1] * 10] * 2, texts=6, tokens=20, seed=seed) for seed in range(40)]
    shares = []
    for choices, text in seen:
        counts = np.stack([np.bincount(choices[text.sequence == row], minlength=10) for row in range(6)])
        shares.append(counts / 20)
    domain = np.arange(6) % 2
    held_out = np.mean([held_out_mass(share, domain) for share in shares], axis=0)
    np.testing.assert_allclose(held_out, np.arange(1, 11) / 10, atol=0.04)
    assert np.mean([share.mean(axis=0).max() for share in shares]) > 0.15
    assert abs(np.mean([gini(held_out_mass(share, domain)) for share in shares])) < 0.05
    both = np.array([parts(share, domain) for share in shares])
    assert (np.abs(both.mean(axis=0)) < 3 * both.std(axis=0) / 40**0.5).all()  # as expected, nothing


def test_by_hand():
    share = np.array([[0.6, 0.4, 0], [0.8, 0.2, 0], [0.1, 0.4, 0.5], [0.3, 0.4, 0.3]])
    domain = np.array([0, 0, 1, 1])
    # Of texts 0 and 2: .35, .4, .25; of 1 and 3: .55, .3, .15.
    np.testing.assert_allclose(held_out_mass(share, domain), [(0.3 + 0.35) / 2, (0.85 + 0.75) / 2, 1])
    assert gini(np.array([1.0, 1, 1])) == pytest.approx(2 / 3)
    of_experts, of_domains = parts(share, domain)
    noise = (0.02 + 0.02 + 0.02 + 0 + 0.02) / 2
    common, apart = np.array([0.45, 0.35, 0.2]), np.array([0.25, -0.05, -0.2])
    assert of_experts == pytest.approx(3 * (((common - 1 / 3) ** 2).sum() - noise / 4))
    assert of_domains == pytest.approx(3 * ((2 * apart**2).sum() - noise / 2) / 2)
    assert overlap_of_top(share, domain[None], 2).tolist() == [pytest.approx(1 / 3)]
    assert overlap_of_top(share, domain[None], 1).tolist() == [0]


def test_a_long_text_weighs_as_a_short_one():
    """One of four texts is ten times as long, and the only one to use expert 1."""
    text = text_of([[1] * 4, [1] * 40, [1] * 4, [1] * 4], [0] * 4, ("a",))
    result = found([0] * 4 + [1] * 40 + [0] * 8, 3, text)
    np.testing.assert_allclose(result.arrays["top_mass/0"], [(1 / 2 + 1) / 2, 1, 1], atol=1e-6)


def test_one_domain_and_single_texts_are_said():
    choices, text = drawn([[0.5, 0.3, 0.2]], texts=4)
    result = found(choices, 3, text)
    assert {*result.headlines} == {"top_mass", "gini"}
    assert any("one domain" in note for note in result.notes)
    choices, text = drawn([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], texts=2)
    result = found(choices, 3, text)
    assert "interaction" not in result.headlines
    assert any("a domain of one text" in note for note in result.notes)
    assert found([0] * 8, 1, text_of([[1, 2, 3, 4]] * 2, [0, 1], ("a", "b"))).notes
