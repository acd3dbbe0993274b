"""The plan's formulas against the tensors themselves: shapes, what autograd saves, what is alive at the peak."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moebed.model import native
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.flops import count_parameters, flops_per_token, layer_shapes
from moebed.parallel.config import ParallelConfig
from moebed.plan import activations, memory, traffic
from moebed.plan.plan import make_plan
from moebed.plan.setup import PRECISIONS, Setup
from moebed.training.module import MoEModule
from moebed.training.optim import OptimizerConfig, build_optimizer

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "moe_intermediate_size": 128,
    "experts_backend": "grouped_mm",  # of which the formulas are; native keeps less
}
KINDS = {
    "mixtral": {"num_key_value_heads": 2},
    "dense": {"num_experts": 0, "intermediate_size": 512},
    "deepseek": {
        "num_experts": [0, 8],
        "intermediate_size": 300,
        "num_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
    },
    "qwen": {"num_shared_experts": 1, "shared_expert_gate": True, "attention_bias": True},
    "olmoe": {"qk_norm": "full", "num_key_value_heads": 2, "attention_backend": "sdpa"},
    "latent": {"kv_lora_rank": 96, "qk_nope_head_dim": 40, "qk_rope_head_dim": 24, "v_head_dim": 56,
               "q_lora_rank": 80, "router": "group_limited_topk", "router_options": {"n_group": 4, "topk_group": 2}},
    "noisy": {"router": "noisy_topk", "num_experts": 16, "num_experts_per_tok": 3},
    "every expert": {"router": "noisy_topk", "num_experts_per_tok": 8, "router_options": {"gate_layers": 1}},
    "grok": {
        "post_norms": True,
        "attn_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    },
    "gpt_oss": {"attention_bias": True, "attention_output_bias": True, "attention_sinks": True, "experts_bias": True,
                "hidden_act": "clamped_swiglu", "sliding_window": [32, None], "num_key_value_heads": 2,
                "router_options": {"router_bias": True}},
    "post norms alone": {"pre_norms": False, "post_norms": True},
    "layer norms": {"norm_type": "layer", "post_norms": True, "lm_head_bias": True},
    "phimoe": {"norm_type": "layer", "attention_bias": True, "router": "sparsemixer", "num_experts": 16},
    "hyper": {"hyper_experts": {"adapter_size": 16, "generator_size": 32}},
    "constant": {"hyper_experts": {"adapters": "constant", "adapter_size": 16, "generator_size": 32}},
    # Twelve experts: with eight, rows and weights are of one size, and cannot be told apart.
    "free": {
        "hyper_experts": {"adapters": "free"},
        "num_experts": 12,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
}  # fmt: skip


def config_of(kind: str, **changes) -> ModelConfig:
    return ModelConfig(**{**SIZES, **KINDS[kind], **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [(1, 1, False), (2, 1, True), (2, 4, False), (4, 4, True), (8, 1, True)])
def test_parameters_of_a_rank_are_those_of_the_model(kind, layout):
    """Exactly, uneven shards included: each parameter is cut as torch.chunk cuts it, and rank 0 holds the most."""
    config = config_of(kind, hidden_size=264, num_attention_heads=4)
    with torch.device("meta"):
        decoder = Decoder(config)
    data, expert, shard = layout
    expected = 0
    for name, parameter in decoder.named_parameters():
        routed = ".experts." in name
        part = parameter.chunk(expert)[0] if routed else parameter
        ranks = data if routed else data * expert
        expected += (part.chunk(ranks, dim=int(routed))[0] if shard else part).numel()
    setup = Setup(config, 1, 16, layout=ParallelConfig(*layout))
    plan = make_plan(setup)
    assert plan.rank_parameters == expected
    assert plan.total_parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert plan.total_parameters == count_parameters(config)[0]


@pytest.mark.parametrize("kind", ["mixtral", "dense", "grok"])
def test_muon_keeps_one_moment_of_what_it_trains(kind):
    """The state that a step leaves behind."""
    config = config_of(kind)
    decoder = Decoder(config)
    optimizer = build_optimizer(decoder, OptimizerConfig(name="muon"))
    decoder(torch.arange(8).view(1, 8)).logits.square().mean().backward()
    optimizer.step()
    kept = {"momentum": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for state in optimizer.state.values():
        for name in kept.keys() & state.keys():
            kept[name] += 4 * state[name].numel()
    parts = memory.state(Setup(config, 1, 8, optimizer="muon"))
    assert parts["Muon's momentum"] == kept["momentum"]
    assert parts["Adam's moments"] == kept["exp_avg"] + kept["exp_avg_sq"]
    assert parts["Adam's moments"] < memory.state(Setup(config, 1, 8))["Adam's moments"]


def saved_bytes(config: ModelConfig, setup: Setup, precision: str, casts: bool) -> int:
    """Bytes of the storages that autograd saves in a forward pass, parameters left out."""
    module = MoEModule(config, activation_checkpointing=setup.checkpointing)
    if precision == "bf16-true":
        module = module.bfloat16()
    parameters = list(module.parameters())
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    weights = {parameter.numel() for parameter in parameters}
    kept = []  # so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)
        return tensor

    shape = setup.batch_size, setup.sequence_length
    ids = torch.randint(0, config.vocab_size, shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            terms = module.losses.terms(ids, ids)
    is_cast = [t.dtype == torch.bfloat16 and t.untyped_storage().nbytes() // 2 in weights for t in kept]
    total = sum(tensor.untyped_storage().nbytes() for tensor, cast in zip(kept, is_cast, strict=True) if cast == casts)
    del terms
    return total


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param(kind, precision, marks=() if number % 3 != at or kind == "mixtral" else pytest.mark.slow)
        for number, kind in enumerate(KINDS)
        for at, precision in enumerate(PRECISIONS)
    ],
)
def test_activations_are_what_autograd_saves(kind, precision):
    """Within 2 %: rotary tables and other tensors without T are left out."""
    config = config_of(kind)
    setup = Setup(config, 3, 160, PRECISIONS[precision], device="cpu")
    kept = [activations.block(setup, index) for index in range(2)]
    expected = sum(sum(parts.values()) for parts in kept) + activations.logits(setup)
    assert expected == pytest.approx(saved_bytes(config, setup, precision, casts=False), rel=0.02)


@pytest.mark.parametrize(
    ("router", "precision", "shared"),
    [
        pytest.param(router, precision, shared, marks=() if (number + at) % 2 == shared else pytest.mark.slow)
        for number, router in enumerate(["grap", "locmoe_plus", "hash", "balanced"])
        for at, precision in enumerate(PRECISIONS)
        for shared in (0, 1)
    ],
)
def test_routers_without_a_product_keep_no_input(router, precision, shared):
    config = config_of("mixtral", router=router, num_shared_experts=shared)
    setup = Setup(config, 3, 160, PRECISIONS[precision], device="cpu")
    kept = [activations.block(setup, index) for index in range(2)]
    expected = sum(sum(parts.values()) for parts in kept) + activations.logits(setup)
    assert expected == pytest.approx(saved_bytes(config, setup, precision, casts=False), rel=0.02)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek", "grok"])
def test_cast_weights_are_counted(kind):
    config = config_of(kind)
    setup = Setup(config, 3, 160, PRECISIONS["bf16-mixed"], device="cpu")
    parts = next(m for m in memory.moments(setup) if m.name == "end of the forward pass").parts
    assert parts["weights cast by autocast"] == saved_bytes(config, setup, "bf16-mixed", casts=True)


def test_cast_weights_of_a_generator_are_counted():
    """With the biases, which are cast but not kept, and the first of its maps, which is computed in float32."""
    config = config_of("hyper")
    setup = Setup(config, 3, 160, PRECISIONS["bf16-mixed"], device="cpu")
    parts = next(m for m in memory.moments(setup) if m.name == "end of the forward pass").parts
    trunk, biases = 32 * (32 + 10) + 32, 2 * 16 * 256 + 16 + 256
    kept = saved_bytes(config, setup, "bf16-mixed", casts=True)
    assert parts["weights cast by autocast"] == kept + 2 * (trunk + biases)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class Live(TorchDispatchMode):
    """Bytes of all storages that operators make while it is on: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def _track(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:  # slow where a processor has no instruction for them
            out = func(*(arg.float() for arg in args), **(kwargs or {})).bfloat16()
        else:
            out = func(*args, **(kwargs or {}))
        pytree.tree_map_only(torch.Tensor, self._track, out)
        self.most = max(self.most, self.now)
        return out


def live_peak(config: ModelConfig, setup: Setup) -> int:
    """Most bytes alive in the second of two steps, taken as the trainer takes them."""
    with Live() as live:
        module = MoEModule(config, activation_checkpointing=setup.checkpointing)
        optimizer = build_optimizer(module.decoder, OptimizerConfig())
        ids = torch.randint(0, config.vocab_size, (setup.batch_size, setup.sequence_length))
        for _ in range(2):
            live.most = 0
            for micro in range(setup.accumulate):
                with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision.autocast):
                    if setup.looks_ahead and micro == 0:
                        module.losses.look_ahead([(ids, ids, {})] * setup.accumulate, module.router_steps)
                    terms = module.losses.terms(ids, ids)
                    balance = torch.stack([probs.square().sum() for probs in terms.mean_probs] or [torch.zeros(())])
                    loss = terms.nats.mean() + balance.sum()
                if micro == 0:
                    optimizer.zero_grad(set_to_none=True)
                loss.backward()
                del terms, loss, balance
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    return live.most


STEPS = [
    ("32-true", False, 1, 3, 64),
    ("32-true", True, 1, 2, 256),
    ("bf16-mixed", False, 2, 2, 256),
    ("bf16-mixed", True, 1, 3, 128),
]


@pytest.mark.parametrize(
    ("kind", "precision", "checkpointing", "accumulate", "layers", "sequence"),
    [
        pytest.param(kind, *step, marks=() if at % 2 == number % 2 else pytest.mark.slow)
        for number, kind in enumerate(["mixtral", "dense", "deepseek", "grok", "hyper", "free"])
        for at, step in enumerate(STEPS)
    ],
)
def test_peak_is_what_is_alive(kind, precision, checkpointing, accumulate, layers, sequence):
    """Within 5 %, where parameters weigh most and where activations do."""
    experts = [0] + [8] * (layers - 1) if kind == "deepseek" else KINDS[kind].get("num_experts", 8)
    config = config_of(kind, num_hidden_layers=layers, num_experts=experts)
    setup = Setup(
        config,
        2,
        sequence,
        PRECISIONS[precision],
        accumulate=accumulate,
        checkpointing=checkpointing,
        device="cpu",
    )
    found, live = memory.peak(setup), live_peak(config, setup)
    assert found.total == pytest.approx(live, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_that_looks_ahead_takes_a_forward_pass_more_and_no_more_memory(checkpointing):
    config = config_of("mixtral", router_aux_loss_scope="window")
    setup = Setup(config, 2, 256, PRECISIONS["bf16-mixed"], accumulate=3, checkpointing=checkpointing, device="cpu")
    assert memory.peak(setup).total == pytest.approx(live_peak(config, setup), rel=0.05)
    plan = make_plan(setup)
    for change in ({"accumulate": 1}, {"config": config_of("mixtral", router_aux_loss_scope="global")}):
        plain = make_plan(Setup(**{**vars(setup), **change}))
        more = plan.training_flops_per_token - plain.training_flops_per_token
        assert more == plan.forward_flops_per_token == flops_per_token(config, 256)
        assert plan.peak_memory_total == plain.peak_memory_total or "accumulate" in change


def test_traffic_by_hand():
    """Four ranks, two columns, T 8, E 8, K 2, H 4 in bf16.

    A token has both of its experts on one rank in 12 of 28 cases, so that it makes 2 (1 - 6 / 28) trips; 8 bytes and
    two weights and indices of 4 go out, 8 bytes come back.
    """
    config = ModelConfig(
        vocab_size=8, hidden_size=4, num_attention_heads=1, num_hidden_layers=1, moe_intermediate_size=2
    )
    setup = Setup(config, 2, 4, PRECISIONS["bf16-mixed"], ParallelConfig(2, 2, True, "bfloat16"), accumulate=3)
    trips = 8 * 2 * (1 - 6 / 28)
    sent = trips * ((8 + 8 + 8) + 8 + (8 + 8 + 8))
    assert traffic.exchange_bytes(setup, 0) == pytest.approx(3 * sent / 2)
    again = Setup(**{**vars(setup), "checkpointing": True})
    assert traffic.exchange_bytes(again, 0) == pytest.approx(3 * (sent + trips * 24) / 2)  # what goes out
    normed = replace(again, config=replace(config, post_norms=True))
    assert traffic.exchange_bytes(normed, 0) == pytest.approx(3 * (sent + trips * 32) / 2)
    window = replace(config, router_aux_loss_scope="window")
    ahead = replace(setup, config=window)
    assert traffic.exchange_bytes(ahead, 0) == pytest.approx(3 * (sent + trips * 32) / 2)
    gathered = replace(setup, layout=replace(setup.layout, exchange="all_gather"))
    assert traffic.exchange_bytes(gathered, 0) == 3 * 8 * ((8 + 8 + 8) + 8 + (8 + 8 + 8))  # each of T to the other
    again = replace(gathered, checkpointing=True)
    assert traffic.exchange_bytes(again, 0) == traffic.exchange_bytes(gathered, 0) + 3 * 8 * 24
    ahead = replace(gathered, config=window)
    assert traffic.exchange_bytes(ahead, 0) == traffic.exchange_bytes(gathered, 0) + 3 * 8 * 32
    assert gathered.expert_rows(0) == gathered.expert_rows(0, 1.0) == 2 * setup.expert_rows(0)
    assert replace(gathered, layout=ParallelConfig(1, 8, exchange="all_gather")).expert_rows(0) == 8 * 8  # of one each
    routed, rest = 8 * 3 * 4 * 2 // 2, 2 * 32 + 4 + 4 * 16 + 8 + 32
    gathers = 3 * (routed * 1 / 2 + rest * 3 / 4)
    assert traffic.fsdp_bytes(setup) == (2 * 2 * gathers, 4 * gathers)
    assert traffic.fsdp_bytes(ahead) == (3 * 2 * gathers, 4 * gathers)
    assert traffic.all_reduce_bytes(setup) == 0
    replicated = Setup(**{**vars(setup), "layout": ParallelConfig(2, 2, False)})
    assert traffic.fsdp_bytes(replicated) == (0, 0)
    assert traffic.all_reduce_bytes(replicated) == 2 * 4 * (routed / 2 + rest * 3 / 4)
    ddp = Setup(**{**vars(setup), "layout": ParallelConfig(4, 1, False)})
    assert traffic.all_reduce_bytes(ddp) == 2 * 4 * (2 * routed + rest) * 3 / 4
    assert traffic.probe_gather_bytes(ddp, layer_shapes(config, 0)) == 0
    layer = 4 * 16 + 8 + 32
    own = routed // 2 + layer // 4
    assert traffic.probe_gather_bytes(setup, layer_shapes(config, 0)) == 4 * (2 * routed + layer - own)


def test_memory_of_a_rank_by_hand():
    """Four ranks, two columns, T 8, K 2, H 4 in bf16; layers of 0, 4 and 8 experts, of which half are here."""
    sizes = {"vocab_size": 8, "hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 3}
    config = ModelConfig(**sizes, moe_intermediate_size=2, intermediate_size=6, num_experts=[0, 4, 8])
    setup = Setup(config, 2, 4, PRECISIONS["bf16-mixed"], ParallelConfig(2, 2, True, "bfloat16"))
    attention, outer = 4 * 16 + 2 * 4, 2 * 32 + 4
    blocks = attention + 3 * 24, attention + 16 + 3 * 8 * 2, attention + 32 + 3 * 8 * 4
    parts = memory.state(setup)
    assert parts["gathered: embedding, head"] == 2 * outer
    assert parts["gathered: two blocks"] == 2 * (blocks[0] + blocks[2])  # the largest
    moments = {moment.name: moment.parts for moment in memory.moments(setup)}
    for index, elements in enumerate(blocks):
        assert moments[f"backward pass of layer {index}"]["unsharded gradients of a block"] == (4 + 2) * elements
    trips = 8 * 2 * (1 - 6 / 28)
    assert memory.exchange_buffers(setup, 2) == round(trips * (3 * 8 + 16))  # rows sent, received, and results
    routing = 8 * (8 * 8 + 4 + 12 * 2)
    assert activations.block_outputs(setup, 2) == routing + round(8 * trips)  # and where those that come back belong
    gathered = replace(setup, layout=replace(setup.layout, exchange="all_gather"))
    assert memory.exchange_buffers(gathered, 2) == 16 * (2 * 8 + 16) + 8 * 2 * 8  # T alone are sent and come back
    assert activations.block_outputs(gathered, 2) == routing
    replicated = replace(setup, layout=ParallelConfig(2, 2, False))
    assert "DDP buckets" not in memory.state(replicated)  # FSDP2 replicates what is spread
    whole = memory.state(replace(setup, layout=ParallelConfig(4, 1, False)))
    assert whole["DDP buckets"] == whole["parameters"] == 4 * (outer + sum(blocks) + 3 * 8 * (2 + 4))
    stream, rows = 4 * 8 * 4, 8 * 2
    for width, working in ((2, 2 + 4), (10, 10 + 10)):  # gradients of what the down projection gives and takes
        wide = replace(replicated, config=replace(config, moe_intermediate_size=width))
        parts = memory._ffn_backward(wide, 2, 0.0)
        assert parts["gradients of activations"] == 2 * rows * working + stream
        assert parts["gradients"] == 4 * 8 * 4 * width / 2  # of the down projections of half the experts
    plain = replace(replicated, config=replace(config, attention_backend="math"))
    assert memory._attention_backward(plain)["gradients of activations"] == 2 * 2 * 8 * 4 + stream
    for accumulate, gradients in ((1, 0), (2, memory.state(replicated)["parameters"])):
        moments = memory.moments(replace(replicated, accumulate=accumulate))
        (loss,) = (moment for moment in moments if moment.name == "backward pass of the loss")
        assert loss.parts.get("gradients", 0) == gradients


def test_tokens_of_experts():
    config = config_of("deepseek", num_experts=[0, 8])
    setup = Setup(config, 2, 10, layout=ParallelConfig(3, 2, False), accumulate=5, max_steps=7)
    plan = make_plan(setup)
    assert plan.tokens_per_step == 2 * 10 * 6 * 5
    assert plan.tokens == 7 * plan.tokens_per_step
    assert plan.expert_tokens_per_step == [0, plan.tokens_per_step * 3 / 8]
    assert plan.busiest_expert_tokens_per_step[1] == 2 * plan.expert_tokens_per_step[1]
    assert plan.expert_rows == [0, 2 * 10 * 2 * 3 / 8]  # an expert is in each of the 3 rows, and serves its 2 columns
    assert setup.expert_rows(1) == 2 * 10 * 3
    assert setup.expert_rows(1, max_violation=1.0) == setup.expert_rows(1, max_violation=9.0) == 2 * 10 * 3 * 2


def test_sharding_and_checkpointing_save_memory():
    config = config_of("mixtral", num_hidden_layers=8)
    replicated = Setup(config, 1, 64, PRECISIONS["bf16-mixed"], ParallelConfig(8, 1, False))
    totals = [
        memory.peak(Setup(**{**vars(replicated), "layout": ParallelConfig(*layout)})).total
        for layout in [(8, 1, False), (1, 8, False), (8, 1, True), (1, 8, True)]
    ]
    assert totals[0] > totals[1] > max(totals[2:])
    plan = make_plan(replicated)
    assert sum(plan.peak_memory.values()) == plan.peak_memory_total
    assert sum(plan.activations_checkpointed.values()) < sum(plan.activations.values()) / 3
    assert plan.training_flops_per_token == 3 * flops_per_token(config, 64)
    assert math.isclose(plan.all_reduce_bytes, 2 * 7 / 8 * 4 * plan.total_parameters)


def test_the_plan_of_a_gpu_compiles_nothing_for_a_cpu(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(native, "instruction_set", lambda: "amx")
    config = ModelConfig(**{**SIZES, "experts_backend": "auto"})
    assert make_plan(Setup(config, 2, 64, PRECISIONS["bf16-mixed"], device="gpu")).peak_memory_total > 0
