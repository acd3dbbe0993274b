"""matrix_similarity and gate_similarity."""

import numpy as np
import pytest
import torch
from probe_cases import all_needs, probe

from moebed.views.layer import LayerView
from moebed.views.live import walk
from probes.measures.expert_matrices import expert_gram
from probes.measures.similarity import cosine_matrix, cosines, off_diagonal


def test_cosine_matrix_by_hand():
    matrices = torch.tensor([[[1.0, 0], [0, 0]], [[1, 1], [0, 0]], [[0, 0], [0, -2]], [[0, 0], [0, 0]]])
    root = 0.5**0.5
    want = [[1, root, 0, 0], [root, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosine_matrix(matrices), want, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["up", "gate", "down"])
def test_the_gram_matrix_does_not_depend_on_the_band(make_decoder, monkeypatch, dtype, name):
    decoder = make_decoder(num_shared_experts=1, num_hidden_layers=1).to(dtype)
    view = next(walk(decoder, None, all_needs()))
    flat = torch.cat([view.matrix(name), view.shared_matrix(name)[None]]).flatten(1).double()
    for band, summed in ((1 << 23, 4096), (700, 7), (1, 4096)):
        monkeypatch.setattr("probes.measures.expert_matrices._BAND_ELEMENTS", band)
        monkeypatch.setattr("probes.measures.similarity._SUMMED", summed)
        gram, others = expert_gram(view, name)
        assert others == ["SE"]
        np.testing.assert_allclose(gram, flat @ flat.T, rtol=1e-6, atol=1e-6 * (flat @ flat.T).max())
        wanted = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], -1)
        np.testing.assert_allclose(cosines(gram), wanted, atol=1e-6)


def test_off_diagonal_counts_each_pair_once():
    assert off_diagonal(np.arange(9).reshape(3, 3)).tolist() == [1, 2, 5]


def test_copies_of_one_expert_are_alike(make_decoder):
    decoder = make_decoder()
    with torch.no_grad():
        for block in decoder.layers:
            block.mlp.experts.gate_up_proj[:] = block.mlp.experts.gate_up_proj[:1]
    scalars = probe(walk(decoder, None, all_needs()), "matrix_similarity")["matrix_similarity"].scalars
    assert scalars["mean_cos_up"] == pytest.approx(1)
    assert scalars["mean_cos_gate/layer_02"] == pytest.approx(1)
    assert abs(scalars["mean_cos_down"]) < 0.3


def test_up_and_gate_are_not_confused(make_decoder):
    decoder = make_decoder()
    with torch.no_grad():
        for block in decoder.layers:
            block.mlp.experts.matrix("gate")[:] = block.mlp.experts.matrix("gate")[:1]
    scalars = probe(walk(decoder, None, all_needs()), "matrix_similarity")["matrix_similarity"].scalars
    assert scalars["mean_cos_gate"] == pytest.approx(1)
    assert abs(scalars["mean_cos_up"]) < 0.3


@pytest.mark.parametrize(("shared", "size"), [(1, 5), (2, 4)])
def test_a_shared_expert_is_compared_where_its_shape_fits(make_decoder, shared, size):
    decoder = make_decoder(num_shared_experts=shared)
    result = probe(walk(decoder, None, all_needs()), "matrix_similarity")["matrix_similarity"]
    assert result.arrays["matrix_cos/0/down"].shape == (size, size)
    routed = result.arrays["matrix_cos/0/down"][:4, :4]
    assert result.scalars["mean_cos_down/layer_00"] == pytest.approx(off_diagonal(routed).mean(), abs=1e-6)


def test_gate_similarity_by_hand(make_decoder):
    decoder = make_decoder(num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        decoder.layers[0].mlp.router.weight[1] = -3 * decoder.layers[0].mlp.router.weight[0]
    result = probe(walk(decoder, None, all_needs()), "gate_similarity")["gate_similarity"]
    np.testing.assert_allclose(result.arrays["gate_cos/0"], [[1, -1], [-1, 1]], atol=1e-6)
    assert result.headlines["mean_cos"].value == pytest.approx(-1)


def test_a_router_without_gate_embeddings_is_skipped_with_a_note():
    result = probe([LayerView(0, 1, 4, 2, gate=None)], "gate_similarity")["gate_similarity"]
    assert "skipped" in result.notes[0]
    assert not result.arrays


def test_one_expert_has_no_pairs(make_decoder):
    decoder = make_decoder(num_experts=1, num_experts_per_tok=1)
    results = probe(walk(decoder, None, all_needs()), "matrix_similarity", "gate_similarity")
    for result in results.values():
        assert not result.scalars
        assert "one expert" in result.notes[0]
