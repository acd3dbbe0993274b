"""What tells a choice that rounding made from a fault, on models that have either."""

import pytest
import torch
import transformers

from moebed.checkpoints import load_decoder, write_checkpoint
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from tests.upcycling.same_routing import compared

FAMILIES = {
    "mixtral": {},
    "olmoe": {"qk_norm": "full", "norm_topk_prob": False},
    "qwen2_moe": {"attention_bias": True, "num_shared_experts": 1, "shared_expert_gate": True},
}


@pytest.fixture(params=FAMILIES)
def both(request, tmp_path):
    """Our decoder, transformers' model of the same weights, and ids."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        initializer_range=0.3,
        **FAMILIES[request.param],
    )
    folder = write_checkpoint(Decoder(config), request.param, tmp_path / "moe", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(1))
    return load_decoder(folder), theirs, ids


def test_equal_models_choose_alike(both):
    found = compared(*both)
    assert found["decisions"] == 2 * 48
    assert found["otherwise"] == found["margin"] == 0
    assert found["free"] == found["same_choices"]
    assert found["free"]["worst"] < 1e-5


@torch.no_grad()
def test_a_choice_that_rounding_makes_is_told_from_a_fault(both):
    decoder, theirs, ids = both
    for router in decoder.routers:  # two experts score alike, but for less than a difference that can be seen
        router.weight[1] = router.weight[0]
    for layer in theirs.model.layers:
        layer.mlp.gate.weight[1] = layer.mlp.gate.weight[0] * (1 + 1e-6)
    found = compared(decoder, theirs, ids)
    assert found["otherwise"] > 0
    assert found["free"]["worst"] > 1e-2
    assert found["same_choices"]["worst"] < 1e-5
    assert found["before"] < 1e-5
    assert found["margin"] <= 2 * found["router_logits"] < 2e-5


@torch.no_grad()
def test_a_fault_is_no_choice(both):
    decoder, theirs, ids = both
    theirs.model.layers[1].mlp.experts.down_proj[3] *= 1.1
    found = compared(decoder, theirs, ids)
    assert found["otherwise"] == 0
    assert found["same_choices"]["worst"] > 1e-3
    assert found["before"] > 1e-3


@torch.no_grad()
def test_a_router_that_chooses_by_something_else_is_found(both):
    decoder, theirs, ids = both
    theirs.model.layers[0].mlp.gate.weight.copy_(theirs.model.layers[0].mlp.gate.weight.flip(0))
    found = compared(decoder, theirs, ids)
    assert found["otherwise"] > 0
    assert found["margin"] > 1e-2
    assert found["router_logits"] > 1e-2
