"""What the plan counts of a router alone, beside what autograd keeps of it."""

import pytest
import torch

from moebed.model.routers import ROUTERS
from moebed.model.routing import TokenContext
from moebed.plan import activations
from moebed.plan.setup import Setup
from tests.conftest import tiny_config


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("name", ["softmax_topk", "sparsemixer", "document_pool"])
def test_what_a_router_keeps_is_known_to_the_byte(name, renormalised):
    """Beside its input, and the sum over a token's logits that the z-loss keeps, 4 bytes."""
    chosen = {"router": name, "norm_topk_prob": renormalised, "num_experts": 12, "num_experts_per_tok": 3}
    config = tiny_config(hidden_size=256, **chosen)
    setup = Setup(config, 2, 24)
    rule, kept = ROUTERS[name](config, config.layer(0)), {}
    hidden = torch.randn(48, 256, requires_grad=True)
    rule.begin_step(0)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing = rule(hidden, None, TokenContext(torch.zeros(48), document=torch.arange(48) // 12))
    for tensor in routing[:4]:
        pack(tensor)
    for tensor in (hidden, rule.weight):
        kept.pop(tensor.data_ptr(), None)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found == activations.router(setup, 0) - activations._pre_norm(setup) - 48 * (4 * 256 + 4)
