"""Spectra of large matrices from a few products: the Gram matrix of the shorter side, and products of that with blocks.

A whole eigendecomposition of side N costs many times the Gram matrix, and the more the faster a machine multiplies. So
from 512 on leading directions and sums over all singular values come from one block Krylov space: the directions are
its leading ones, and for what these leave random signs in the first block are the starts of stochastic Lanczos
quadrature (Ubaru, Chen and Saad, 2017), all of a block at once. What that does not tell to a hundredth is computed
whole, in float64.

Rounding a Gram matrix to bfloat16 disturbs it in all directions alike, which smooth sums see in the second order only.
So where a CPU multiplies bfloat16 faster, it is tried first: a product then moves half as many bytes and is multiplied
many times faster. Singular values that drown in that rounding count into the stated error, and the next better way is
taken where it is too large.

N shorter side, K longer side, B columns of a block, D directions taken out, V sampled vectors, L columns of a space.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import xlogy
from torch import Tensor

from moebed.machine.float64 import double
from moebed.model.native import carry as native_carry
from moebed.model.native import gram as native_gram
from probes.measures.krylov import BLOCK, Directions, KrylovSpace, Symmetric

EXACT_BELOW = 512  # a side; the whole decomposition in float64 then takes less than a tenth of a second
TRUSTED = 1e-2  # a stated relative error up to which a rank is not computed whole
_BLOCKS = (7, 9, 12)  # a space grows to the next number where the last one does not tell
_DEVIATIONS = 4  # standard errors
_CONVERGED = 1e-2  # of an eigenvalue: a residual below it changes a sum by its square
_APART = 1e-2  # an angle from which on a subspace is found
_BANDS = 4  # of the Gram matrix: of 16 products 10 are made, the others mirror them
_BAND_ELEMENTS = 1 << 18  # that stay in a core's cache


class Spectrum(NamedTuple):
    """What is known of the singular values of a matrix, and its leading directions.

    Args:
        largest: ‖W‖₂.
        effective_rank: exp of the entropy of the singular values taken as shares of their sum.
        rank_error: The relative error of that is at most this, but for chance, which is counted with four standard
            errors of the sampled vectors; 0 where it is exact. It holds what a further block changed times the number
            of blocks, which is all that is to come where the rest falls as one over that number or faster, and the
            most that values within the rounding, which count as 0, could add. What the rounding does to the others, a
            hundred-thousandth or so, is not counted.
        vectors: (N, R) leading eigenvectors of the Gram matrix.
        angle: Bound on the sine of the largest angle between their span and the exact one, at most 1; 1 where the
            eigenvalues next to the border are too close for a subspace to be told apart.
    """

    largest: float
    effective_rank: float
    rank_error: float
    vectors: Tensor
    angle: float


class Gram(NamedTuple):
    """W Wᵀ of a matrix W (N, K).

    Args:
        product: (N, N) float64, float32 or bfloat16.
        lost: (N,) what its diagonal lost by rounding to bfloat16, float32; None otherwise.
        trace: ‖W‖_F².
        noise: What rounding may have moved an eigenvalue by: below it they count as 0.
    """

    product: Tensor
    lost: Tensor | None
    trace: float
    noise: float

    def widened(self, small: Tensor) -> Tensor:
        """A small matrix that comes of it, in what it is decomposed in: far below the product's rounding."""
        return small.float() if self.product.dtype == torch.bfloat16 else double(small)


class _Sums(NamedTuple):
    """Σσ, Σσ log σ and the number of singular values above the rounding, and what follows for the entropy."""

    sigma: float
    logs: float
    counted: float

    @property
    def entropy(self) -> float:
        return math.log(self.sigma) - self.logs / self.sigma

    def hidden(self, side: int, noise: float) -> float:
        """What the entropy would gain if all of ``side`` values that are not counted were as large as the rounding."""
        count = side - self.counted
        if count < 0.5:
            return 0.0
        share = count * math.sqrt(noise) / (self.sigma + count * math.sqrt(noise))
        mixing = -share * math.log(share) - (1 - share) * math.log1p(-share)
        return max(0.0, mixing + share * (math.log(count) - self.entropy))


def gram(short: Tensor) -> Tensor:
    """W Wᵀ (N, N) of a matrix (N, K), in its dtype; its lower triangle is computed and mirrored."""
    side = len(short)
    product = short.new_empty(side, side)
    step = -(-side // _BANDS) if side >= EXACT_BELOW else side
    for first in range(0, side, step):
        stop = min(first + step, side)
        band = product[first:stop, :stop]
        torch.mm(short[first:stop], short[:stop].T, out=band)
        product[:first, first:stop] = band[:, :first].T
    return product


def full_gram(short: Tensor) -> Gram:
    """The Gram matrix of a matrix (N, K) in float32, or in float64 where its side is below ``EXACT_BELOW``."""
    product = gram(double(short) if len(short) < EXACT_BELOW else short.float())
    trace = float(double(product.diagonal()).sum())
    noise = 16 * torch.finfo(product.dtype).eps * trace / math.sqrt(len(short))  # it is spread over all directions
    return Gram(product, None, trace, noise)


def rounded_gram(short: Tensor) -> Gram:
    """The Gram matrix of a bfloat16 matrix (N, K), rounded to bfloat16 but for its diagonal."""
    short = native_carry.by_rows(short)  # which costs less than it saves
    side = len(short)
    if native_gram.fits(short):
        product, squares, beside = native_gram.rounded_gram(short)
    else:
        product = gram(short)
        bands = short.split(max(1, _BAND_ELEMENTS // short.shape[1]))
        squares = torch.cat([torch.linalg.vector_norm(band.float(), dim=1).square_() for band in bands])
        size = sum(float(torch.linalg.vector_norm(band.float())) ** 2 for band in product.split(_BAND_ELEMENTS // side))
        beside = size - float(squares.square().sum())
    lost = squares - product.diagonal().float()
    # An entry is off by .4 of this on average: a matrix of such errors has twice their mean size times √N for its norm.
    noise = torch.finfo(product.dtype).eps / 4 * math.sqrt(max(beside, 0.0) / side)
    return Gram(product, lost, float(double(squares).sum()), noise)


def start_of(short: Tensor, in_longer: bool) -> tuple[Tensor, int]:
    """A start (N, B) for the Krylov space in float32, and how many of its columns, the last ones, are random signs.

    It is fixed where the long side is the space that experts share. Where the short one is, more columns come from the
    matrix itself: with the same start, spaces that have not converged would look alike.
    """
    signs, own = _drawn(*short.shape, short.device)
    start = signs.to(torch.promote_types(short.dtype, torch.float32))
    if in_longer:
        return start, BLOCK
    return torch.cat([times_wide(short, own.to(start)), start], dim=1), BLOCK


@lru_cache(maxsize=4)
def _drawn(side: int, longer: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fixed random signs (N, B) and normal numbers (K, B / 2), the same on every device; not to be written to."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (side, BLOCK), generator=generator) * 2.0 - 1
        return signs.to(device), torch.randn(longer, BLOCK // 2, generator=generator).to(device)


def times_wide(matrix: Tensor, block: Tensor) -> Tensor:
    """A matrix (M, C) of any floating type times a block (C, B), in the block's type; what is copied stays in cache."""
    if native_carry.fits(block.T, matrix.T):
        return native_carry.carried(block.T, matrix.T).T
    if matrix.dtype == block.dtype:
        return matrix @ block
    by_rows = matrix.stride(1) == 1
    step = max(1, _BAND_ELEMENTS // matrix.shape[1 if by_rows else 0])
    if by_rows:
        return torch.cat([band.to(block.dtype) @ block for band in matrix.split(step)])
    total = block.new_zeros(block.shape[1], len(matrix))  # that way round MKL's is the faster one
    for band, part in zip(matrix.T.split(step), block.T.contiguous().split(step, dim=1), strict=True):
        total.addmm_(part, band.to(block.dtype))
    return total.T


def spectrum(given: Gram, start: Tensor, signs: int, count: int) -> Spectrum:
    """The spectrum of a matrix by its Gram matrix, not 0, and its first ``count`` directions.

    Args:
        given: The Gram matrix.
        start: (N, B) as ``start_of`` gives it; not used where the whole decomposition is cheap.
        signs: Its last columns that are random signs.
        count: R.
    """
    side = len(given.product)
    if side < EXACT_BELOW:
        values, vectors = torch.linalg.eigh(double(given.product))
        values, vectors = values.flip(0).cpu(), vectors.flip(1)
        found, sums = Directions(values, vectors, torch.zeros_like(values)), _sums(values.numpy(), given.noise)
        return _result(found, sums.entropy, sums.hidden(side, given.noise), given.noise, count)
    space = KrylovSpace(Symmetric(given.product, given.lost), start, _BLOCKS[-1])
    for blocks in _BLOCKS:
        space.grow(blocks)
        small, kept = given.widened(space.projected()), 2 * space.block
        values, turn = torch.linalg.eigh(small)
        found = space.directions(double(values[-kept:]).flip(0).clamp(min=0), turn[:, -kept:].flip(1))
        entropy, error, hidden = _entropy(given, space, small, (values, turn), found, signs)
        result = _result(found, entropy, error + hidden, given.noise, count)
        if hidden > TRUSTED or (result.rank_error <= TRUSTED and not _APART < result.angle < 1):
            break
    return result


def whole_rank(short: Tensor) -> tuple[float, float]:
    """Effective rank of a matrix (N, K), and its relative error, from all singular values in float64."""
    side = len(short)
    product = double(short.new_zeros(side, side))
    for band in short.split(EXACT_BELOW, dim=1):
        wide = double(band)
        product.addmm_(wide, wide.T)
    noise = 16 * torch.finfo(product.dtype).eps * float(product.diagonal().sum()) / math.sqrt(side)
    sums = _sums(torch.linalg.eigvalsh(product).cpu().numpy(), noise)
    return math.exp(sums.entropy), math.expm1(sums.hidden(side, noise))


def _result(found: Directions, entropy: float, error: float, noise: float, count: int) -> Spectrum:
    values, residuals = found.values.cpu(), found.residuals[:count] + noise
    # Davis and Kahan's bound.
    gap = float(values[count - 1] - values[count]) if count < len(values) else float(values[count - 1])
    angle = min(1.0, float(residuals.norm()) / gap) if gap > 0 else 1.0
    return Spectrum(
        math.sqrt(float(values[0])), math.exp(entropy), math.expm1(min(error, 700)), found.vectors[:, :count], angle
    )


def _entropy(
    given: Gram, space: KrylovSpace, small: Tensor, eigen: tuple[Tensor, Tensor], found: Directions, signs: int
) -> tuple[float, float, float]:
    """Entropy of the singular values' shares, its error, and what more values within the rounding could add.

    What is of the space's size is NumPy's, as in ``probes.measures.krylov``.
    """
    side, noise = len(given.product), given.noise
    values, turn = _descending(*eigen)
    taken = int((found.residuals < _CONVERGED * found.values).long().cumprod(0).sum())
    done, rest = _sums(values[:taken], noise), given.trace - float(values[:taken].sum())
    if taken and rest <= noise * math.sqrt(side):
        return done.entropy, 0.0, done.hidden(side, noise)
    corner, blocks = space.corner[:, -signs:].numpy(), space.size // space.block
    before = len(small) - space.block
    entropies = []
    for nodes, rows in (_descending(*torch.linalg.eigh(small[:before, :before])), (values, turn)):
        weights = np.square(corner.T @ rows[: space.block, taken:])  # (V, L − D)
        each = _quadrature(nodes[taken:], weights, noise, side - taken, rest)  # (V, 3)
        sums = _Sums(*(known + float(more) for known, more in zip(done, each.mean(axis=0), strict=True)))
        entropies.append(sums.entropy)
    influence = each[:, 0] * (1 / sums.sigma + sums.logs / sums.sigma**2) - each[:, 1] / sums.sigma
    sampling = float(influence.std(ddof=1)) / math.sqrt(signs)
    change = abs(entropies[1] - entropies[0])
    return sums.entropy, _DEVIATIONS * sampling + blocks * change, sums.hidden(side, noise)


def _descending(values: Tensor, vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors from the largest on, in float64."""
    return values.numpy()[::-1].astype(np.float64), vectors.numpy()[:, ::-1].astype(np.float64)


def _quadrature(nodes: np.ndarray, weights: np.ndarray, noise: float, count: int, trace: float) -> np.ndarray:
    """Σσ, Σσ log σ and the count (V, 3) by each vector, corrected by the known number and sum of the eigenvalues.

    Nodes (L,) and weights (V, L) are those of the vectors' quadratures.
    """
    nodes = np.where(nodes > noise, nodes, 0.0)
    scale = float(nodes.max()) or 1.0
    known = np.array([count, trace / scale])
    line = np.stack([np.ones_like(nodes), nodes / scale], axis=1)  # (L, 2)
    sigma = np.sqrt(nodes)
    wanted = np.stack([sigma, xlogy(sigma, sigma)], axis=1)  # (L, 2)
    counted = count * (weights @ (nodes > 0)) / weights.sum(axis=1)  # (V,)
    root = np.sqrt(weights.sum(axis=0))[:, None]
    fit = np.linalg.lstsq(line * root, wanted * root)[0]
    return np.concatenate([known @ fit + weights @ (wanted - line @ fit), counted[:, None]], axis=1)


def _sums(values: np.ndarray, noise: float) -> _Sums:
    sigma = np.sqrt(values[values > noise])
    return _Sums(float(sigma.sum()), float(xlogy(sigma, sigma).sum()), float(len(sigma)))
