"""The probes of weights alone, on cases small enough to check by other means."""

import numpy as np
import pytest
import torch
from probe_cases import probe
from scipy.stats import kendalltau, pearsonr

from moebed.views.layer import LayerView, Need
from probes.expert_geometry import shape_of
from probes.expert_projection import ExpertProjection
from probes.figures.drawing import to_rgb
from probes.measures import principal
from probes.measures.principal import outliers, point_components, top_eigenvectors
from probes.neuron_matching import NeuronMatching, kendall, order_of_growth
from probes.registry import PROBES, STATIC_PROBES

SHAPES = {"up": (12, 10), "gate": (12, 10), "down": (10, 12)}


class Weights:
    """Random experts in a dtype, with a shared expert and a dense FFN of other widths."""

    def __init__(self, count, dtype=torch.float32, shared=0, reference=0, seed=0):
        torch.manual_seed(seed)
        self.routed = {name: torch.randn(count, *shape).to(dtype) for name, shape in SHAPES.items()}
        self.shared, self.reference = self._one(shared, dtype), self._one(reference, dtype)

    @staticmethod
    def _one(width, dtype):
        if not width:
            return dict.fromkeys(SHAPES)
        shapes = {"up": (width, 10), "gate": (width, 10), "down": (10, width)}
        return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}

    def expert_matrix(self, name, index, rows):
        return self.routed[name][index][rows]

    def expert_shape(self, name):
        return tuple(self.routed[name].shape[1:])

    def shared_matrix(self, name):
        return self.shared[name]

    def reference_matrix(self, name):
        return self.reference[name]


def view(count, index=0, gate=True, **options):
    weights = Weights(count, **options) if count else None
    return LayerView(
        index, 4, count, min(2, count), torch.randn(count, 10) if gate and count else None, weights=weights
    )


def test_all_of_them_need_weights_alone():
    assert len(STATIC_PROBES) == 8
    assert all(PROBES[name].needs == {Need.WEIGHTS} for name in STATIC_PROBES)


@pytest.mark.slow
def test_uneven_layers_are_all_described_and_drawn():
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    counts = enumerate((5, 1, 26), start=1)
    views = [view(0), *(view(count, index=at, dtype=dtypes[at - 1], shared=12) for at, count in counts)]
    for name, result in probe(views, *STATIC_PROBES).items():
        assert result.headlines, name
        assert all(np.isfinite(list(result.scalars.values())))
        for build in result.figures.values():
            to_rgb(build())
        for key in result.arrays:
            assert key.split("/")[1] in "123"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_experts(count):
    for name, result in probe([view(count)], *STATIC_PROBES).items():
        assert count == 2 or result.notes or name == "expert_geometry"
        for build in result.figures.values():
            to_rgb(build())


def test_diverged_weights_are_described_and_drawn():
    broken = view(4)
    broken.weights.routed["up"][2] = torch.nan
    for result in probe([broken], *STATIC_PROBES).values():
        for build in result.figures.values():
            to_rgb(build())


def test_which_rows_there_are():
    results = probe([view(3, shared=24, reference=12)], *STATIC_PROBES)
    assert results["neuron_similarity"].arrays["neuron_mean_cos/0/up"].shape == (5, 5)
    assert results["neuron_similarity"].arrays["others/0/up"].tolist() == ["SE", "F"]
    for name, key in (("neuron_matching", "reorder_cos"), ("expert_geometry", "subspace_distance")):
        assert results[name].arrays[f"{key}/0/down"].shape == (4, 4)
        assert results[name].arrays["others/0/down"].tolist() == ["F"]
    assert results["expert_projection"].arrays["matrix_pca/0/gate"].shape == (4, 2)
    assert results["gate_projection"].arrays["neuron_mean_cos/0/gate"].shape == (3, 3)


def test_mean_neurons():
    layer = view(3, dtype=torch.bfloat16)
    arrays = probe([layer], "neuron_similarity")["neuron_similarity"].arrays
    for name, axis in (("up", 1), ("gate", 1), ("down", 2)):
        means = layer.weights.routed[name].double().mean(dim=axis)
        want = torch.cosine_similarity(means[:, None], means[None], dim=-1)
        np.testing.assert_allclose(arrays[f"neuron_mean_cos/0/{name}"], want, atol=1e-6)


def test_a_shuffled_expert_is_found_again():
    layer = view(2)
    order = torch.randperm(12)
    for name in SHAPES:
        routed = layer.weights.routed[name]
        routed[1] = routed[0][:, order] if name == "down" else routed[0][order]
    result = probe([layer], "neuron_matching")["neuron_matching"]
    tau = kendalltau(np.arange(12), order.argsort().numpy()).statistic
    for name in SHAPES:
        assert result.arrays[f"reorder_cos/0/{name}"] == pytest.approx(np.ones((2, 2)), abs=1e-6)
        assert result.arrays[f"reorder_kendall/0/{name}"][0, 1] == pytest.approx(tau)
    before = probe([layer], "matrix_similarity")["matrix_similarity"].scalars["mean_cos_up"]
    assert result.scalars["mean_gain_up"] == pytest.approx(1 - before, abs=1e-6)
    assert result.headlines["mean_tau"].value == pytest.approx(tau)


def test_kendall_is_one_minus_twice_the_share_of_inversions():
    for size in (2, 3, 7, 40):
        permutation = np.random.default_rng(size).permutation(size)
        inverted = sum(permutation[i] > permutation[j] for i in range(size) for j in range(i + 1, size))
        assert kendall(permutation) == pytest.approx(1 - 4 * inverted / (size * (size - 1)))
    assert kendall(np.zeros(1)) == 1


def test_order_of_growth():
    assert [order_of_growth(gain) for gain in (0.0042, 0.5, 1e-3)] == [-3, -1, -3]
    assert np.isnan(order_of_growth(0.0))


def test_progress_is_told(monkeypatch):
    monkeypatch.setattr("probes.neuron_matching._SECONDS_BETWEEN_LINES", -1.0)
    said = []
    running = NeuronMatching()
    running.say = said.append
    running.update_matrix(view(3), "up")
    assert len(said) == 2
    assert said[0].startswith("neuron_matching: layer 0, up: 1 of 3 pairs, ")


def test_gate_projection_is_pearsons_r():
    layer = view(6)
    results = probe([layer], "gate_projection", "gate_similarity", "neuron_similarity")
    low = np.tril_indices(6, -1)
    gate = results["gate_similarity"].arrays["gate_cos/0"][low]
    for name in SHAPES:
        mean = results["neuron_similarity"].arrays[f"neuron_mean_cos/0/{name}"][low]
        r = pearsonr(gate, mean).statistic
        result = results["gate_projection"]
        assert result.arrays[f"gate_vs_proj_r/0/{name}"] == pytest.approx(r, abs=1e-6)
        assert result.headlines[f"r2_{name}"].value == pytest.approx(r * r, abs=1e-6)
        rounded = [torch.from_numpy(values).bfloat16().double().numpy() for values in (gate, mean)]
        assert result.headlines[f"paper_rounding_{name}"].value == round(pearsonr(*rounded).statistic ** 2, 2)


@pytest.mark.parametrize("band", [1 << 22, 40])
def test_matrix_pca_is_sklearns(band, monkeypatch):
    monkeypatch.setattr("probes.measures.expert_matrices._BAND_ELEMENTS", band)
    layer = view(5, reference=12)
    arrays = probe([layer], "expert_projection")["expert_projection"].arrays
    for name in SHAPES:
        flat = layer.weights.routed[name].flatten(1).double().numpy()
        other = layer.weights.reference[name].flatten().double().numpy()
        mean, deviation = flat.mean(axis=0), flat.std(axis=0, ddof=1)
        pca = pytest.importorskip("sklearn.decomposition").PCA(3, svd_solver="full").fit((flat - mean) / deviation)
        want = pca.transform(np.vstack([(flat - mean) / deviation, (other - mean) / deviation]))
        found = arrays[f"matrix_pca_3d/0/{name}"]
        np.testing.assert_allclose(np.abs(found), np.abs(want), atol=1e-4)
        np.testing.assert_allclose(arrays[f"matrix_pca_var/0/{name}"], pca.explained_variance_ratio_[:2], atol=1e-6)
        sign = np.sign((found * want).sum(axis=0))
        np.testing.assert_allclose(found * sign, want, atol=1e-4)  # one sign a component


@pytest.mark.parametrize("size", [(200, 30), (30, 200), (700, 600)])
def test_neuron_pca_is_sklearns(size):
    points = torch.randn(size) * torch.linspace(1, 3, size[1]) + torch.randn(size[0], 1)
    points[:, 3] = 1.0  # does not vary
    scaled = (points - points.mean(0)) / points.std(0).clamp(min=1e-9)
    pca = pytest.importorskip("sklearn.decomposition").PCA(3, svd_solver="full")
    want = pca.fit_transform(scaled.double().numpy())
    found, share = point_components(points, 3)
    np.testing.assert_allclose(np.abs(found), np.abs(want), atol=2e-3 * np.abs(want).max())
    np.testing.assert_allclose(share, pca.explained_variance_ratio_, rtol=1e-4)


def test_pca_signs_do_not_depend_on_the_solver():
    points = torch.randn(40, 8)
    assert np.array_equal(point_components(points, 3)[0], point_components(points.clone(), 3)[0])
    flipped = principal._signed(-point_components(points, 3)[0], 40)
    np.testing.assert_allclose(flipped, point_components(points, 3)[0])


def test_a_large_layers_neurons_are_thinned_and_it_says_so(monkeypatch):
    monkeypatch.setattr("probes.expert_projection._MOST_NEURONS", 15)
    result = probe([view(3)], "expert_projection")["expert_projection"]
    assert result.arrays["neuron_pca/0/up"].shape == (15, 2)
    assert result.arrays["neuron_pca_index/0"][:5].tolist() == [0, 3, 6, 8, 11]
    assert result.arrays["neuron_pca_expert/0"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert "5 of each expert's 12" in result.notes[0]


def test_outliers_are_dbscans():
    points = np.concatenate([np.random.default_rng(0).normal(size=(300, 2)), [[9, 9], [-9, 0], [9, 9.1]]])
    for eps, least in ((0.3, 5), (1.0, 3), (0.01, 4)):
        assert np.array_equal(
            outliers(points, eps, least),
            pytest.importorskip("sklearn.cluster").DBSCAN(eps=eps, min_samples=least).fit(points).labels_ == -1,
        )


def test_outliers_are_left_out_of_the_pictures_when_asked():
    layer = view(3)
    layer.weights.routed["up"][0, 0] = 100.0
    running = ExpertProjection(drop_outliers=True)
    for name in SHAPES:
        running.update_matrix(layer, name)
    result = running.compute()
    assert result.arrays["neuron_outlier/0/up"][0]
    assert any("DBSCAN" in note for note in result.notes)
    for build in result.figures.values():
        to_rgb(build())


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
def test_geometry_is_that_of_the_singular_values(shape):
    matrix = torch.randn(shape)
    _, sigma, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    share = sigma / sigma.sum()
    found = shape_of(matrix, 3)
    close = {"rel": 1e-6}
    assert found.norm == pytest.approx(float(sigma.norm()), **close)
    assert found.stable_rank == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2), **close)
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), **close)
    np.testing.assert_allclose(found.basis @ found.basis.T, right[:3].T @ right[:3], atol=1e-6)


def test_geometry_of_a_low_rank_and_of_no_matrix():
    low = torch.randn(30, 2) @ torch.randn(2, 20)
    assert shape_of(low, 4).effective_rank < 2.01
    assert shape_of(torch.zeros(6, 4), 2)[:3] == (0, 0, 0)


def test_lanczos_gives_the_same_vectors():
    points = torch.randn(900, 600, dtype=torch.float64).numpy() * np.geomspace(1, 0.3, 600)
    gram = points.T @ points
    values, vectors = top_eigenvectors(gram, 5)
    want = np.linalg.eigh(gram)
    np.testing.assert_allclose(values, want.eigenvalues[::-1][:5], rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(vectors * want.eigenvectors[:, ::-1][:, :5], axis=0)), 1, atol=1e-3)


def test_subspaces_that_agree_and_that_are_orthogonal():
    layer = view(3)
    for name in SHAPES:
        first = torch.zeros(SHAPES["up"])
        first[:2, :2] = torch.diag(torch.tensor([3.0, 2.0]))
        second = torch.zeros(SHAPES["up"])
        second[:2, 5:7] = torch.diag(torch.tensor([3.0, 2.0]))
        wide = torch.stack([first, first * 2, second])
        layer.weights.routed[name] = wide.transpose(1, 2).contiguous() if name == "down" else wide
    result = probe([layer], "expert_geometry")["expert_geometry"]
    for name in SHAPES:
        assert result.arrays[f"subspace_rank/0/{name}"] == 2
        distance = result.arrays[f"subspace_distance/0/{name}"]
        assert distance[0, 1] == pytest.approx(0, abs=1e-6)
        assert distance[0, 2] == pytest.approx(2**0.5)
        assert result.arrays[f"stable_rank/0/{name}"] == pytest.approx([13 / 9] * 3)
        assert result.arrays[f"weight_norm/0/{name}"][1] == pytest.approx(2 * 13**0.5)
