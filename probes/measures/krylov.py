"""Block Krylov spaces of a symmetric matrix: its leading directions, and what a block sees of all of its spectrum.

The space of a start block X is spanned by X, A X, A² X and so on (Musco and Musco, arXiv 1504.05477). Every start is
fixed, so the same matrix gives the same numbers twice.

N side, B columns of a block, L columns of the space, R directions kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 24
_BLOCKS = (8, 16, 24, 32)  # of a space that is searched for directions alone: it grows until these have settled
_NARROW = 8  # columns of its blocks, at least: the more blocks there are, the nearer they come
_SETTLED = 1e-3  # of an eigenvalue
_CHANCE = 1e-5
_PASSES = 3  # of orthogonalisation, at most
_CONDITIONED = 1e-2  # least over largest pivot, from which on a Cholesky factor orthogonalises in float32


class Directions(NamedTuple):
    """The leading ones that a space holds: values (R,), descending, and residuals (R,), float64; vectors (N, R)."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class KrylovSpace:
    """An orthonormal basis that grows a block at a time, and the image of each of its vectors.

    Args:
        times: Multiplies a block (N, B) by the matrix.
        start: (N, B) spans the first block.
        most: Blocks that it may grow to.
    """

    def __init__(self, times: Callable[[Tensor], Tensor], start: Tensor, most: int) -> None:
        self._times, self.block, self.size = times, start.shape[1], 0
        width = min(most * self.block, len(start))
        self._basis, self._image = (start.new_empty(len(start), width) for _ in range(2))
        generator = torch.Generator().manual_seed(2)
        self._chance = (torch.randn(start.shape, generator=generator) / math.sqrt(len(start))).to(start)
        self._next, corner = torch.linalg.qr(start)
        self.corner = corner.cpu().double()  # (B, B), the start in coordinates of the first block

    def grow(self, blocks: int) -> None:
        """Add blocks until there are this many."""
        for _ in range(blocks - self.size // self.block):
            if self.size:
                self._next = self._orthogonalised()
            end = self.size + self.block
            self._basis[:, self.size : end] = self._next
            self._image[:, self.size : end] = self._times(self._next)
            self.size = end

    def projected(self) -> Tensor:
        """The matrix in coordinates of the basis, (L, L) float64."""
        small = (self._basis[:, : self.size].T @ self._image[:, : self.size]).cpu().double()
        return (small + small.T) / 2

    def directions(self, values: Tensor, turn: Tensor) -> Directions:
        """The directions (N, R) that have coordinates (L, R) and these values (R,)."""
        turn = turn.to(self._basis)
        vectors = self._basis[:, : self.size] @ turn
        rest = self._image[:, : self.size] @ turn - vectors * values.to(vectors)
        return Directions(values, vectors, torch.linalg.vector_norm(rest.T.contiguous(), dim=1).cpu().double())

    def _orthogonalised(self) -> Tensor:
        """The last block's image without what lies in the space already, orthonormal.

        Almost all of that lies in the last two blocks, as the matrix is symmetric: what else does is rounding.
        """
        basis = self._basis[:, : self.size]
        block = self._image[:, self.size - self.block : self.size]
        # Where the space is exhausted, what is left is rounding that lies in it; a little chance leads out.
        block = block + self._chance * (_CHANCE * block.norm(dim=0))
        for turn in range(_PASSES):
            against = basis if turn else basis[:, -2 * self.block :]
            block, least = _orthonormal(torch.addmm(block, against, against.T @ block, alpha=-1))
            if turn and least > 0.5:  # of columns that had length 1: nothing was left in the space
                break
        return block


def _orthonormal(block: Tensor) -> tuple[Tensor, float]:
    """An orthonormal basis (N, B) of what a block spans, and the least pivot.

    What is of the block's width is NumPy's: threads side by side would wait for one another at each small step of
    PyTorch's, which lets go of the interpreter.
    """
    with suppress(np.linalg.LinAlgError):
        factor = np.linalg.cholesky((block.T @ block).cpu().numpy().astype(np.float64))
        pivots = factor.diagonal()
        if pivots.min() > _CONDITIONED * pivots.max():
            return block @ torch.from_numpy(np.linalg.inv(factor).T).to(block), float(pivots.min())
    block, corner = torch.linalg.qr(block)
    return block, float(corner.diagonal().abs().min())


def leading(product: Tensor, start: Tensor, count: int) -> Directions:
    """Leading directions of a symmetric matrix (N, N) without negative eigenvalues, at least ``count``.

    Residuals of those are below a thousandth of the eigenvalue, or what 32 blocks of a Krylov space leave.
    """
    space = KrylovSpace(product.__matmul__, start[:, : max(_NARROW, 2 * count)], _BLOCKS[-1])
    for blocks in _BLOCKS:
        space.grow(min(blocks, len(product) // space.block))
        values, turn = torch.linalg.eigh(space.projected())
        kept = 2 * space.block
        found = space.directions(values.flip(0)[:kept].clamp(min=0), turn.flip(1)[:, :kept])
        if bool((found.residuals[:count] <= _SETTLED * found.values[:count]).all()):
            break
    return found
