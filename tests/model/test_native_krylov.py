"""Krylov spaces that the compiled library grows, against definitions in float64 and against PyTorch's way."""

import pytest
import torch

from moebed.model import native
from moebed.model.native import krylov as native_krylov
from probes.measures.krylov import KrylovSpace, Symmetric


def _matrix(side, dtype, seed=0):
    """A Gram matrix as the probes have it, of bf16 with what its diagonal lost; of float32 with something as well."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(side, 2 * side, generator=generator) / (2 * side) ** 0.5
    product = wide @ wide.T
    rounded = product.to(dtype)
    lost = (product - rounded.float()).diagonal().contiguous()
    return Symmetric(rounded, lost if dtype == torch.bfloat16 else torch.linspace(0, 0.1, side))


def _start(side, width, seed=1):
    return torch.randn(side, width, generator=torch.Generator().manual_seed(seed))


def _grown(matrix, start, blocks, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(native_krylov, "fits", lambda product, width: False)
    space = KrylovSpace(matrix, start, blocks)
    assert space._compiled == (monkeypatch is None)
    space.grow(blocks)
    return space


@pytest.mark.usefixtures("each_set")
class TestEachInstructionSet:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("side", "width", "blocks"), [(512, 24, 7), (544, 36, 7), (704, 8, 32), (576, 64, 3)])
    def test_basis_is_orthonormal_and_has_its_image(self, dtype, side, width, blocks):
        matrix = _matrix(side, dtype)
        if not native_krylov.fits(matrix.product, width):
            assert dtype == torch.bfloat16  # which only some sets multiply
            pytest.skip("no products of bf16")
        space = _grown(matrix, _start(side, width), blocks)
        basis, image = space._basis.double(), space._image.double()
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis)).double(), atol=2e-6)
        seen = space._basis.to(dtype).double()
        expected = seen @ matrix.product.double() + basis * matrix.added.double()
        assert torch.allclose(image, expected, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("width", [24, 36])
    def test_space_is_that_of_the_plain_way(self, dtype, width, monkeypatch):
        matrix, start = _matrix(640, dtype), _start(640, width)
        if not native_krylov.fits(matrix.product, width):
            pytest.skip("no products of bf16")
        ours, plain = _grown(matrix, start, 7), _grown(matrix, start, 7, monkeypatch)
        # PyTorch rounds a product of bf16 to bf16 as well; what a block's rounding leads to grows with the blocks.
        near = 1e-3 if dtype == torch.float32 else 0.03
        assert float((ours._basis[: 2 * width] - plain._basis[: 2 * width]).norm(dim=1).max()) < near
        first, second = (torch.linalg.eigvalsh(space.projected()) for space in (ours, plain))
        assert torch.allclose(first, second, rtol=1e-5 if dtype == torch.float32 else 3e-3)


@pytest.fixture
def _library():
    if native.load() is not None:
        pytest.skip("no compiler")


@pytest.mark.usefixtures("_library")
def test_growth_goes_on_where_it_was_left():
    matrix, start = _matrix(512, torch.float32), _start(512, 24)
    once, twice = _grown(matrix, start, 9), KrylovSpace(matrix, start, 9)
    for blocks in (2, 7, 9):
        twice.grow(blocks)
    assert torch.allclose(once._basis, twice._basis, atol=1e-4)
    assert torch.allclose(once.projected(), twice.projected(), atol=1e-4)


@pytest.mark.usefixtures("_library")
def test_a_space_that_is_exhausted_grows_by_chance():
    """Of rank 40 and blocks of 24, the second has few new directions: the library leaves that to the plain way."""
    left = _start(512, 40) / 512**0.5
    matrix, start = Symmetric(left @ left.T, None), _start(512, 24, seed=2)
    asked = []

    class Watched(KrylovSpace):
        def _orthogonalised(self):
            asked.append(self.size // self.block)
            return super()._orthogonalised()

    space = Watched(matrix, start, 5)
    space.grow(5)
    assert asked
    assert torch.allclose(space._basis @ space._basis.T, torch.eye(120), atol=1e-5)
    values = torch.linalg.eigvalsh(space.projected()).flip(0)
    assert torch.allclose(values[:40], torch.linalg.eigvalsh((left.T @ left).double()).flip(0), rtol=1e-4)
    assert float(values[40:].abs().max()) < 1e-5


@pytest.mark.usefixtures("_library")
def test_chance_is_of_a_share_of_a_vectors_length_and_a_block_too_close_to_dependent_is_not_made():
    matrix, chance = _matrix(64, torch.float32), _start(64, 8, seed=3).T.contiguous()
    basis, image = torch.zeros(16, 64), torch.zeros(16, 64)
    basis[:8] = torch.linalg.qr(_start(64, 8)).Q.T
    arguments = (matrix.product, matrix.added, basis, image, chance, 0, 2)
    numbers = {"share": 0.3, "passes": 3, "orthogonal": 0.5}
    assert native_krylov.grow(*arguments, conditioned=1.0, **numbers) == 1
    assert native_krylov.grow(*arguments, conditioned=0.01, **numbers) == 2
    led = image[:8] + 0.3 * image[:8].norm(dim=1, keepdim=True) * chance
    assert float((led - led @ basis.T @ basis).norm()) < 1e-5 * float(led.norm())


def test_what_the_library_takes(monkeypatch):
    if native.load() is not None:
        pytest.skip("no compiler")
    square = torch.zeros(512, 512)
    assert native_krylov.fits(square, 24)
    assert not native_krylov.fits(square, 65)
    assert not native_krylov.fits(square[:500, :500].contiguous(), 24)
    assert not native_krylov.fits(square[:, ::2][:256], 24)
    assert not native_krylov.fits(square.double(), 24)
    assert not native_krylov.fits(square.half(), 24)
    assert not native_krylov.fits(square.to("meta"), 24)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx512")
    assert not native_krylov.fits(square.bfloat16(), 24)
    monkeypatch.setattr(native, "load", lambda: "there is no compiler")
    assert not native_krylov.fits(square, 24)
