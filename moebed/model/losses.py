"""The language-model loss, the balancing losses on router decisions and the diversity losses on the experts.

Each is without its coefficient. The cross entropy is written out, forward and backward: torch's takes a float32 copy
of all logits, and of their gradient, the largest tensors of a small model's step.

B sequences, S positions, V vocabulary, T = B·S tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.machine.float32 import float32_linear
from moebed.model.native import rowwise
from moebed.model.routing import Routing

IGNORE_INDEX = -100


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every next token in nats, (B, S) float32; 0 where labels (B, S) are -100. logits (B, S, V).

    Raises:
        RuntimeError: Another label is below 0, or V or above.
    """
    flat = logits.flatten(0, 1)
    if torch.compiler.is_compiling():  # the compiler fuses this one by itself
        nats = F.cross_entropy(flat.float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    else:
        nats = _CrossEntropy.apply(flat, labels.flatten())
    return nats.view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy of logits (T, V) a few rows at a time, so that no float32 copy of all of them is ever made."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.native = logits.dtype in (torch.float32, torch.bfloat16) and rowwise.fits(logits, 16)
        if ctx.native:
            log_sums = rowwise.log_sums(logits)  # (T,)
        else:
            log_sums = torch.cat([rows.float().logsumexp(dim=-1) for rows in logits.split(_rows_at_once(logits))])
        ctx.save_for_backward(logits, labels, log_sums)
        ignored = labels == IGNORE_INDEX
        chosen = logits.gather(1, labels.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).float()  # refuses all others
        return (log_sums - chosen).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, labels, log_sums = ctx.saved_tensors
        grad = grad.masked_fill(labels == IGNORE_INDEX, 0.0)
        if ctx.native:
            return rowwise.cross_entropy_backward(logits, log_sums, labels, grad), None
        out = torch.empty_like(logits)
        size = _rows_at_once(logits)
        parts = (tensor.split(size) for tensor in (out, logits, labels, log_sums, grad))
        for target, rows, label, log_sum, scale in zip(*parts, strict=True):
            probs = rows.float().sub_(log_sum.unsqueeze(1)).exp_()
            probs.scatter_add_(1, label.clamp(min=0).unsqueeze(1), probs.new_full((len(label), 1), -1.0))
            torch.mul(probs, scale.unsqueeze(1), out=probs)
            target.copy_(probs)
        return out, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, logits_at_once(logits.device.type) // logits.shape[1])


def logits_at_once(device_type: str) -> int:
    """Logits that the cross entropy has in float32 at a time: what a core's cache holds, or 64 MiB on a GPU."""
    return 2**18 if device_type == "cpu" else 2**24


class RouterStats(NamedTuple):
    """One layer's routing, summed up for the balancing losses."""

    counts: Tensor  # (E,) float32 assignments to each expert; no gradient
    mean_probs: Tensor  # (E,) mean router probability
    z_loss: Tensor  # () mean of logsumexp(logits)²  (ST-MoE 2202.08906, eq. 5)
    losses: dict[str, Tensor]  # () means of the layer's own losses, by name
    sums: dict[str, Tensor]  # (E,) what the router's losses of a batch are made of, by name
    entropy: Tensor  # () mean entropy of the tokens' router probabilities, in nats; no gradient


def router_stats(routing: Routing, token_mask: Tensor) -> RouterStats:
    """Counts, mean probabilities, z-loss and entropy of one layer over the tokens of token_mask (T,) bool."""
    weight = token_mask.to(torch.float32)  # (T,)
    num_tokens = weight.sum().clamp(min=1)
    counts = torch.zeros(routing.router_probs.shape[-1], dtype=torch.float32, device=weight.device)
    counted = (weight.unsqueeze(1) * routing.assigned).flatten()  # (T·K,)
    counts = counts.scatter_add(0, routing.topk_index.flatten(), counted)
    # Not a matrix product, which autocast and TF32 would round.
    mean_probs = (weight.unsqueeze(1) * routing.router_probs).sum(dim=0) / num_tokens
    z_loss = (weight * routing.router_logits.logsumexp(dim=-1).square()).sum() / num_tokens
    losses = {name: (weight * values).sum() / num_tokens for name, values in (routing.losses or {}).items()}
    sums = {name: (weight.unsqueeze(1) * values).sum(dim=0) for name, values in (routing.sums or {}).items()}
    entropy = (weight * torch.special.entr(routing.router_probs.detach()).sum(dim=-1)).sum() / num_tokens
    return RouterStats(counts.detach(), mean_probs, z_loss, losses, sums, entropy)


def domain_counts(routing: Routing, token_mask: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """Assignments of each domain's tokens to each expert (D, E) float32, without a gradient.

    Args:
        routing: Of one layer.
        token_mask: (T,) bool, tokens that count.
        domain: (B,) index of each sequence's domain.
        num_domains: D.
    """
    num_experts = routing.router_probs.shape[-1]
    of_token = domain.unsqueeze(1).expand(-1, len(token_mask) // len(domain)).reshape(-1, 1)  # (T, 1)
    counted = (token_mask.unsqueeze(1) & routing.assigned).to(torch.float32)  # (T, K)
    counts = counted.new_zeros(num_domains * num_experts)
    slots = of_token * num_experts + routing.topk_index
    return counts.scatter_add(0, slots.flatten(), counted.flatten()).view(num_domains, num_experts)


def load_balancing_loss(mean_probs: Tensor, counts: Tensor) -> Tensor:
    """E · Σ_i f_i P_i (Switch Transformer 2101.03961, eq. 4); float32 scalar, and 0 where nothing is assigned.

    1 where the work is shared evenly, f_i = 1/E, and wherever the P_i are all equal; with ``relu`` times the share of
    tokens that have an expert at all.

    Args:
        mean_probs: (E,) P_i, the mean probability of each expert, through which the gradient is to flow alone.
        counts: (E,) assignments to each expert, of the same tokens or of a wider scope, without a gradient; f_i is
            their share of all assignments, 1/K of Switch's share of tokens.
    """
    return len(counts) * (counts / counts.sum().clamp(min=1) * mean_probs).sum()


def sequence_balancing_loss(routing: Routing, token_mask: Tensor, num_sequences: int) -> Tensor:
    """The load-balancing loss of each sequence by itself, mean over sequences; () float32.

    As DeepSeek's ``seq_aux``, Megatron-LM's ``seq_aux_loss`` and OLMo-core's ``instance`` have it, but that sequences
    weigh as many tokens as they have. Less the loss of all of them together it is E · Σ_i Cov(f_i, P_i) over sequences,
    where each has as many assignments as the others: what specialisation by sequence costs under this scope alone.

    Args:
        routing: Of one layer.
        token_mask: (T,) bool, tokens that count.
        num_sequences: B, which lie one after another.
    """
    mask = token_mask.view(num_sequences, -1)
    one_by_one = torch.arange(num_sequences, device=mask.device)
    counts = domain_counts(routing, token_mask, one_by_one, num_sequences)  # (B, E)
    probs = routing.router_probs.view(*mask.shape, -1)
    sums = (mask.unsqueeze(-1) * probs).sum(dim=1)  # (B, E), of probabilities
    each = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1) * sums).sum(dim=1)  # Σ f_i P_i, times the tokens
    return counts.shape[1] * each.sum() / mask.sum().clamp(min=1)


def squared_variation(values: Tensor) -> Tensor:
    """The squared coefficient of variation of values (E,), () float32: unbiased variance over squared mean.

    0 where all are equal, E where one alone is not 0 (Shazeer 2017, section 4).
    """
    values = values.float()
    if len(values) == 1:
        return values.sum() * 0
    return values.var() / (values.mean().square() + 1e-10)


def output_similarity(outputs: Tensor) -> Tensor:
    """Mean cosine between the outputs of a token's experts, over its K·(K − 1) ordered pairs; 0 for K = 1.

    The diversity loss of CompeteSMoE 2 (2505.13380). An output of length 0 has cosine 0 with every other.

    Args:
        outputs: (T, K, H), not weighted.

    Returns:
        (T,) float32.
    """
    top_k = outputs.shape[1]
    unit = F.normalize(outputs.float(), dim=-1)
    # Σ_{j≠k} u_j·u_k = |Σ_k u_k|² − Σ_k |u_k|², which needs no (K, K) table for each token.
    pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    return pairs / max(top_k * (top_k - 1), 1)


def weight_similarity(mean_neurons: Sequence[Tensor]) -> Tensor:
    """Mean squared cosine between the mean neurons of two experts, over pairs of experts and over matrices.

    As the probe ``neuron_similarity`` has it (2406.18219, section 4.1), squared; 0 for one expert.

    Args:
        mean_neurons: (E, H) of each matrix.

    Returns:
        () float32.
    """
    found = []
    for vectors in mean_neurons:
        unit = F.normalize(vectors.float(), dim=-1)
        cosine = float32_linear(unit, unit)  # (E, E)
        found.append(cosine.square().sum() - cosine.diagonal().square().sum())
    num_experts = len(mean_neurons[0])
    return torch.stack(found).mean() / max(num_experts * (num_experts - 1), 1)
