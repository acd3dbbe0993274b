"""Block Krylov spaces of a symmetric matrix: its leading directions, and what a block sees of all of its spectrum.

The space of a start block X is spanned by X, A X, A² X and so on (Musco and Musco, arXiv 1504.05477). Every start is
fixed, so the same matrix gives the same numbers twice.

N side, B columns of a block, L columns of the space, R directions kept.
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moebed.model.native import krylov as native_krylov

BLOCK = 24
_BLOCKS = (8, 16, 24, 32)  # of a space that is searched for directions alone: it grows until these have settled
_NARROW = 8  # columns of its blocks, at least: the more blocks there are, the nearer they come
_SETTLED = 1e-3  # of an eigenvalue
_CHANCE = 1e-5
_PASSES = 3  # of orthogonalisation, at most
_ORTHOGONAL = 0.5  # a pivot of vectors that had length 1, above which nothing was left in the space
_CONDITIONED = 1e-2  # least over largest pivot, from which on a Cholesky factor orthogonalises in float32


class Directions(NamedTuple):
    """The leading ones that a space holds: values (R,), descending, and residuals (R,), float64; vectors (N, R)."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Symmetric(NamedTuple):
    """A symmetric matrix (N, N): a product of any floating type, and in float32 what is added to its diagonal (N,)."""

    product: Tensor
    lost: Tensor | None

    @property
    def added(self) -> Tensor:
        """What is added to the diagonal (N,)."""
        return self.product.new_zeros(len(self.product)) if self.lost is None else self.lost

    def times(self, block: Tensor) -> Tensor:
        """The product with each row of a block (B, N); rounded to bfloat16 where the matrix is."""
        if self.lost is None:
            return block @ self.product
        return torch.addcmul((self.product @ block.T.to(self.product.dtype)).T.float(), block, self.lost)


class KrylovSpace:
    """An orthonormal basis that grows a block at a time, and the image of each of its vectors.

    The vectors are rows here, which is how they are multiplied fastest. Where the compiled library takes the matrix it
    adds blocks by itself, but for those whose vectors nearly depend on one another.

    Args:
        matrix: What is multiplied by.
        start: (N, B) spans the first block.
        most: Blocks that it may grow to.
    """

    def __init__(self, matrix: Symmetric, start: Tensor, most: int) -> None:
        self._matrix, self.block, self.size = matrix, start.shape[1], 0
        width = min(most * self.block, len(start))
        self._basis, self._image = (start.new_empty(width, len(start)) for _ in range(2))
        self._chance = _chance(len(start), self.block).to(start)
        first, corner = torch.linalg.qr(start)
        self._basis[: self.block] = first.T
        self.corner = corner.cpu().double()  # (B, B), the start in coordinates of the first block
        self._compiled = start.dtype == torch.float32 and native_krylov.fits(matrix.product, self.block)

    def grow(self, blocks: int) -> None:
        """Add blocks until there are this many."""
        while self.size < blocks * self.block:
            end = self.size + self.block
            if self.size:
                self._basis[self.size : end] = self._orthogonalised()
            if self._compiled:
                self.size = self._grown(blocks) * self.block
            else:
                self._image[self.size : end] = self._matrix.times(self._basis[self.size : end])
                self.size = end

    def _grown(self, blocks: int) -> int:
        return native_krylov.grow(
            self._matrix.product,
            self._matrix.added,
            self._basis,
            self._image,
            self._chance,
            self.size // self.block,
            blocks,
            share=_CHANCE,
            passes=_PASSES,
            conditioned=_CONDITIONED,
            orthogonal=_ORTHOGONAL,
        )

    def projected(self) -> Tensor:
        """The matrix in coordinates of the basis, (L, L) float64."""
        small = (self._basis[: self.size] @ self._image[: self.size].T).cpu().double()
        return (small + small.T) / 2

    def directions(self, values: Tensor, turn: Tensor) -> Directions:
        """The directions (N, R) that have coordinates (L, R) and these values (R,)."""
        turn = turn.T.to(self._basis)
        vectors = turn @ self._basis[: self.size]
        rest = turn @ self._image[: self.size] - vectors * values.to(vectors).unsqueeze(1)
        return Directions(values, vectors.T, torch.linalg.vector_norm(rest, dim=1).cpu().double())

    def _orthogonalised(self) -> Tensor:
        """The last block's image without what lies in the space already, orthonormal; (B, N).

        Almost all of that lies in the last two blocks, as the matrix is symmetric: what else does is rounding.
        """
        basis = self._basis[: self.size]
        block = self._image[self.size - self.block : self.size]
        # Where the space is exhausted, what is left is rounding that lies in it; a little chance leads out.
        block = block + self._chance * (_CHANCE * torch.linalg.vector_norm(block, dim=1, keepdim=True))
        for turn in range(_PASSES):
            against = basis if turn else basis[-2 * self.block :]
            block, least = _orthonormal(torch.addmm(block, block @ against.T, against, alpha=-1))
            if turn and least > _ORTHOGONAL:
                break
        return block


@functools.lru_cache(maxsize=4)
def _chance(side: int, width: int) -> Tensor:
    """Fixed random vectors (B, N) of lengths about 1; not to be written to."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(2)
        return (torch.randn(side, width, generator=generator) / math.sqrt(side)).T.contiguous()


def _orthonormal(block: Tensor) -> tuple[Tensor, float]:
    """An orthonormal basis (B, N) of what a block of rows spans, and the least pivot.

    What is of the block's width is NumPy's: threads side by side would wait for one another at each small step of
    PyTorch's, which lets go of the interpreter.
    """
    with suppress(np.linalg.LinAlgError):
        factor = np.linalg.cholesky((block @ block.T).cpu().numpy().astype(np.float64))
        pivots = factor.diagonal()
        if pivots.min() > _CONDITIONED * pivots.max():
            return torch.from_numpy(np.linalg.inv(factor)).to(block) @ block, float(pivots.min())
    columns, corner = torch.linalg.qr(block.T)
    return columns.T, float(corner.diagonal().abs().min())


def leading(product: Tensor, start: Tensor, count: int) -> Directions:
    """Leading directions of a symmetric matrix (N, N) without negative eigenvalues, at least ``count``.

    Residuals of those are below a thousandth of the eigenvalue, or what 32 blocks of a Krylov space leave.
    """
    space = KrylovSpace(Symmetric(product, None), start[:, : max(_NARROW, 2 * count)], _BLOCKS[-1])
    for blocks in _BLOCKS:
        space.grow(min(blocks, len(product) // space.block))
        values, turn = torch.linalg.eigh(space.projected())
        kept = 2 * space.block
        found = space.directions(values.flip(0)[:kept].clamp(min=0), turn.flip(1)[:, :kept])
        if bool((found.residuals[:count] <= _SETTLED * found.values[:count]).all()):
            break
    return found
