"""domain_purity: its measures by hand, planted routings, and its null."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view, text_of

from moebed.model.decoder import Decoder
from moebed.views.layer import Need, ProbeText
from moebed.views.live import walk
from probes.domain_purity import DomainPurity, matching, mutual_information, purity, utilisation
from probes.figures.drawing import to_rgb
from tests.conftest import tiny_config


def found(view):
    return probe([view], "domain_purity")["domain_purity"]


def values(result):
    return {name: headline.value for name, headline in result.headlines.items()}


def domains(texts=12, tokens=20, number=4):
    """A text of sequences of these domains, in turn."""
    names = tuple(f"d{index}" for index in range(number))
    return text_of([list(range(tokens))] * texts, [row % number for row in range(texts)], names)


def test_measures_by_hand():
    counts = np.array([[6.0, 2], [1, 5], [2, 0]])  # three experts, two domains
    assert purity(counts) == pytest.approx((6 + 5 + 2) / 16)
    joint = counts / 16
    outer = joint.sum(1, keepdims=True) * joint.sum(0)
    shared = (joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum()
    of_domain = -(joint.sum(0) * np.log(joint.sum(0))).sum()
    assert mutual_information(counts) == pytest.approx(shared / of_domain)
    # Two experts of the first domain and one of the second, as 3 are dealt to 2.
    share, of_expert = matching(counts)
    assert (share, of_expert.tolist()) == (pytest.approx((6 + 5 + 2) / 16), [0, 1, 0])
    assert utilisation(np.array([0.5, 0.375, 0.125])) == pytest.approx(1 / 3 + 1 / 3 + 0.125)


def test_the_matching_keeps_as_many_experts_for_each_domain():
    """Purity lets all experts be of the largest domain; a matching does not."""
    counts = np.array([[9.0, 1], [9, 1], [9, 1], [9, 1]])
    assert purity(counts) == pytest.approx(0.9)
    assert matching(counts)[0] == pytest.approx(20 / 40)
    share, of_expert = matching(np.array([[1.0, 5, 2, 0], [0, 4, 3, 1]]))  # fewer experts than domains
    assert (share, of_expert.tolist()) == (pytest.approx(8 / 16), [1, 2])


@pytest.mark.parametrize("experts", [4, 8])
def test_3_3_an_oracle_is_pure(experts):
    text = domains()
    block = experts // 4
    domain = text.domain[text.sequence]
    choices = domain * block + torch.arange(len(domain)) % block
    result = found(chosen_view(choices, experts, text))
    assert values(result) == pytest.approx(dict.fromkeys(("purity", "nmi", "matched", "utilisation"), 1.0))
    assert all(float(result.arrays[f"{key}_p/0"]) < 0.01 for key in ("purity", "nmi", "matched"))
    assert result.arrays["expert_domain/0"].tolist() == [index // block for index in range(experts)]


def test_3_3_a_random_router_has_the_purity_of_the_largest_domain():
    text = text_of([list(range(400))] * 8, [0, 0, 0, 0, 0, 1, 1, 2], ("a", "b", "c"))
    choices = torch.randint(4, (3200,), generator=torch.Generator().manual_seed(0))
    result = found(chosen_view(choices, 4, text))
    measured = values(result)
    assert measured["purity"] == pytest.approx(5 / 8, abs=0.01)
    assert measured["nmi"] < 0.01
    assert measured["utilisation"] > 0.97
    assert all(float(result.arrays[f"{key}_p/0"]) > 0.01 for key in ("purity", "nmi", "matched"))
    assert "with the texts' domains shuffled 0.62" in result.headlines["purity"].sentence


def test_experts_may_have_any_names():
    text = domains()
    domain = text.domain[text.sequence]
    result = found(chosen_view(torch.tensor([2, 0, 3, 1])[domain], 4, text))
    assert values(result) == pytest.approx(dict.fromkeys(("purity", "nmi", "matched", "utilisation"), 1.0))
    assert result.arrays["expert_domain/0"].tolist() == [1, 3, 0, 2]


def test_one_expert_for_all_is_pure_of_nothing():
    result = found(chosen_view(torch.zeros(240, dtype=torch.long), 4, domains()))
    assert values(result) == pytest.approx({"purity": 0.25, "nmi": 0, "matched": 0.25, "utilisation": 0.25})


def test_domains_that_switch_within_a_text_are_those_of_tokens():
    text = domains(texts=6, number=2)
    switching = (torch.arange(21) // 5 + torch.arange(6).unsqueeze(1)) % 2
    text = replace(text, token_domain=switching)
    result = found(chosen_view(switching[text.token_mask], 2, text))
    assert values(result)["matched"] == pytest.approx(1)
    assert result.arrays["matched_null/0"][0] < 0.9
    plain = found(chosen_view(switching[text.token_mask], 2, replace(text, token_domain=None)))
    assert values(plain)["matched"] < 0.7


def test_a_live_oracle_is_pure_and_its_pictures_are_drawn():
    config = tiny_config(router="oracle", router_options={"num_domains": 2}, num_experts_per_tok=1)
    ids = torch.randint(0, 96, (6, 30), generator=torch.Generator().manual_seed(0))
    domain = torch.arange(6) % 2
    mask = torch.ones_like(ids, dtype=torch.bool)
    token_domain = domain.unsqueeze(1).expand_as(ids)
    text = ProbeText(ids, mask, domain, ("a", "b"), token_domain=token_domain)
    result = probe(walk(Decoder(config), text, frozenset({Need.ROUTING})), "domain_purity")["domain_purity"]
    assert [values(result)[name] for name in ("purity", "nmi", "matched")] == pytest.approx([1, 1, 1])
    again = DomainPurity.describe(result.arrays)
    assert set(again.figures) == {"measures", "counts"}
    for draw in again.figures.values():
        assert to_rgb(draw()).std() > 0


def test_one_domain_is_nothing_to_belong_to():
    result = found(chosen_view(torch.zeros(20, dtype=torch.long), 2, domains(1, 20, 1)))
    assert result.notes == ["the text has one domain: experts cannot belong to any other"]
