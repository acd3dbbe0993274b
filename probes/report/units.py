"""What the numbers of a curve in the report are in: the words at its axis."""

from __future__ import annotations

import re

# Under a part of a logged tag, or of ``<probe>/<quantity>``, of this name.
UNITS = {
    "loss": "nats a token",
    "bits_per_byte": "bits a byte",
    "router_entropy": "nats",
    "max_violation": "busiest over mean, less 1",
    "max_violation_worst": "busiest over mean, less 1",
    "idle_experts": "experts of all layers",
    "load_balancing_loss": "1 if even",
    "tokens_per_second": "tokens a second",
}
# Of a probe; the first that fits the beginning of ``<probe>/<quantity>``.
_OF_PROBES = {
    "balance/max_violation": "busiest over mean, less 1",
    "balance/dead_share": "share of experts",
    "balance/dead": "experts",
    "balance/cv": "deviation over mean",
    "balance/entropy": "1 if even",
    "router_state/margin": "probability",
    "router_state/logit_norm": "L2 norm",
    "routing/topk_mass": "probability",
    "routing/first_weight": "weight",
    "domain_share/divergence": "nats",
    "domain_share/p": "p",
    "domain_purity/purity": "share of assignments",
    "domain_purity/matched": "share of assignments",
    "domain_purity/nmi": "share of the most possible",
    "domain_purity/utilisation": "1 if even",
    "repeats/repeat_": "share of tokens",
    "repeats/mean_run": "tokens",
    "coactivation/": "share of an expert's tokens",
    "saturation/settled_at": "share of training",
    "saturation/": "share of choices",
    "norm_vs_score/topk_overlap": "share of experts",
    "prediction/": "nats a token",
    "random_routes/percentile": "share of routes",
    "random_routes/gap": "nats a token",
    "keep_k/": "nats a token",
    "interventions/": "nats a token",
    "super_experts/rise": "nats a token",
    "expert_importance/ablation_loss": "nats a token",
}
# Of any other, where its name has the word.
_WORDS = {
    "cos": "cosine",
    "spearman": "rank correlation",
    "rho": "rank correlation",
    "tau": "Kendall's tau",
    "r2": "R²",
}


def unit_of(tag: str) -> str:
    """What the numbers of a logged tag, or of ``<probe>/<quantity>``, are in; empty where nothing is known of them."""
    parts = [UNITS[part] for part in tag.split("/") if part in UNITS]
    parts += [unit for start, unit in _OF_PROBES.items() if tag.startswith(start)]
    words = re.split(r"[/_]", tag.partition("/")[2])
    parts += [unit for word, unit in _WORDS.items() if word in words]
    return next(iter(parts), "")
