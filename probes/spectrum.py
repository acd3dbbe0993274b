"""Spectra of large matrices from a few products: the Gram matrix of the shorter side, and products of that with blocks.

A whole eigendecomposition reads a matrix of side N some N times on one core: half a second at 1408, tens at 4096, where
the Gram matrix itself takes hundredths and one. So from 512 on the leading directions come from a block Krylov space
(Musco and Musco, arXiv 1504.05477), and sums over all singular values from stochastic Lanczos quadrature (Ubaru, Chen
and Saad, 2017) of what these leave, each with an error that is estimated from the same numbers. Every start is fixed,
so the same matrix gives the same numbers twice.

N shorter side, K longer side, B columns of a block, D directions taken out, V vectors, L Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.float64 import double
from probes.matching import exact_products

EXACT_BELOW = 512  # a side; the whole decomposition in float64 then takes less than a tenth of a second
_BLOCK, _BLOCKS = 32, 8
_VECTORS, _STEPS = 8, (8, 16, 32, 48)  # Lanczos goes on to the next number where the last one changed the result
_STEADY = 1e-3  # of the entropy, in nats
_CONVERGED = 1e-2  # of an eigenvalue: a residual below it changes a sum by its square
_SETTLED = 1e-3  # of an eigenvalue, where a search goes on until then
_CHANCE = 1e-5
_PASSES = 3  # of orthogonalisation, at most
_BANDS = 4  # of the Gram matrix: of 16 products 10 are made, the others mirror them


class Spectrum(NamedTuple):
    """What is known of the singular values of a matrix, and its leading directions.

    Args:
        largest: ‖W‖₂.
        effective_rank: exp of the entropy of the singular values taken as shares of their sum.
        rank_error: Estimated relative error of that; 0 where it is exact. It is the standard error of the sampled
            vectors and of the last change with more steps, neither of them a bound, and the most that values within
            the rounding, which count as 0, could add. Singular values that fall far below the rounding are its weak
            side: as i⁻² at a side of 640 or more, the rank is some 8 % low and the stated error of 1 and more says
            only that it is not known; as exp(−i/100) at 1408, it is 7 % high and the stated error 4 %.
        vectors: (N, R) leading eigenvectors of the Gram matrix.
        angle: Bound on the sine of the largest angle between their span and the exact one, at most 1; 1 where the
            eigenvalues next to the border are too close for a subspace to be told apart.
    """

    largest: float
    effective_rank: float
    rank_error: float
    vectors: Tensor
    angle: float


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


def gram(short: Tensor, is_bf16: bool) -> Tensor:
    """W Wᵀ (N, N) of a matrix (N, K), in its dtype; its lower triangle is computed and mirrored."""
    side = len(short)
    product = short.new_empty(side, side)
    step = -(-side // _BANDS) if side >= EXACT_BELOW else side
    with exact_products(is_bf16):
        for first in range(0, side, step):
            stop = min(first + step, side)
            band = product[first:stop, :stop]
            torch.mm(short[first:stop], short[:stop].T, out=band)
            product[:first, first:stop] = band[:, :first].T
    return product


def spectrum(product: Tensor, start: Tensor, count: int) -> Spectrum:
    """The spectrum of a matrix by its Gram matrix (N, N), not 0, from a start (N, B) for its first ``count`` vectors.

    Eigenvalues within the rounding of the Gram matrix count as 0.
    """
    side, trace = len(product), float(double(product.diagonal()).sum())
    noise = 16 * torch.finfo(product.dtype).eps * trace / math.sqrt(side)  # rounding is spread over all directions
    if side < EXACT_BELOW:
        values, vectors = torch.linalg.eigh(double(product))
        values, vectors = values.flip(0), vectors.flip(1)
        sums = _sums(values, noise)
        angle = _angle(values, torch.full((count,), noise, dtype=torch.float64), count)
        return Spectrum(math.sqrt(float(values[0])), math.exp(sums.entropy), 0.0, vectors[:, :count], angle)
    with exact_products(is_bf16=False):
        values, vectors, residuals = leading(product, start)
        taken = int((residuals < _CONVERGED * values).long().cumprod(0).sum())
        entropy, error = _entropy(product, values[:taken], vectors[:, :taken], trace, noise)
    angle = _angle(values, residuals[:count], count)
    return Spectrum(math.sqrt(float(values[0])), math.exp(entropy), error, vectors[:, :count], angle)


def start_of(short: Tensor, in_longer: bool) -> Tensor:
    """A start (N, B) for the Krylov space.

    It is fixed where the long side is the space that experts share. Where the short one is, it comes from the matrix
    itself: with the same start, spaces that have not converged would look alike.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(short.shape[0 if in_longer else 1], _BLOCK, generator=generator).to(short)
    return signs if in_longer else short @ signs


def leading(product: Tensor, start: Tensor, count: int = 0, restarts: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenvalues (2B,) of a Gram matrix (N, N), descending, float64, vectors (N, 2B) and residuals (2B,).

    Where the residuals of the first ``count`` are not small yet, the search goes on from what was found.
    """
    values, vectors, residuals = _krylov(product, start)
    for _ in range(restarts):
        if bool((residuals[:count] <= _SETTLED * values[:count]).all()):
            break
        values, vectors, residuals = _krylov(product, vectors[:, :_BLOCK])
    return values, vectors, residuals


def _krylov(product: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = _BLOCK * _BLOCKS
    basis, image = product.new_empty(len(product), width), product.new_empty(len(product), width)
    generator = torch.Generator().manual_seed(2)
    chance = (torch.randn(start.shape, generator=generator) / math.sqrt(len(product))).to(product)
    block = torch.linalg.qr(start)[0]
    for first in range(0, width, _BLOCK):
        stop = first + _BLOCK
        basis[:, first:stop] = block
        image[:, first:stop] = block = product @ block
        if stop == width:
            break
        # Where the space is exhausted, what is left is rounding that lies in it; a little chance leads out.
        block = block + chance * (_CHANCE * block.norm(dim=0))
        for turn in range(_PASSES):
            block, left = torch.linalg.qr(torch.addmm(block, basis[:, :stop], basis[:, :stop].T @ block, alpha=-1))
            size = left.diagonal().abs()
            if turn and bool(size.min() > 0.5):  # of columns that had length 1: nothing was left in the space
                break
    small = (basis.T @ image).cpu().double()
    values, turn = torch.linalg.eigh((small + small.T) / 2)
    kept = 2 * _BLOCK
    values, turn = values.flip(0)[:kept].clamp(min=0), turn.flip(1)[:, :kept].to(product)
    vectors = basis @ turn
    residuals = (image @ turn - vectors * values.to(product)).norm(dim=0).cpu().double()
    return values, vectors, residuals


def _angle(values: Tensor, residuals: Tensor, count: int) -> float:
    """Davis and Kahan's bound on the sine of the largest angle to the exact subspace of the first vectors."""
    gap = float(values[count - 1] - values[count]) if count < len(values) else float(values[count - 1])
    error = float(residuals.norm())
    return min(1.0, error / gap) if gap > 0 else 1.0


def _entropy(product: Tensor, values: Tensor, vectors: Tensor, trace: float, noise: float) -> tuple[float, float]:
    """Entropy of the singular values' shares, and its standard error: exact for D values, sampled for the others."""
    side, taken = len(product), len(values)
    rest = trace - float(values.sum())
    done = _sums(values, noise)
    if rest <= noise * math.sqrt(side) or taken == side:
        return done.entropy, done.hidden(side, noise)
    before = math.inf
    for diagonal, off, mass in _lanczos(product, vectors):
        each = _quadrature(diagonal, off, mass, noise, side - taken, rest)  # (V, 3)
        sums = _Sums(*(known + float(more) for known, more in zip(done, each.mean(dim=0), strict=True)))
        change, before = abs(sums.entropy - before), sums.entropy
        if change < _STEADY:
            break
    influence = each[:, 0] * (1 / sums.sigma + sums.logs / sums.sigma**2) - each[:, 1] / sums.sigma
    sampling = float(influence.std()) / math.sqrt(_VECTORS)
    return sums.entropy, math.hypot(sampling, change) + sums.hidden(side, noise)


def _lanczos(product: Tensor, without: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Lanczos on random signs, side by side, orthogonal to some directions (N, D).

    Yields:
        After each number of steps L, diagonals (V, L) and off-diagonals (V, L − 1) of the tridiagonal matrices, and the
        squared length of each start (V,); float64.
    """
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (_VECTORS, len(product)), generator=generator) * 2 - 1
    without = without.T.contiguous()

    def project(block: Tensor) -> Tensor:
        return torch.addmm(block, block @ without.T, without, alpha=-1) if len(without) else block

    block = project(signs.to(product))  # vectors as rows, whose sums are fast
    length = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    block, before, below = block / length, torch.zeros_like(block), torch.zeros_like(length)
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for step in range(1, _STEPS[-1] + 1):
        image = project((product @ block.T).T.contiguous()).addcmul_(below, before, value=-1)
        diagonal.append(torch.linalg.vecdot(image, block).unsqueeze(1))
        image.addcmul_(diagonal[-1], block, value=-1)
        below = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        if step in _STEPS:
            found = torch.cat(diagonal, dim=1), torch.cat([*off, length], dim=1)
            alpha, rest = (part.cpu().double() for part in found)
            yield alpha, rest[:, :-1], rest[:, -1].square()
        off.append(below)
        before, block = block, image / below.clamp(min=torch.finfo(product.dtype).tiny)


def _quadrature(diagonal: Tensor, off: Tensor, mass: Tensor, noise: float, count: int, trace: float) -> Tensor:
    """Σσ, Σσ log σ and the count (V, 3) by each vector, corrected by the known number and sum of the eigenvalues."""
    nodes, turn = torch.linalg.eigh(torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1))
    weights = mass.unsqueeze(1) * turn[:, 0].square()  # (V, L)
    nodes = torch.where(nodes > noise, nodes, 0.0)
    scale = float(nodes.max()) or 1.0
    known = torch.tensor([count, trace / scale], dtype=torch.float64)
    line = torch.stack([torch.ones_like(nodes), nodes / scale], dim=-1)  # (V, L, 2)
    sigma = nodes.sqrt()
    wanted = torch.stack([sigma, torch.special.xlogy(sigma, sigma)], dim=-1)  # (V, L, 2)
    counted = count * (weights * (nodes > 0)).sum(dim=1, keepdim=True) / mass.unsqueeze(1)  # (V, 1)
    root = weights.sqrt().unsqueeze(-1)
    fit = torch.linalg.lstsq((line * root).flatten(0, 1), (wanted * root).flatten(0, 1), driver="gelsd").solution
    return torch.cat([known @ fit + (weights.unsqueeze(-1) * (wanted - line @ fit)).sum(dim=1), counted], dim=1)


def _sums(values: Tensor, noise: float) -> _Sums:
    sigma = values[values > noise].cpu().double().sqrt()
    return _Sums(float(sigma.sum()), float(torch.special.xlogy(sigma, sigma).sum()), float(len(sigma)))
