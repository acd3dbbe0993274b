"""The compiled products of weights against float64: Gram matrices, and scalar products, standardised too."""

import pytest
import torch

from moebed.model import native
from moebed.model.native import carry, coordinates, gram
from probes.measures.principal import standardised_products

SUM = 5e-6  # what a float32 sum of 512 products may be off by, and is rarely


def _bf16(*shape, size=0.03):
    return (size * torch.randn(shape)).bfloat16()


def _products(blocks, fitted):
    plain = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    standardised = torch.zeros(len(blocks), fitted, dtype=torch.float64)
    coordinates.add_products(blocks, fitted, plain, standardised)
    return plain, standardised


def _expected(blocks, fitted):
    exact = torch.stack([block.flatten() for block in blocks]).double()
    standardised, _ = standardised_products([[row[:, None] for row in exact]], fitted)
    return exact @ exact.T, standardised


def _off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.usefixtures("each_set")
class TestEachInstructionSet:
    @pytest.mark.parametrize(("rows", "fitted"), [(2, 2), (8, 8), (16, 15), (17, 16), (66, 64), (100, 98)])
    @pytest.mark.parametrize("shape", [(1, 16), (3, 171), (37, 1408)])
    def test_products_of_coordinates(self, rows, fitted, shape):
        blocks = [_bf16(*shape) for _ in range(rows)]
        found, expected = _products(blocks, fitted), _expected(blocks, fitted)
        assert _off(found[0], expected[0]) < SUM
        # With AMX a standardised number lacks at most a share of 2⁻¹⁷, which sums of many even out.
        assert _off(found[1], expected[1]) < (SUM if shape == (37, 1408) else 2**-16)

    def test_nearly_equal_matrices_keep_their_differences(self):
        """As after upcycling: what is common is many times larger than what differs."""
        common = _bf16(40, 64, size=1.0)
        blocks = [torch.where(torch.rand(40, 64) < 0.3, common * 1.008, common).bfloat16() for _ in range(9)]
        blocks[3] = blocks[5]
        found, expected = _products(blocks, 9)[1], _expected(blocks, 9)[1]
        assert _off(found, expected) < SUM
        assert torch.equal(found[3], found[5])
        for count in (8, 7):  # of which no sum by sevenths is exact
            equal = torch.zeros(count, count, dtype=torch.float64)
            assert torch.equal(_products([common] * count, count)[1], equal)

    def test_what_is_not_finite_shows(self):
        blocks = [_bf16(40, 64) for _ in range(8)]
        blocks[2][3, 4] = float("nan")
        plain, standardised = _products(blocks, 8)
        assert plain[2].isnan().all()
        assert standardised.isnan().any()

    def test_threads_and_bands_change_nothing_but_the_last_digits(self):
        blocks = [_bf16(70, 1408) for _ in range(8)]
        whole = _products(blocks, 8)
        threads = torch.get_num_threads()
        torch.set_num_threads(3 if threads == 1 else 1)
        try:
            assert all(torch.equal(one, other) for one, other in zip(whole, _products(blocks, 8), strict=True))
        finally:
            torch.set_num_threads(threads)
        plain, standardised = (torch.zeros_like(part) for part in whole)
        for rows in torch.arange(70).split(23):
            coordinates.add_products([block[rows] for block in blocks], 8, plain, standardised)
        assert _off(plain, whole[0]) < SUM
        assert _off(standardised, whole[1]) < SUM


def test_only_many_blocks_of_bf16_in_main_memory_fit(monkeypatch):
    if native.load() is not None:
        pytest.skip("no compiler")
    many = [_bf16(4, 4)] * 8
    assert coordinates.fits(many, 1 << 20)
    assert not coordinates.fits(many, 1 << 19)
    assert not coordinates.fits(many[:7], 1 << 20)
    assert not coordinates.fits([*many, torch.zeros(4, 4)], 1 << 20)
    assert not coordinates.fits([block.half() for block in many], 1 << 20)
    assert not coordinates.fits([block.to("meta") for block in many], 1 << 20)
    monkeypatch.setattr(native, "load", lambda: "there is no compiler")
    assert not coordinates.fits(many, 1 << 20)


@pytest.fixture
def _amx():
    if native.instruction_set() != "amx" or native.load() is not None:
        pytest.skip("needs AMX and a compiler")


@pytest.mark.usefixtures("_amx")
@pytest.mark.parametrize("shape", [(32, 32), (64, 1024), (288, 96), (544, 608)])
def test_gram_matrix(shape):
    matrix = _bf16(*shape)
    exact = matrix.double() @ matrix.double().T
    product, squares, beside = gram.rounded_gram(matrix)
    step = 2.0**-8 * exact.abs()  # half the distance of two bf16 numbers, and what float32 sums lose
    assert bool(((product.double() - exact).abs() <= step + 1e-6 * exact.max()).all())
    assert torch.equal(product, product.T)
    assert _off(squares.double(), exact.diagonal()) < 1e-6
    assert beside == pytest.approx(float((exact - exact.diagonal().diag()).square().sum()), rel=1e-5)


@pytest.mark.usefixtures("_amx")
def test_a_gram_matrix_that_does_not_fit():
    assert gram.fits(_bf16(64, 96))
    assert not gram.fits(_bf16(64, 96).T)
    assert not gram.fits(_bf16(63, 96))
    assert not gram.fits(_bf16(64, 95))
    assert not gram.fits(_bf16(64, 96).float())


@pytest.mark.usefixtures("_amx")
@pytest.mark.parametrize("count", [1, 12, 16])
@pytest.mark.parametrize("shape", [(32, 32), (64, 1024), (544, 608), (4128, 160)])
def test_vectors_through_a_matrix(shape, count):
    matrix, vectors = _bf16(*shape), torch.randn(count, shape[0])
    assert carry.fits(vectors, matrix)
    assert _off(carry.carried(vectors, matrix), vectors.double() @ matrix.double()) < SUM


@pytest.mark.usefixtures("_amx")
def test_vectors_that_do_not_fit():
    matrix, vectors = _bf16(64, 96), torch.randn(16, 64)
    assert not carry.fits(torch.randn(17, 64), matrix)
    assert not carry.fits(vectors.double(), matrix)
    assert not carry.fits(vectors, matrix.T)
    assert not carry.fits(vectors, matrix.float())


@pytest.mark.usefixtures("_amx")
@pytest.mark.parametrize("shape", [(32, 32), (64, 1024), (288, 96), (40, 64)])
def test_a_matrix_by_rows(shape):
    matrix = _bf16(*shape)
    assert carry.by_rows(matrix) is matrix
    found = carry.by_rows(matrix.T)
    assert found.is_contiguous()
    assert torch.equal(found, matrix.T)
