"""control_content: shares by hand, the router's blindness, and routings that follow from one part alone."""

import numpy as np
import pytest
import torch
from probe_cases import make_text
from routed_cases import chosen_view, text_of

from moebed.errors import ConfigError
from moebed.views.layer import Need
from moebed.views.live import walk
from probes.control_content import FEW, ControlContent, _by_id, control_basis
from probes.figures.drawing import to_rgb
from probes.measures.paths import path_correlation
from probes.running.driver import run_probes

TEXTS, LENGTH, EXPERTS, HIDDEN = 12, 40, 4, 12
RNG = np.random.default_rng(5)
IDS = RNG.integers(6, size=(TEXTS, LENGTH))
GATE = torch.eye(EXPERTS, HIDDEN)


def found(*layers, shift_invariant=False, gate=GATE, ids=IDS):
    """The result of layers with hidden states (T, H) and first choices (T,)."""
    text, views = text_of(ids.tolist(), [0] * len(ids), ("text",)), []
    for n, (x, choice) in enumerate(layers):
        view = chosen_view(np.asarray(choice), EXPERTS, text, n)
        view.moe_input, view.gate, view.shift_invariant = torch.as_tensor(x).float(), gate, shift_invariant
        views.append(view)
    return run_probes(views, [ControlContent()])["control_content"]


def normal(*shape):
    return RNG.standard_normal(shape)


def test_shares_by_hand():
    """Rows e₀ and e₁: of (3, 4, 0, 12) they span 25 of 169; less their mean, e₀ − e₁, 1/2 of 169."""
    rows, x = torch.eye(2, 4), torch.tensor([[3.0, 4, 0, 12]]).expand(12, 4)
    for shift_invariant, share in ((False, 25 / 169), (True, 0.5 / 169)):
        arrays = found((x, [0] * 12), shift_invariant=shift_invariant, gate=rows, ids=IDS[:3, :4]).arrays
        assert arrays["control_share/0"] == pytest.approx(share, rel=1e-5)
        assert arrays["control_share_raw/0"] == pytest.approx(25 / 169, rel=1e-5)
        assert arrays["rank/0"] == 2 - shift_invariant


def test_the_router_is_blind_to_content(make_decoder, text):
    decoder = make_decoder()
    for view in walk(decoder, text, frozenset({Need.ROUTING})):
        basis = control_basis(view.gate, view.shift_invariant)
        control = view.moe_input @ basis @ basis.T
        content = (view.moe_input - control)[torch.randperm(len(control))]
        router = decoder.layers[view.index].mlp.router
        for x in (control, control + content):
            assert torch.equal(router(x, None).topk_index, view.routing.topk_index)


@pytest.mark.parametrize("part", ["control", "content"])
def test_the_part_that_the_next_layer_follows_from_names_it(part):
    x = normal(TEXTS * LENGTH, HIDDEN)
    seen = x[:, :EXPERTS] if part == "control" else x[:, EXPERTS : 2 * EXPERTS]
    result = found((x, x[:, :EXPERTS].argmax(axis=1)), (normal(*x.shape), seen.argmax(axis=1)))
    scalars = result.scalars
    for one in ("control", "content"):
        assert ("no more than" in result.headlines[f"next_by_{one}"].sentence) == (one != part)
    other = "content" if part == "control" else "control"
    assert scalars[f"next_by_{part}"] > 0.9
    assert scalars[f"next_by_{other}"] < scalars["next_by_most_common"] + 0.06
    assert scalars["own_by_control/layer_00"] > 0.9
    assert scalars["own_by_content/layer_00"] < 0.35
    assert scalars["control_share"] == pytest.approx(EXPERTS / HIDDEN, abs=0.03)  # of random states, as by chance
    assert scalars["control_share_data"] == pytest.approx(EXPERTS / HIDDEN, abs=0.06)
    assert abs(scalars["control_cos_next"]) < 0.1
    assert all(abs(scalars[f"id_share_{one}"]) < 0.05 for one in ("control", "content"))


def test_ids_and_paths():
    """Control follows from the id, content does not; paths by id alone, and by more than the id."""
    ids, tokens = IDS.ravel(), TEXTS * LENGTH
    x = normal(tokens, HIDDEN)
    x[:, :EXPERTS] = normal(6, EXPERTS)[ids]
    result = found(*((x, ids % EXPERTS) for _ in range(3)))
    assert result.scalars["id_share_control"] > 0.999
    assert abs(result.scalars["id_share_content"]) < 0.05
    assert abs(result.scalars["id_share_control_shuffled"]) < 0.05
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    few = _by_id(x, x[:, :3], torch.arange(400) // 2)
    assert abs(few["id_share_control"]) < 0.15  # of two tokens an id half the variance lies between ids by chance
    assert result.scalars["control_cos_next"] == pytest.approx(1, abs=1e-3)
    assert result.scalars["control_cos_next_shuffled"] < 0.6
    assert result.scalars["total_correlation"] == pytest.approx(result.scalars["total_correlation_same_id"])
    assert result.scalars["total_correlation_shuffled"] < 0.1 * result.scalars["total_correlation"]
    assert result.scalars["ids_per_path"] <= 2 < result.scalars["ids_per_path_shuffled"]
    low, high = result.headlines["next_by_control"].interval
    assert low <= result.headlines["next_by_control"].value <= high
    for build in result.figures.values():
        to_rgb(build())
    choice = RNG.integers(EXPERTS, size=tokens)
    beyond = path_correlation(np.stack([choice] * 3, axis=1), ids)
    assert beyond["total_correlation"] == pytest.approx(2 * beyond["path_entropy"])
    assert beyond["total_correlation_same_id"] < 0.1 * beyond["total_correlation"]


def test_what_cannot_be_taken_apart_says_so(make_decoder):
    def run(decoder, text):
        return run_probes(walk(decoder, text, ControlContent.needs), [ControlContent()])["control_content"]

    for decoder in (make_decoder(num_experts=0), make_decoder(router="hash")):
        assert "no layer has a router with gate embeddings" in run(decoder, make_text([8, 8, 8], width=8)).notes[0]
    few = run(make_decoder(), make_text([8, 7], width=8))
    assert FEW in few.notes
    assert list(few.headlines) == ["control_share", "path_correlation"]
    ragged = run(make_decoder(num_experts=[4, 0, 6], router="relu"), make_text([9, 8, 9, 9], width=9))
    assert set(ragged.headlines) == {"control_share", "next_by_control", "next_by_content"}
    with pytest.raises(ConfigError, match="path_layers is 1"):
        ControlContent.Options(path_layers=1)


def test_what_few_texts_teach_has_no_interval():
    x = normal(TEXTS * LENGTH, HIDDEN)
    layer = x, x[:, :EXPERTS].argmax(axis=1)
    few = slice(0, 8 * LENGTH)
    result = found(*[(layer[0][few], layer[1][few])] * 2, ids=IDS[:8])
    for part in ("control", "content"):
        assert result.headlines[f"next_by_{part}"].interval is None
    assert any("fewer than 12 texts" in note for note in result.notes)
    assert result.headlines["control_share"].interval is not None
