"""Losses that keep experts and gate embeddings apart, or an expert and its gate embedding together.

Each is without its coefficient. Of parameters alone, but for the last two: of a token's outputs, and probabilities.

T tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.machine.float32 import float32_linear

_RIDGE = 1e-6  # of the mean square, so that outputs which are alike have a projection and a gradient


def responses(gate: Tensor, matrices: Tensor) -> Tensor:
    """How strongly each expert's ``gate`` projection answers to each gate embedding: ‖W^j r_i‖₂, (experts, E) float32.

    Args:
        gate: Gate embeddings r (E, H).
        matrices: W of some experts (experts, F, H).
    """
    return float32_linear(matrices.flatten(0, 1), gate).unflatten(0, matrices.shape[:2]).norm(dim=1)


def perturbed(gate: Tensor, uniform: Tensor) -> Tensor:
    """Gate embeddings (E, H) times δ ~ U(1 − ε_i, 1 + ε_i) from uniform numbers (E, H) in [0, 1); float32.

    ε_i is half the distance to the nearest other embedding over the own length, so that each stays nearest to itself.
    """
    gate = gate.float()
    with torch.no_grad():
        apart = (gate.unsqueeze(0) - gate.unsqueeze(1)).norm(dim=-1)  # (E, E)
        apart = apart + torch.diag(apart.new_full((len(gate),), torch.inf))
        reach = apart.min(dim=1).values / (2 * gate.norm(dim=1).clamp_min(torch.finfo(gate.dtype).tiny))
        reach = torch.where(reach.isfinite(), reach, 0.0).unsqueeze(1)  # one expert has no other
        delta = 1 + reach * (2 * uniform - 1)
    return gate * delta


def coupling_loss(response: Tensor, alpha: float) -> Tensor:
    """Expert-router coupling: (1 / E²) Σ_i Σ_{j≠i} max(M_ij − α M_ii, 0) + max(M_ji − α M_ii, 0), () float32.

    M_ij is how strongly expert j answers to gate embedding i: an expert is to answer to its own embedding more than to
    others, and more than others do. As "ERC" of Aeva's code has it, which sees no activation function. It is not free
    of scale: growing M_ii lowers it.

    Args:
        response: M transposed, as :func:`responses` gives it: (E, E), the expert first.
        alpha: Above 1 it asks for less.
    """
    own = alpha * response.diagonal()
    over_others = (response - own.unsqueeze(0)).relu()  # of the same embedding: M_ij − α M_ii
    over_own = (response - own.unsqueeze(1)).relu()  # of the same expert: M_ji − α M_ii
    apart = 1 - torch.eye(len(response), device=response.device)
    return ((over_others + over_own) * apart).sum() / response.numel()


def gram_distance(gate: Tensor) -> Tensor:
    """SimBal: Σ_ij ∣(W_g W_gᵀ − I)_ij∣ of gate embeddings (E, H) as they are, () float32; pulls their lengths to 1."""
    return (float32_linear(gate, gate) - torch.eye(len(gate), device=gate.device)).abs().sum()


def squared_cosines(gate: Tensor) -> Tensor:
    """ERNIE 4.5's: the mean over E² of (Ŵ Ŵᵀ − I)² of gate embeddings (E, H) of length 1, () float32."""
    unit = F.normalize(gate.float(), dim=-1)
    return (float32_linear(unit, unit) - torch.eye(len(gate), device=gate.device)).square().mean()


def projections(outputs: Tensor) -> Tensor:
    """Squared length of each output of a token within what its other outputs span, mean over K: (T,) float32.

    The orthogonality loss of 2505.22323, of each token by itself (its released code mixes tokens). It is not free of
    scale. 0 for K = 1.

    Args:
        outputs: (T, K, H), not weighted.
    """
    top_k = outputs.shape[1]
    if top_k == 1:
        return outputs.float().sum(dim=(1, 2)) * 0
    with torch.autocast(outputs.device.type, enabled=False):
        outputs = outputs.float()
        gram = (outputs.unsqueeze(1) * outputs.unsqueeze(2)).sum(dim=-1)  # (T, K, K); no product that is rounded
        every = torch.arange(top_k, device=outputs.device)
        others = torch.stack([every.roll(-1 - i)[: top_k - 1] for i in range(top_k)])  # (K, K - 1)
        among = gram[:, others.unsqueeze(2), others.unsqueeze(1)]  # (T, K, K - 1, K - 1)
        with_own = gram[:, others, every.unsqueeze(1)]  # (T, K, K - 1)
        mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1).detach().view(-1, 1, 1, 1)
        ridge = (_RIDGE * mean).clamp_min(torch.finfo(gram.dtype).tiny) * torch.eye(top_k - 1, device=gram.device)
        # solve_ex, as solve would wait for the device to say that no matrix is singular, which the ridge sees to.
        solved = torch.linalg.solve_ex(among + ridge, with_own.unsqueeze(-1)).result.squeeze(-1)
        return (with_own * solved).sum(dim=-1).mean(dim=-1)


def negative_variance(probs: Tensor) -> Tensor:
    """The other loss of 2505.22323: − Var_e(p_te) of router probabilities (T, E), (T,); least where one is 1."""
    return -probs.var(dim=-1, correction=0)
