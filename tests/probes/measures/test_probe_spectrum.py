"""Spectra from few products beside the whole decomposition, on planted singular values."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from probes import expert_geometry
from probes.expert_geometry import shape_of
from probes.measures import spectrum
from probes.measures.spectrum import TRUSTED

SIDE, LONG = 640, 896


def planted(sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(SIDE, len(sigma), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(LONG, len(sigma), generator=generator, dtype=torch.float64))[0]
    return ((left * sigma) @ right.T).float(), right


def entropy_rank(sigma):
    share = sigma / sigma.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


INDEX = torch.arange(1, SIDE + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(SIDE, dtype=torch.float64),
    "random": torch.linalg.svdvals(torch.randn(SIDE, LONG, generator=torch.Generator().manual_seed(2))).double(),
    "power .3": INDEX**-0.3,
    "power .5": INDEX**-0.5,
    "power 1": INDEX**-1.0,
    "outliers": torch.cat([torch.linspace(20, 3, 8), torch.linspace(1, 0.2, SIDE - 8)]).double(),
    "rank 8 and noise": torch.cat([torch.ones(8), torch.full((SIDE - 8,), 0.01)]).double(),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", SPECTRA)
def test_ranks_and_norm_of_planted_spectra(kind, transposed):
    sigma = SPECTRA[kind]
    matrix, _ = planted(sigma)
    found = shape_of(matrix.T if transposed else matrix, 16)
    assert found.effective_rank == pytest.approx(entropy_rank(sigma), rel=0.01)
    assert abs(math.log(found.effective_rank / entropy_rank(sigma))) <= found.rank_error + 1e-4
    assert found.rank_error <= TRUSTED
    assert found.norm == pytest.approx(float(sigma.norm()), rel=1e-5)
    assert found.stable_rank == pytest.approx(float(sigma.square().sum() / sigma.max() ** 2), rel=3e-3)


STEEP = {
    "power 1.5": INDEX**-1.5,
    "power 2": INDEX**-2.0,
    "exponential": torch.exp(-INDEX / 45),
    "slow exponential": torch.exp(-INDEX / 100),
    "square": torch.linalg.svdvals(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(3))).double(),
}


@pytest.mark.parametrize("kind", STEEP)
def test_what_falls_below_the_rounding_or_is_not_told_by_few_products_is_computed_whole(kind):
    sigma = STEEP[kind]
    found = shape_of(planted(sigma)[0], 16)
    error = abs(math.log(found.effective_rank / entropy_rank(sigma)))
    assert error <= found.rank_error + 1e-4
    assert found.rank_error <= TRUSTED


@pytest.fixture(params=["library", "PyTorch"])
def rounding(monkeypatch, request):
    """As on a CPU that multiplies bfloat16 faster, by both ways there; what was computed, by kind."""
    kinds = []
    if request.param == "PyTorch":
        monkeypatch.setattr(spectrum.native_gram, "fits", lambda matrix: False)
    elif not spectrum.native_gram.fits(torch.zeros(SIDE, LONG, dtype=torch.bfloat16)):
        pytest.skip("the library's needs AMX and a compiler")

    def counted(name, original, short):
        kinds.append(name)
        return original(short)

    for name in ("rounded_gram", "full_gram", "whole_rank"):
        original = getattr(expert_geometry, name)
        monkeypatch.setattr(expert_geometry, name, partial(counted, name, original))
    monkeypatch.setattr(expert_geometry, "multiplies_bf16_faster", lambda: True)
    return kinds


@pytest.mark.parametrize(
    ("kind", "transposed"),
    [
        pytest.param(kind, transposed, marks=() if transposed == bool(number % 2) else pytest.mark.slow)
        for number, kind in enumerate([*SPECTRA, *STEEP])
        for transposed in (False, True)
    ],
)
def test_the_stated_error_holds_where_the_gram_matrix_is_rounded_to_bfloat16(rounding, kind, transposed):
    matrix = planted((SPECTRA | STEEP)[kind])[0].bfloat16()
    sigma = torch.linalg.svdvals(matrix.double())
    found = shape_of(matrix.T if transposed else matrix, 16)
    assert rounding[0] == "rounded_gram"
    assert abs(math.log(found.effective_rank / entropy_rank(sigma))) <= found.rank_error + 1e-4
    assert found.rank_error <= TRUSTED
    assert found.norm == pytest.approx(float(sigma.norm()), rel=1e-5)
    assert found.stable_rank == pytest.approx(float(sigma.square().sum() / sigma.max() ** 2), rel=3e-3)


def test_rounding_to_bfloat16_is_left_where_it_hides_too_much(rounding):
    shape_of(planted(SPECTRA["random"])[0].bfloat16(), 16)
    assert rounding == ["rounded_gram"]
    rounding.clear()
    shape_of(planted(SPECTRA["rank 8 and noise"])[0].bfloat16(), 16)
    assert rounding[:2] == ["rounded_gram", "full_gram"]
    rounding.clear()
    shape_of(planted(STEEP["power 2"])[0].bfloat16(), 16)
    assert rounding == ["rounded_gram", "full_gram", "whole_rank"]
    rounding.clear()
    shape_of(planted(SPECTRA["random"])[0], 16)  # whose numbers bfloat16 does not hold
    assert rounding == ["full_gram"]


@pytest.mark.parametrize("seed", range(8))
def test_a_stated_error_is_no_luck_of_one_start(seed):
    sigma = SPECTRA["power .5"]
    matrix = planted(sigma, seed)[0]  # other directions: the same as another start
    found = spectrum.spectrum(spectrum.full_gram(matrix), *spectrum.start_of(matrix, True), 16)
    assert abs(math.log(found.effective_rank / entropy_rank(sigma))) <= found.rank_error < 0.1


@pytest.mark.parametrize("shape", [(640, 900), (900, 640), (100, 300)])
def test_rounding_is_no_rank(shape):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], 8, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], 8, generator=generator))[0]
    assert shape_of(left @ right.T, 16).effective_rank == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_subspace_that_stands_apart_is_found_within_its_bound(monkeypatch, rounded):
    sigma = torch.cat([torch.linspace(3, 2, 16), torch.linspace(1.8, 0.1, SIDE - 16)]).double()
    matrix, right = planted(sigma)
    if rounded:
        monkeypatch.setattr(expert_geometry, "multiplies_bf16_faster", lambda: True)
        matrix = matrix.bfloat16()
        right = torch.linalg.svd(matrix.double(), full_matrices=False).Vh.T
    found = shape_of(matrix, 16)
    cosines = np.linalg.svd(found.basis.T @ right[:, :16].numpy(), compute_uv=False)
    sine = math.sqrt(max(0, 1 - cosines.min() ** 2))
    assert sine <= found.angle_error + 1e-4
    assert found.angle_error < 0.05


def test_random_matrices_have_no_subspace_of_their_own_and_look_unrelated():
    first, second = (torch.randn(900, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    one, two = shape_of(first, 16), shape_of(second, 16)
    assert one.angle_error == 1
    overlap = np.square(one.basis.T @ two.basis).sum()
    assert overlap == pytest.approx(16 * 16 / SIDE, abs=0.25)  # that of independent subspaces, whatever the start
    np.testing.assert_array_equal(one.basis, shape_of(first.clone(), 16).basis)
