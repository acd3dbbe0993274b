"""Traffic of experts on several ranks, against hand-made routings, and the settings of probes."""

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view, text_of

from moebed.errors import ConfigError
from moebed.model.routers import Routing
from moebed.parallel.traffic import (
    between_ranks,
    bytes_per_trip,
    even_trips,
    link_bytes,
    of_distance,
    slowest_link,
    trips_between_ranks,
    trips_to_all,
)
from moebed.views.layer import LayerView
from moebed.views.live import walk
from probes.registry import PROBES, make_probes
from probes.running.driver import needs_of, run_probes
from probes.running.provenance import Provenance


def _view(choices, text, experts=8, index=0, hidden=16):
    view = chosen_view(choices, experts, text, index)
    view.moe_input = torch.zeros(len(choices), hidden)
    return view


def _told(views, **options):
    (one,) = make_probes(["traffic"], {"traffic": options})
    return run_probes(views, [one])["traffic"]


def test_rows_of_a_matrix_are_ranks_of_tokens_and_columns_of_experts():
    text = text_of([[1] * 4, [2] * 4], [0, 1], ("books", "code"))
    choices = [[0, 7], [1, 6], [2, 5], [3, 4], [0, 1], [0, 1], [0, 1], [0, 1]]
    found = _told([_view(choices, text)], ranks=4, ranks_per_node=2).arrays["assignments/0"]
    # Tokens 0, 1 are on rank 0; experts 0, 1 are too.
    assert found.tolist() == [[2, 0, 0, 2], [0, 2, 2, 0], [4, 0, 0, 0], [4, 0, 0, 0]]


def test_3_7_12_distances_are_all_assignments():
    random = np.random.default_rng(0)
    choices = random.permuted(np.tile(np.arange(8), (120, 1)), axis=1)[:, :2]
    text = text_of([[1] * 60, [2] * 60], [0, 1], ("books", "code"))
    for ranks, on_node in ((1, 1), (2, 1), (4, 2), (8, 2), (8, 4), (8, 8)):
        arrays = _told([_view(choices, text)], ranks=ranks, ranks_per_node=on_node).arrays
        assert arrays["assignments/0"].sum() == 240
        shares = [float(arrays[f"{where}/0"]) for where in ("self", "node", "across")]
        assert sum(shares) == pytest.approx(1)
        assert np.bincount(of_distance(ranks, on_node).ravel(), minlength=3).sum() == ranks**2
        trips = arrays["trips/0"].sum()
        assert arrays["bytes/0"].sum() == trips * bytes_per_trip(16, 2, 2).both == trips * (4 * 2 * 16 + 2 * 12)
        # The least that 120 tokens make, and about as many as two experts drawn evenly do.
        assert 120 <= trips == pytest.approx(120 * even_trips(8, 2, ranks), rel=0.1)


def test_a_token_travels_once_to_a_rank_that_has_several_of_its_experts():
    text = text_of([[1] * 4], [0], ("books",))
    choices = [[0, 1], [2, 3], [2, 3], [1, 2]]  # of two ranks' four experts
    result = _told([_view(choices, text, experts=4)], ranks=2, ranks_per_node=1)
    assert result.arrays["assignments/0"].tolist() == [[2, 2], [1, 3]]
    assert result.arrays["trips/0"].tolist() == [[1, 1], [1, 2]]
    two, one = bytes_per_trip(16, 2, 2), bytes_per_trip(16, 2, 1)
    assert result.scalars["saved"] == pytest.approx(1 - 2 * two.both / (3 * one.both))
    gathered = _told([_view(choices, text, experts=4)], ranks=2, ranks_per_node=1, exchange="all_gather")
    assert gathered.arrays["bytes/0"].tolist() == [[2 * two.both] * 2] * 2
    assert gathered.scalars["saved"] == pytest.approx(1 - 4 * two.both / (3 * one.both))
    assert gathered.headlines["saved"].sentence.startswith("Every token goes to every rank: 1.45 times the bytes")
    assert even_trips(4, 2, 2) == pytest.approx(2 * (1 - 1 / 6))
    assert even_trips(4, 2, 2, "all_gather") == 2
    assert even_trips(8, 1, 4) == 1


def test_even_routing_has_even_shares():
    choices = np.arange(64)[:, None] % 8
    text = text_of([[1] * 64], [0], ("books",))
    result = _told([_view(choices, text)], ranks=8, ranks_per_node=4)
    shares = {key: result.scalars[key] for key in ("self", "node", "across")}
    assert shares == pytest.approx({"self": 1 / 8, "node": 3 / 8, "across": 4 / 8})
    assert result.scalars["across_expected"] == pytest.approx(1 / 2)
    assert result.scalars["busiest"] == pytest.approx(1)
    assert "50.0% of the assignments go to another node; 50.0% if the tokens of every rank" in (
        result.headlines["across"].sentence
    )


def test_experts_by_domain_are_near_and_shuffled_text_is_not():
    """Domains take turns in the text; their own experts are on the rank that has them only where it is sorted."""
    text = text_of([[1] * 8, [2] * 8] * 4, [0, 1] * 4, ("books", "code"))
    choices = np.repeat([0, 7] * 4, 8)[:, None]
    view = _view(choices, text)
    near = _told([view], ranks=2, ranks_per_node=1)
    assert near.scalars["across"] == 0
    assert near.scalars["across_expected"] == pytest.approx(0.5)
    assert _told([view], ranks=2, ranks_per_node=1, by_domain=False).scalars["across"] == pytest.approx(0.5)


def test_bytes_go_out_and_come_back_and_recomputation_repeats_the_way_forward():
    each, twice = bytes_per_trip(100, 4, 3), bytes_per_trip(100, 4, 3, recomputed=True)
    assert each == (400 + 12 + 12 + 400, 400 + 400 + 12)
    assert (twice.out - each.out, twice.back - each.back) == (424, 0)
    assert bytes_per_trip(100, 4, 3, recomputed=True, norm_after=True) == (twice.out, twice.back + 400)
    found = np.array([[0, 3], [1, 0]])
    sent = link_bytes(found, each)
    assert sent.tolist() == [[0, 3 * 824 + 812], [824 + 3 * 812, 0]]
    distance = of_distance(4, 2)
    assert distance.tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    sent = np.array([1e9, 60.0, 10.0])[distance]  # to itself, which takes no time, to the node, and across
    assert slowest_link(sent, distance, bandwidth_node=10.0, bandwidth_across=1.0) == 10
    assert slowest_link(sent, distance, bandwidth_node=2.0, bandwidth_across=1.0) == 30


def test_of_several_choices_those_that_do_not_stand_travel_nowhere():
    index = np.array([[0, -1], [3, 1], [-1, -1]])
    assert between_ranks(index, np.array([0, 1, 1]), 4, 2).tolist() == [[1, 0], [1, 1]]
    assert trips_between_ranks(index, np.array([0, 1, 1]), 4, 2).tolist() == [[1, 0], [1, 1]]
    assert trips_to_all(np.array([0, 1, 1]), 2).tolist() == [[1, 1], [2, 2]]
    weight = torch.tensor([[0.5, 0.0], [0.5, 0.5]])
    probs = torch.full((2, 4), 0.25)
    routing = Routing(probs.log(), probs, torch.tensor([[0, 1], [2, 3]]), weight, ragged=True)
    text = text_of([[1], [2]], [0, 0], ("books",))
    view = LayerView(0, 1, 4, 2, None, routing=routing, text=text, moe_input=torch.zeros(2, 8))
    found = probe([view], "traffic")["traffic"]
    assert "assignments/0" not in found.arrays  # two tokens on four ranks
    assert _told([view], ranks=2, ranks_per_node=1).arrays["assignments/0"].tolist() == [[1, 0], [0, 2]]


def test_layers_whose_experts_the_ranks_do_not_divide_are_left_out_in_words():
    text = text_of([[1] * 16], [0], ("books",))
    views = [_view(np.zeros((16, 1), int), text, experts, index) for index, experts in enumerate((8, 6))]
    result = probe(views, "traffic")["traffic"]
    assert "assignments/0" in result.arrays
    assert result.notes[0] == "left out, as 4 ranks do not divide their experts: layers 1"
    alone = probe(views[1:], "traffic")["traffic"]
    assert alone.notes == ["the ranks do not divide any layer's experts: there is no traffic"]


def test_it_sees_a_live_model_whatever_its_router(make_decoder, text):
    for router in ("softmax_topk", "hash", "grap", "locmoe_plus", "relu"):
        decoder = make_decoder(router=router, num_experts=[4, 0, 8])
        probes = make_probes(["traffic", "capacity"], {"traffic": {"ranks": 2, "ranks_per_node": 1}})
        found = run_probes(walk(decoder, text, needs_of(probes)), probes)
        for layer in (0, 2):
            stands = found["traffic"].arrays[f"assignments/{layer}"].sum()
            assert stands == 50 if router != "relu" else stands > 0
        assert ("load/0" in found["capacity"].arrays) == (router != "hash")
        for result in found.values():
            assert all(figure() for figure in result.figures.values())
            assert all(np.isfinite(value) for value in result.scalars.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"traffic": {"rank": 2}}, "traffic has no option 'rank'; did you mean 'ranks'?"),
        ({"traffic": {"ranks": "two"}}, "ranks is 'two'; it must be such as 4"),
        ({"traffic": {"ranks": 4, "ranks_per_node": 3}}, "has ranks 4 and ranks_per_node 3"),
        ({"traffic": {"bandwidth_node": 0}}, "a bandwidth that is not above 0"),
        ({"trafic": {"ranks": 2}}, "options are given for 'trafic', which does not run; did you mean 'traffic'?"),
        ({"balance": {"ranks": 2}}, "balance has no option 'ranks'; it has none"),
    ],
)
def test_settings_that_a_probe_does_not_have_are_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        make_probes(["balance", "traffic"], options)
    assert words in str(caught.value)


def test_kept_numbers_belong_to_their_probes_settings():
    plain, told = Provenance({"step": 1}), Provenance({"step": 1, "options": {"traffic": {"ranks": 2}}})
    assert plain.inputs("balance") == told.inputs("balance")
    assert plain.inputs("traffic") != told.inputs("traffic")
    assert plain.streams == told.streams
    assert plain.fingerprint("balance") == told.fingerprint("balance")
    assert PROBES["traffic"]().options.ranks == 4
