"""The combine in plain torch: what the kernel is held to."""

from torch import Tensor


def combine(rows: Tensor, slot: Tensor, weight: Tensor | None, top_k: int) -> Tensor:
    """Σ_k weight[t, k] · rows[slot[t, k]] for rows (R, H), slot (R,) and weight (T, K) or None: (T, H)."""
    picked = rows[slot.long()].unflatten(0, (-1, top_k))  # (T, K, H)
    return picked.sum(1) if weight is None else (picked * weight.unsqueeze(-1)).sum(1)
