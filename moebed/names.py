"""Names that a person may give, known before PyTorch is loaded, which takes seconds.

What a name stands for is in a registry, which needs PyTorch; a test holds the names here to those there. Once a
registry is loaded, as a plug-in that adds to it does, its own names count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from moebed.errors import ConfigError, did_you_mean


class Names:
    """The names of one kind of thing.

    Args:
        what: The thing, in words.
        registry: Module and attribute that hold what is called so, as ``probes.registry.PROBES``.
        known: Those that moebed brings along, in one text.
    """

    def __init__(self, what: str, registry: str, known: str) -> None:
        self.what, self.own = what, tuple(known.split())
        self.module, _, self.attribute = registry.rpartition(".")

    def __iter__(self) -> Iterator[str]:
        """All that are known now."""
        return iter(tuple(getattr(sys.modules.get(self.module), self.attribute, self.own)))

    def require(self, name: str, where: str, also: Sequence[str] = (), more: str = "") -> None:
        """Refuse what nothing is called.

        Args:
            name: As it was given.
            where: By what, in front of what is said.
            also: Words that stand beside the names.
            more: What is said behind.

        Raises:
            ConfigError: It is none of them.
        """
        known = (*self, *also)
        if name not in known:
            hint = did_you_mean(name, known, f"choose among {', '.join(known)}")
            raise ConfigError(f"{where}: unknown {self.what} {name!r}; {hint}{more}")


PROBES = Names(
    "probe",
    "probes.registry.PROBES",
    """
        prediction logits balance router_state routing domain_share domain_purity committee repeats
        coactivation vocabulary traffic capacity saturation norm_vs_score norm_origin strength_vs_score
        expert_outputs chosen_vs_rest weight_vs_output layer_diversity activations expert_importance
        interventions keep_k super_experts routing_ladder expert_lens control_content observed_vs_needed
        random_routes matrix_similarity neuron_similarity neuron_matching gate_similarity gate_projection
        router_coupling expert_projection expert_geometry
    """,
)
# Of them those that need weights alone; all others need text.
STATIC_PROBES = Names(
    "probe of weights",
    "probes.registry.STATIC_PROBES",
    """
        matrix_similarity neuron_similarity neuron_matching gate_similarity gate_projection router_coupling
        expert_projection expert_geometry
    """,
)
SCORES = Names(
    "score",
    "probes.measures.expert_scores.SCORES",
    """
        frequency probability ean reap weighted easy_ep
    """,
)
ROUTERS = Names(
    "router",
    "moebed.model.routers.registry.ROUTERS",
    """
        softmax_topk sigmoid_topk softmax_bias_topk group_limited_topk sparsemixer expert_norm competesmoe
        competesmoe_v2 autonomy relu noisy_topk grap locmoe_plus quantile threshold expert_choice kmeans
        random hash factorised_gate balanced document_pool oracle oracle_hash anti_oracle
    """,
)
FAMILIES = Names(
    "family",
    "moebed.checkpoints.families.registry.FAMILIES",
    """
        mixtral mistral llama qwen2 deepseek grok-1 olmoe qwen2_moe qwen3_moe granitemoe granitemoeshared
        glm4_moe dots1 minimax_m2 ernie4_5_moe deepseek_v2 deepseek_v3 gpt_oss flex_olmo phimoe emo
        olmo2_noqknorm_prenorm
    """,
)
# Settings of a probe, for those that have some.
SETTINGS = {
    "traffic": (
        "ranks", "ranks_per_node", "by_domain", "itemsize", "exchange", "recomputed", "bandwidth_node",
        "bandwidth_across",
    ),
    "interventions": ("apply",),
    "keep_k": ("one_of",),
    "control_content": ("path_layers",),
    "observed_vs_needed": ("tokens", "layers"),
    "random_routes": ("tokens", "routes", "layers"),
}  # fmt: skip
OF_DOMAINS = ("oracle", "oracle_hash", "anti_oracle")  # routers that are told each token's domain
OWN_LAYOUT = "moebed"  # of a checkpoint, beside the families
RANDOM = "random"  # beside the scores
