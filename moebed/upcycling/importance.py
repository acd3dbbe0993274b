"""How much a dense model's loss would change without each neuron, told apart by texts (LLaMA-MoE 2406.16554).

v_i[j] = mean over the tokens of text cluster i of |h_j · ∂L/∂h_j|, where h = act(x W_gateᵀ) ⊙ x W_upᵀ enters ``down``
and L is the mean cross entropy of the next tokens. Nothing is updated. Gradients are streamed: what enters each layer
is kept on the way forwards, and each layer is computed anew on the way back.

E text clusters, T valid tokens, H hidden, D width of the dense FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moebed.errors import ConfigError, UserError
from moebed.machine.mapped import new_array
from moebed.upcycling.clusters import means, token_clusters
from moebed.upcycling.contract import TextFacts, generator
from moebed.upcycling.text import TextWalk

_NOTE = (
    "layer {layer}: by products with the centroids some text cluster had no token, so tokens are told apart by distance"
)


@torch.no_grad()
def importance_of(
    walk: TextWalk,
    layers: Collection[int],
    clusters: int,
    by_domain: bool,
    seed: int,
    scratch: Path | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[int, TextFacts]:
    """Importance (E, D) of the neurons of some layers, and the centroids (E, H) of their FFNs' inputs.

    Tokens are told apart by their text's domain; or in each layer by themselves, as LLaMA-MoE-v2 does (2411.15708):
    k-means on the FFN's inputs with sizes within 40 % of equal, and a token is of the cluster whose centroid has the
    largest product with it. Where that leaves a cluster empty, as a centroid much longer than the others does, tokens
    stay where the k-means has them, and the layer's note says so. The last token of a sequence predicts nothing and is
    left out, as padding is.

    Args:
        walk: The text.
        layers: Which.
        clusters: E.
        by_domain: Whether by domain.
        seed: Of the k-means.
        scratch: A folder where what enters the layers may lie; in memory if not given.
        on_layer: Called twice for each layer of the model, as the text has passed it.

    Raises:
        ConfigError: There are not E domains.
        UserError: A cluster has no token that predicts one.
    """
    if by_domain and len(walk.text.domains) != clusters:
        raise ConfigError(
            f"text-clusters domains: the text has {len(walk.text.domains)} domains but {clusters} experts are to be "
            "told apart by them; give as many --domain NAME=FILE, or choose text-clusters tokens"
        )
    depth, counted = walk.config.num_hidden_layers, walk.targets >= 0
    shape = (depth, walk.num_tokens, walk.config.hidden_size)
    entering = torch.from_numpy(new_array(shape, np.dtype(np.float32), scratch))
    cluster: dict[int, Tensor] = {}
    centroids: dict[int, Tensor] = {}
    note = dict.fromkeys(layers, "")
    domain = walk.text.domain[walk.text.sequence]
    hidden = walk.embed()
    for layer in range(depth):
        entering[layer] = hidden
        block = walk.block(layer)
        attended = walk.attend(block, hidden)
        if layer in layers:
            x = block.pre_ffn_norm(attended)
            draws = generator(seed, layer, "text clusters")
            if by_domain:
                cluster[layer], centroids[layer] = domain, means(x, domain, clusters)
            else:
                nearest, centroids[layer] = token_clusters(x, clusters, draws)
                cluster[layer] = (x @ centroids[layer].T).argmax(dim=1)
                if _empty(cluster[layer][counted], clusters):
                    cluster[layer], note[layer] = nearest, _NOTE.format(layer=layer)
            _require_tokens(cluster[layer][counted], clusters, layer)
        hidden = walk.feed_forward(block, attended)
        on_layer()
    _, grad = walk.loss_and_gradient(hidden)
    facts = {}
    for layer in reversed(range(depth)):
        watch = _Sums(cluster.get(layer), counted, clusters, walk.config.intermediate_size or 0)
        grad = walk.back(walk.block(layer), entering[layer], grad, watch)
        if layer in layers:
            facts[layer] = TextFacts(watch.means(), centroids[layer], note[layer])
        on_layer()
    return facts


class _Sums:
    """Adds up |h · ∂L/∂h| of the tokens of each cluster (E, D)."""

    def __init__(self, cluster: Tensor | None, counted: Tensor, clusters: int, width: int) -> None:
        self._cluster, self._counted = cluster, counted
        self._sums, self._tokens = torch.zeros(clusters, width), torch.zeros(clusters)

    def __call__(self, tokens: Tensor, activated: Tensor, grad: Tensor) -> None:
        if self._cluster is None:
            return
        kept = self._counted[tokens]
        cluster = self._cluster[tokens[kept]]
        self._sums.index_add_(0, cluster, (activated * grad).abs()[kept])
        self._tokens += torch.bincount(cluster, minlength=len(self._tokens))

    def means(self) -> Tensor:
        return self._sums / self._tokens.unsqueeze(1)


def _empty(cluster: Tensor, clusters: int) -> list[int]:
    return (torch.bincount(cluster, minlength=clusters) == 0).nonzero()[:, 0].tolist()


def _require_tokens(cluster: Tensor, clusters: int, layer: int) -> None:
    if empty := _empty(cluster, clusters):
        raise UserError(
            f"no token of the text belongs to text cluster {empty[0]} at layer {layer}, so that expert {empty[0]} "
            "could choose no neurons; give more text, or fewer experts"
        )
