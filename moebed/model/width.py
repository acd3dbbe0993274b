"""muP: what initial weights and learning rates are multiplied with, so that settings of one width suit another.

By role of a parameter (2601.20205, table 1, for Adam; of attention, embedding and head as in 2203.03466). From widths
n₀ and m₀ at which settings were chosen to the model's: n hidden, m of an expert or a dense FFN.

| role | initial weights | learning rate |
|---|---|---|
| query, key, value, output; gate and up | (n₀/n)^½ | n₀/n |
| down | (n/n₀)^½ · m₀/m | m₀/m |
| gate embeddings, and what else a router learns | (n₀/n)^½ | n₀/n |
| head | n₀/n | n₀/n |
| embedding, norms, biases, all else | 1 | 1 |

The paper begins gate embeddings at n₀/n and says that the power has no effect; with ½ the first routing is as decided
at any width. Transfers over width, number of experts and their width at one K/E, and not over K/E; nor over depth,
since the residual is not scaled by it here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from moebed.model.config import ModelConfig


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias, or a stack of one for each expert, whatever its dimensions."""
    return name.endswith("bias")


class Factors(NamedTuple):
    """Of one parameter."""

    initial: float = 1.0
    rate: float = 1.0


def width_factors(decoder: Any, config: ModelConfig) -> dict[str, Factors]:
    """Factors of a decoder's parameters by name, but for those of which they are 1; none without a base."""
    if config.base_hidden_size is None:
        return {}
    narrower = config.base_hidden_size / config.hidden_size
    hidden, into_few = Factors(narrower**0.5, narrower), Factors(narrower, narrower)
    of_parameter = {id(decoder.lm_head.weight): into_few}
    if config.tie_word_embeddings:
        of_parameter = {}  # the embedding decides
    for index, block in enumerate(decoder.blocks):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                # A matrix that leads to one number, as a shared expert's gate, is of the head's kind.
                of_parameter[id(module.weight)] = hidden if module.out_features > 1 else into_few
        if not config.layer(index).num_experts:
            continue
        width = config.layer(index).moe_intermediate_size
        slimmer = narrower if config.base_moe_intermediate_size is None else config.base_moe_intermediate_size / width
        for name, parameter in block.mlp.experts.named_parameters():
            down = Factors(narrower**-0.5 * slimmer, slimmer)
            if not is_bias(name):
                of_parameter[id(parameter)] = down if name == "down_proj" else hidden
        of_parameter |= {id(parameter): hidden for parameter in block.mlp.router.parameters()}
    named = decoder.named_parameters()
    return {name: of_parameter[id(p)] for name, p in named if p.ndim > 1 and id(p) in of_parameter}
