"""Paths of tokens through the first choices of several layers: how far these go together, and whose paths they are.

T tokens, L layers of a path.
"""

from __future__ import annotations

import numpy as np

from probes.measures.resampling import SEED

TOKENS = 10  # of a path, whose ids are counted


def entropy(labels: np.ndarray) -> float:
    """Nats of labels (T,) or of rows (T, ·), as they were counted."""
    count = np.unique(labels, axis=0, return_counts=True)[1]
    share = count / count.sum()
    return float(-(share * np.log(share)).sum())


def path_correlation(path: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Entropies of paths (T, L) and of their layers, the difference, and that of layers shuffled among tokens.

    Counts of few tokens make any layers seem to go together, which shuffled ones show as well. Among tokens of one id
    (T,) what follows from the id alone stays.
    """
    rng = np.random.default_rng(SEED)
    layers = float(sum(entropy(of) for of in path.T))
    whole = entropy(path)
    alike = np.argsort(ids, kind="stable")
    found = {"path_entropy": whole, "layer_entropies": layers, "total_correlation": layers - whole}
    for name, groups in (("same_id", ids), ("shuffled", np.zeros_like(ids))):
        mixed = np.empty_like(path)
        for column in range(path.shape[1]):
            # In the order of ids, and at random within each.
            order = np.lexsort((rng.random(len(ids)), groups))
            place = alike if name == "same_id" else np.arange(len(ids))
            mixed[place, column] = path[order, column]
        found[f"total_correlation_{name}"] = layers - entropy(mixed)
    return found


def ids_per_path(path: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Different ids among ten tokens of a path, mean over paths of as many, and with ids shuffled; NaN of none."""
    rng = np.random.default_rng(SEED)
    number = np.unique(path, axis=0, return_inverse=True)[1].ravel()
    order = np.lexsort((rng.random(len(ids)), number))
    start = np.flatnonzero(np.r_[True, np.diff(number[order]) > 0])
    long = np.diff(np.r_[start, len(ids)]) >= TOKENS
    if not long.any():
        return {"ids_per_path": float("nan"), "ids_per_path_shuffled": float("nan")}
    tokens = order[start[long][:, None] + np.arange(TOKENS)]  # (paths, 10)
    mixed = ids[rng.permutation(len(ids))]

    def different(of: np.ndarray) -> float:
        return float((1 + (np.diff(np.sort(of[tokens], axis=1), axis=1) > 0).sum(axis=1)).mean())

    return {"ids_per_path": different(ids), "ids_per_path_shuffled": different(mixed)}
