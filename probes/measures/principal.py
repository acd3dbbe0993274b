"""Principal components by way of Gram matrices, and outliers among points.

E matrices, X further ones, N neurons of a matrix, H hidden, P points, D dimensions kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from moebed.machine.float32 import exact_products
from probes.measures.bands import all_half, one_core_each, sum_over_bands
from probes.measures.krylov import leading
from probes.measures.spectrum import EXACT_BELOW, gram, start_of

_CACHED_ELEMENTS = 1 << 18  # a megabyte in float32, which stays in a core's cache
NOISE = {True: 1e-6, False: 1e-12}  # of products of standardised numbers, whether they had 16 bits or more


def standardised_products(bands: Iterable[Sequence[Tensor]], count: int) -> tuple[Tensor, float]:
    """Scalar products of whole matrices with the first ``count`` of them, over which each coordinate is standardised.

    They are gathered over bands of rows in float64; within a band, 16-bit numbers are standardised and multiplied in
    float32. A coordinate in which all agree counts as 0.

    Args:
        bands: The same rows of all matrices at a time: ``count`` that coordinates are standardised over, at least 2,
            and any number (X) more.
        count: E.

    Returns:
        (E + X, E) float64, and the share of them that is rounding.
    """
    noise = NOISE[False]

    def rows_of() -> Iterator[Sequence[Tensor]]:
        nonlocal noise
        for blocks in bands:
            noise = NOISE[all_half(blocks)]
            yield blocks

    def product(piece: Tensor) -> Tensor:
        piece = _standardise(piece, count)
        return piece @ piece[:count].T

    with exact_products(is_bf16=False):
        return sum_over_bands(rows_of(), product), noise


def matrix_components(products: Tensor, noise: float, dims: int) -> tuple[np.ndarray, ...]:
    """PCA of whole matrices from their standardised scalar products, as ``standardised_products`` gives them.

    A component's sign is chosen so that the first matrix that lies clearly off its middle is positive.

    Args:
        products: (E + X, E), of E matrices that the components are fitted to, and X that are projected onto them.
        noise: Components with less than this share of the first one's variance are none.
        dims: Components; those beyond E − 1 are 0.

    Returns:
        (E + X, dims) coordinates and (dims,) shares of the variance, both float32.
    """
    count = products.shape[1]
    if not torch.isfinite(products).all():
        return np.full((len(products), dims), np.nan, np.float32), np.full(dims, np.nan, np.float32)
    values, vectors = torch.linalg.eigh(products[:count])
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = values > noise * values[0]
    scores = products @ vectors * torch.where(kept, values.rsqrt(), 0.0)
    scores, share = scores[:, :dims], torch.where(kept, values / values.sum(), 0.0)[:dims]
    return _padded(_signed(scores.numpy(), count), dims), _padded(np.nan_to_num(share.numpy())[None], dims)[0]


def point_components(points: Tensor, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """PCA of points (P, H), each coordinate standardised (ddof 1): (P, dims) coordinates, (dims,) shares; float32."""
    points = points.float().cpu()
    if len(points) < 2 or not torch.isfinite(points).all():
        return np.full((len(points), dims), np.nan, np.float32), np.full(dims, np.nan, np.float32)
    with torch.inference_mode(False):  # threads write into it that are not in that mode
        points = points.clone()
    columns = points.split(max(1, _CACHED_ELEMENTS // len(points)), dim=1)
    with one_core_each("points") as each:
        list(each(partial(_standardise, count=len(points)), columns))
    tall = len(points) >= points.shape[1]
    with exact_products(is_bf16=False):
        product = gram(points.T if tall else points).numpy()
    values, vectors = top_eigenvectors(product, min(dims, len(product)))
    scores = points.numpy() @ vectors if tall else vectors * np.sqrt(values)
    return _padded(_signed(scores, len(scores)), dims), _padded((values / max(product.trace(), 1e-30))[None], dims)[0]


def _standardise(rows: Tensor, count: int) -> Tensor:
    """Each column of rows (M, n), in place, less the mean and over the deviation (ddof 1) of its first ``count``.

    Passes over rows as they lie in memory; norms and deviations that PyTorch takes down columns cost ten times as much.
    The first row is taken off before the mean, so that columns in which all agree are exactly 0.
    """
    fitted = rows[:count]
    rows -= rows[0].clone()
    rows -= fitted.mean(dim=0)
    deviation = fitted.square().sum(dim=0).div_(count - 1).sqrt_()
    return rows.mul_(torch.where(deviation > 0, 1 / deviation, 0.0))


def top_eigenvectors(product: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues (count,), descending, of a Gram matrix (M, M), and their vectors (M, count).

    From ``EXACT_BELOW`` on, they are as near as ``probes.measures.krylov.leading`` comes.
    """
    if len(product) < EXACT_BELOW or count >= len(product) // 4:
        values, vectors = np.linalg.eigh(product.astype(np.float64))
        return np.maximum(values[-count:][::-1], 0), vectors[:, -count:][:, ::-1]
    wide = torch.from_numpy(product)
    with exact_products(is_bf16=False):
        found = leading(wide, start_of(wide, in_longer=True)[0], count)
    return found.values[:count].numpy(), found.vectors[:, :count].numpy()


def outliers(points: np.ndarray, eps: float, min_samples: int) -> np.ndarray:
    """Which points (P, D) DBSCAN calls noise, (P,) bool: no core point, nor within reach of one.

    A core point has ``min_samples`` points, itself among them, within ``eps``.
    """
    tree = cKDTree(points)
    core = tree.query_ball_point(points, eps, return_length=True) >= min_samples
    if not core.any():
        return np.ones(len(points), bool)
    return cKDTree(points[core]).query(points)[0] > eps


def _signed(scores: np.ndarray, count: int) -> np.ndarray:
    """Flip columns so that the first of ``count`` rows that is at least half as far out as the farthest is positive."""
    size = np.abs(scores[:count])
    first = (size >= 0.5 * size.max(axis=0)).argmax(axis=0)
    sign = np.sign(scores[first, np.arange(scores.shape[1])])
    return scores * np.where(sign == 0, 1, sign)


def _padded(values: np.ndarray, dims: int) -> np.ndarray:
    """Zero columns up to ``dims``, float32."""
    return np.pad(values, ((0, 0), (0, dims - values.shape[1]))).astype(np.float32)
