"""moebed's experts inside transformers' models: the same logits and gradients, or a refusal by name."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from moebed.errors import ConfigError
from moebed.model import experts as moebed_experts
from moebed.model import in_transformers, native

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
FIT = {
    "mixtral": {"intermediate_size": 32, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 8, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    "deepseek_v2": MLA | {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v3": MLA
    | {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {"moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 3, "moe_layer_start_index": 1},
    "glm4_moe": {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 16},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
}
native_here = pytest.mark.skipif(native.load() is not None, reason=f"no compiled experts here: {native.load()}")


def make(family: str, **settings: object) -> nn.Module:
    """A tiny model of transformers with every parameter and buffer of floats drawn at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    settings = {key: value for key, value in (COMMON | settings).items() if hasattr(known, key)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name and parameter.is_floating_point():
            parameter.data.normal_(0, 0.05)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data.add_(1)
    return model


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(3, 43).view(2, 20) * 7 % 96
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@native_here
@pytest.mark.parametrize("family", FIT)
def test_logits_and_gradients_are_those_of_transformers(family):
    model = make(family, **FIT[family])
    model.set_experts_implementation("eager")
    want, gradients = logits_and_gradients(model)
    assert in_transformers.use_in(model) == sum(type(m).__name__.endswith("Experts") for m in model.modules()) > 0
    called: list[int] = []
    compute = native.expert_mlp

    def counted(*args):
        called.append(1)
        return compute(*args)

    native.expert_mlp = counted
    try:
        found, ours = logits_and_gradients(model)
    finally:
        native.expert_mlp = compute
    assert called
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-7, msg=name)


@native_here
def test_bf16_weights_are_taken_as_they_are():
    """No further from float32 than transformers' own."""
    model = make("mixtral", **FIT["mixtral"]).to(torch.bfloat16)
    experts = next(module for module in model.modules() if type(module).__name__ == "MixtralExperts")
    x, index = torch.randn(40, 64).bfloat16(), torch.rand(40, 8).topk(2).indices
    weight, errors = torch.rand(40, 2).bfloat16(), {}
    exact = copy.deepcopy(experts).float()(x.float(), index, weight.float())
    for name in ("eager", in_transformers.register()):
        experts.config._experts_implementation = name
        out = experts(x, index, weight)
        assert out.dtype == torch.bfloat16
        errors[name] = (out.float() - exact).abs().mean().item()
    assert 0 < errors["moebed"] < 1.05 * errors["eager"]


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gpt_oss", {"intermediate_size": 32, "num_local_experts": 8, "head_dim": 16}, "GptOssExperts: "),
        ("olmoe", FIT["olmoe"] | {"hidden_act": "relu"}, "OlmoeExperts: activation ReLU is none of silu"),
        ("mixtral", FIT["mixtral"] | {"intermediate_size": 36}, "width 36 must be multiples of"),
        ("llama", {"intermediate_size": 32}, "LlamaForCausalLM has no experts"),
    ],
)
@native_here
def test_what_does_not_fit_is_refused_by_name_and_left_as_it_was(family, settings, reason):
    model = make(family, **settings)
    before = model.config._experts_implementation
    with pytest.raises(ConfigError, match=reason):
        in_transformers.use_in(model)
    assert model.config._experts_implementation == before


@native_here
def test_by_name_what_does_not_fit_is_computed_by_transformers_and_said_once_of_each_class(capsys):
    moebed_experts._said.clear()
    for family, settings in (
        ("gpt_oss", {"intermediate_size": 32, "num_local_experts": 8, "head_dim": 16}),
        ("olmoe", FIT["olmoe"] | {"hidden_act": "relu"}),
        ("gpt_oss", {"intermediate_size": 32, "num_local_experts": 4, "head_dim": 16}),
    ):
        model = make(family, **settings)
        want, _ = logits_and_gradients(model)
        model.set_experts_implementation(in_transformers.register())
        found, _ = logits_and_gradients(model)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    said = capsys.readouterr().err
    assert [said.count(f"{name}Experts: ") for name in ("GptOss", "Olmoe")] == [1, 1]
    assert said.count("transformers' grouped_mm computes them") == 2


@pytest.mark.slow
def test_the_triton_kernels_compute_where_they_run():
    """In the interpreter, in a process of its own: the variable is read when Triton is imported."""
    script = (
        "import torch; from moebed.model import in_transformers; from tests.model.test_in_transformers import *\n"
        "import triton_kernels.mlp as mlp\n"
        "model = make('qwen3_moe', **FIT['qwen3_moe']); want, gradients = logits_and_gradients(model)\n"
        "in_transformers.use_in(model); called, compute = [], mlp.expert_mlp\n"
        "mlp.expert_mlp = lambda *args: (called.append(1), compute(*args))[1]\n"
        "found, ours = logits_and_gradients(model); assert len(called) == 2\n"
        "torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)\n"
        "[torch.testing.assert_close(ours[n], g, rtol=1e-3, atol=2e-7) for n, g in gradients.items()]\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "EXPERT_MLP_KERNELS": "require"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if "cannot interpret" in run.stderr:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr[-2000:]
