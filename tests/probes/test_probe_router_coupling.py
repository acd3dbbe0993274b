"""router_coupling on experts and routers whose coupling is planted, and against a loop over neurons."""

from itertools import permutations

import numpy as np
import pytest
import torch
from probe_cases import probe

from moebed.views.layer import LayerView, Need
from moebed.views.live import walk
from probes.figures.drawing import to_rgb

OWN = (1, 0, 3, 2)  # an order in which no expert is at its own place


class Given:
    """Experts whose neurons of ``gate`` and ``up`` are given, (E, F, H)."""

    def __init__(self, gate, up=None):
        self.matrices = {"gate": gate, "up": gate if up is None else up, "down": gate.transpose(1, 2)}

    def expert_matrix(self, name, index, rows):
        return self.matrices[name][index][rows]

    def expert_shape(self, name):
        return tuple(self.matrices[name].shape[1:])


def view(rows, gate, up=None, shift_invariant=False, index=0):
    return LayerView(index, 1, len(gate), 2, rows, shift_invariant=shift_invariant, weights=Given(gate, up))


def coupling(*views):
    return probe(views, "router_coupling")["router_coupling"]


def planted():
    """Four experts of two neurons, all of them the expert's own row of the router."""
    return torch.eye(4), torch.eye(4).unsqueeze(1).repeat(1, 2, 1)


def test_experts_that_answer_their_own_row_alone():
    result = coupling(view(*planted()))
    np.testing.assert_allclose(result.arrays["response/0/raw"], 2**0.5 * np.eye(4), rtol=1e-6)
    np.testing.assert_allclose(result.arrays["response_relative/0/raw"], 2 * np.eye(4), rtol=1e-6)
    np.testing.assert_allclose(result.arrays["gate_cos_mean/0/raw"], np.eye(4), rtol=1e-6)
    np.testing.assert_allclose(result.arrays["up_energy/0/raw"], np.eye(4), rtol=1e-6)
    assert result.arrays["top1_expert/0/raw"] == result.arrays["top1_row/0/raw"] == 1
    assert result.arrays["matched/0/raw"] == pytest.approx(2)
    assert result.arrays["unmatched/0/raw"] == result.arrays["row_cos/0/raw"] == 0
    assert result.arrays["coupling_p/0/raw"] == pytest.approx(1 / 24)
    told = {key: result.headlines[key].value for key in ("matched", "unmatched", "row_cos_raw")}
    assert told == pytest.approx({"matched": 2, "unmatched": 0, "row_cos_raw": 0}, abs=1e-6)
    assert not any("centred" in key for key in result.arrays)


@pytest.mark.parametrize("shared", [0.0, 1.0, -30.0])
def test_what_rows_share_changes_nothing_where_the_router_does_not_see_it(shared):
    rows, gate = planted()
    common = shared * torch.randn(4, generator=torch.Generator().manual_seed(0))
    result = coupling(view(rows + common, gate, shift_invariant=True))
    response = result.arrays["response/0/centred"]
    np.testing.assert_allclose(response, 2**0.5 * (np.eye(4) * 0.5 + 0.25), rtol=1e-4)
    assert result.headlines["coupling"].value == pytest.approx(3, rel=1e-4)
    assert result.arrays["row_cos/0/centred"] == pytest.approx(-1 / 3, rel=1e-4)
    assert result.arrays["top1_expert/0/centred"] == 1
    if shared:
        assert result.headlines["row_cos_raw"].value > -1 / 3 + 0.1  # which sees what is shared
        assert np.abs(result.arrays["response/0/raw"] - response).max() > 0.1
    np.testing.assert_allclose(
        result.arrays["response/0/raw"], ((rows + common) @ gate.transpose(1, 2)).norm(dim=2).T, rtol=1e-5
    )


def test_experts_in_another_order_answer_other_rows():
    rows, gate = planted()
    result = coupling(view(rows, gate[list(OWN)]))
    assert result.arrays["top1_expert/0/raw"] == result.arrays["top1_row/0/raw"] == 0
    assert result.arrays["matched/0/raw"] == 0
    assert result.arrays["coupling_p/0/raw"] == 1
    assert result.headlines["coupling"].value == 0


def test_a_row_s_best_expert_is_not_an_expert_s_best_row():
    """Expert 1 answers row 0 more than its own, and yet no other expert answers row 1."""
    rows, gate = torch.eye(3), torch.tensor([[[1.0, 0, 0]], [[1.0, 0.5, 0]], [[0, 0, 1.0]]])
    arrays = coupling(view(rows, gate)).arrays
    assert arrays["top1_expert/0/raw"] == 1
    assert arrays["top1_row/0/raw"] == pytest.approx(2 / 3)


def test_the_sign_tells_who_is_moved_and_who_is_silenced():
    rows, gate = planted()
    signs = torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1)
    arrays = coupling(view(rows, gate * signs, gate * signs)).arrays
    assert np.diagonal(arrays["gate_cos_mean/0/raw"]).tolist() == [1, -1, 1, -1]
    assert np.diagonal(arrays["up_energy/0/raw"]).tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(arrays["response/0/raw"], 2**0.5 * np.eye(4), rtol=1e-6)


def random_layer(experts, seed, hidden=64, width=48, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(experts, hidden, generator=generator)
    gate, up = (torch.randn(experts, width, hidden, generator=generator).to(dtype) for _ in range(2))
    return view(rows, gate, up, **options)


def test_what_is_at_random_is_not_coupled():
    """Relative responses near 1, and a p below .05 or .5 as often as it says."""
    found = [coupling(random_layer(8, seed, shift_invariant=True)).arrays for seed in range(200)]
    for part in ("centred", "raw"):
        relative = np.stack([arrays[f"response_relative/0/{part}"] for arrays in found])
        assert abs(relative.mean() - 1) < 0.01
        assert np.mean(np.abs(relative - 1) < 0.3) > 0.99
        p = np.array([float(arrays[f"coupling_p/0/{part}"]) for arrays in found])
        for level in (0.05, 0.25, 0.5, 0.75):
            assert abs((p <= level).mean() - level) < 3 * (level * (1 - level) / 200) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("band", [1 << 19, 100])
def test_it_is_what_a_loop_over_neurons_finds(dtype, band, monkeypatch):
    monkeypatch.setattr("probes.router_coupling._BAND_ELEMENTS", band)
    layer = random_layer(5, 1, hidden=12, width=9, dtype=dtype, shift_invariant=True)
    layer.weights.matrices["gate"][2, 3] = 0  # a neuron that sees nothing
    arrays = coupling(layer).arrays
    rows, gate, up = (x.double() for x in (layer.gate, layer.weights.matrices["gate"], layer.weights.matrices["up"]))
    for part, directions in (("raw", rows), ("centred", rows - rows.mean(dim=0))):
        for i in range(5):
            for j in range(5):
                products = [float(neuron @ directions[i]) for neuron in gate[j]]
                response = sum(product**2 for product in products) ** 0.5
                relative = response * 12**0.5 / float(gate[j].norm() * directions[i].norm())
                cosine = torch.cosine_similarity(gate[j], directions[i].expand(9, 12), dim=1, eps=1e-300)
                energy = torch.cosine_similarity(up[j], directions[i].expand(9, 12), dim=1).square()
                for key, want in {
                    "response": response,
                    "response_relative": relative,
                    "gate_cos_mean": float(cosine.mean()),
                    "up_energy": float(energy.mean()),
                }.items():
                    assert arrays[f"{key}/0/{part}"][i, j] == pytest.approx(want, rel=1e-4, abs=1e-6), key
        own = arrays[f"response_relative/0/{part}"]
        every = [np.mean([own[i, order[i]] for i in range(5)]) for order in permutations(range(5))]
        p = np.mean([value >= every[0] * (1 - 1e-6) for value in every])
        assert arrays[f"coupling_p/0/{part}"] == pytest.approx(p)


def test_gates_without_rows_to_compare_are_left_out_in_words():
    for layer in (
        view(None, torch.ones(4, 2, 4)),  # no gate
        view(torch.ones(4, 3), torch.ones(4, 2, 4)),  # in a space of its own
        random_layer(1, 0),
        random_layer(2, 0, shift_invariant=True),
    ):
        result = coupling(layer)
        assert result.notes
        assert not result.headlines
        assert not result.arrays
    assert coupling(random_layer(2, 0)).headlines


def test_a_router_that_begins_at_zero_is_described_and_drawn():
    layer = random_layer(4, 0, shift_invariant=True)
    layer.gate = torch.zeros_like(layer.gate)
    result = coupling(layer)
    assert result.headlines["top1_expert"]
    assert "coupling" not in result.headlines
    assert all(np.isfinite(list(result.scalars.values())))
    for build in result.figures.values():
        to_rgb(build())


@pytest.mark.parametrize(
    ("router", "parts"),
    [
        ("softmax_topk", {"centred", "raw"}),
        ("random", {"centred", "raw"}),
        ("factorised_gate", {"centred", "raw"}),
        ("sigmoid_topk", {"raw"}),
        ("relu", {"raw"}),
        ("grap", {"raw"}),
        ("hash", set()),
        ("expert_norm", set()),
        ("autonomy", set()),
    ],
)
def test_every_router_of_a_live_model(router, parts, make_decoder):
    decoder = make_decoder(router=router, num_experts=[4, 0, 4], router_options={"d_low": 4})
    result = coupling(*walk(decoder, None, frozenset({Need.WEIGHTS})))
    assert {key.split("/")[2] for key in result.arrays if key.startswith("response/")} == parts
    assert {key.split("/")[1] for key in result.arrays} == ({"0", "2"} if parts else set())
    assert bool(result.notes) != bool(parts)


def test_coupled_experts_are_said_to_be(make_decoder):
    decoder = make_decoder()
    with torch.no_grad():
        for layer in decoder.layers:
            layer.mlp.experts.gate_up_proj[:, :8] += 0.5 * layer.mlp.router.weight[:, None]
    result = coupling(*walk(decoder, None, frozenset({Need.WEIGHTS})))
    assert result.headlines["coupling"].value > 1.2
    assert "p 0.001" in result.headlines["coupling"].sentence
    assert result.headlines["gate_cos_own"].value > 0.1
