"""Layouts of a decoder over two ranks: values, gradients and initial weights are those of one process."""

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import fill, load_decoder, write_checkpoint
from moebed.data.loader import documents_of_tokens
from moebed.model import hyper_experts
from moebed.model.decoder import Decoder
from moebed.model.locality import locality_loss
from moebed.model.losses import load_balancing_loss, router_stats, sequence_balancing_loss
from moebed.model.routers import ROUTERS, RouterSteps, build_router
from moebed.model.spread import whole
from moebed.parallel.config import ParallelConfig
from moebed.parallel.gathered import GatheredModel
from moebed.parallel.sharding import Layout, reshard
from moebed.training.batch_sums import BatchSums
from moebed.training.optim import OptimizerConfig, build_optimizer, gradient_norm, scale_gradients
from moebed.training.same_config import require_start
from moebed.views.layer import Need, ProbeText
from moebed.views.live import walk, walk_model
from tests.conftest import tiny_config
from tests.parallel import forked
from tests.parallel.forked import StandingRanks

SIZES = {"adapter_size": 8, "expert_embedding_size": 6, "layer_embedding_size": 4, "generator_size": 10}
ONE = {"num_experts_per_tok": 1, "norm_topk_prob": False}
HYPER = {
    "unchosen": {"hyper_experts": SIZES},
    "some at a time": {"hyper_experts": dict(SIZES)},
    "constant": {"hyper_experts": {**SIZES, "adapters": "constant"}},
    "free": {"hyper_experts": {**SIZES, "adapters": "free"}, **ONE},
    # The other such control is the same but for its width.
    "shared_equal_flops": {"hyper_experts": {**SIZES, "adapters": "shared_equal_flops"}},
}
# Where the two ranks are told apart: experts on either, and what routers draw.
APART = {
    "output_orthogonality_loss_coef": 1.0,
    "probability_variance_loss_coef": 1.0,
    "router_orthogonality_loss_coef": 1.0,
    "router_coupling_loss_coef": 1.0,
    "router_coupling_gradient": True,
}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
MUP = {"base_hidden_size": 8, "base_moe_intermediate_size": 16}
# What each router does over two ranks is seen where experts are spread, quickly; the rest of a product of routers and
# layouts is slow: these alone are also seen where parameters are.
SHARDED = ("softmax_topk", "competesmoe", "autonomy", "sigmoid_topk", "document_pool")
RANKS = {"expert_ranks": 2, "router_options": {"d_low": 8, "competition_rate": 1.0, "jitter": 0.1, "num_domains": 2}}


def _slow_unless(quick: bool, *case: Any) -> Any:
    return case if quick else pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Call work(rank, world_size, *arguments) on two ranks, which are the same in all tests of this file."""
    ranks = StandingRanks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks.call
    ranks.close()


def _steps(decoder: Decoder, ids: torch.Tensor, rank: int, world_size: int, optimizer: str = "adamw") -> list[float]:
    """Two optimizer steps with clipping on this rank's share of the sequences: loss and norm of each, then weights.

    Routers adapt after each, to what all ranks counted.
    """
    optimizer = build_optimizer(decoder, OptimizerConfig(name=optimizer, learning_rate=0.05))
    routers, found = RouterSteps(decoder.routers), []
    for step in range(2):
        share = ids.chunk(world_size)[rank]
        routers.begin(step, rank, world_size)
        domain = (share[:, :1] + torch.arange(share.shape[1]) // 5) % 2
        document = documents_of_tokens(share % 8, 0)  # of about eight tokens each
        logits, routings = decoder(share, domain=domain, document=document)
        mask = torch.ones(share.numel(), dtype=torch.bool)
        loss = logits.float().logsumexp(-1).mean()
        for routing in routings:
            loss = loss + routing.router_probs.square().mean()
            if decoder.config.router_aux_loss_scope == "sequence":
                loss = loss + sequence_balancing_loss(routing, mask, len(share))
            loss = loss + sum(asked.mean() for asked in (routing.losses or {}).values())
            coefficient = decoder.config.locality_loss_coef
            loss = loss + coefficient * locality_loss(routing.router_probs, mask, decoder.placement, 0.1)
        layers = [router_stats(routing, mask) for routing in routings]
        asked = zip(decoder.routers, routings, strict=True)
        statistics = [router.statistics(routing, mask) for router, routing in asked]
        routers.add([layer.counts for layer in layers], mask.sum(), statistics)
        sums = [layer.sums for layer in layers]
        if world_size > 1 and any(sums):
            sums = BatchSums().of_all(sums)
        for router, layer in zip(decoder.routers, sums, strict=True):
            loss = loss + sum(router.batch_losses(layer).values())
        if decoder.config.router_aux_loss_scope == "global":
            counts = [{"counts": layer.counts} for layer in layers]
            counts = BatchSums().of_all(counts) if world_size > 1 else counts
            for layer, count in zip(layers, counts, strict=True):
                loss = loss + load_balancing_loss(layer.mean_probs, count["counts"])
        loss.backward()
        with mock.patch("torch.distributed.is_initialized", return_value=world_size > 1):
            routers.end()
        norm = gradient_norm(decoder.parameters())
        scale_gradients(decoder.parameters(), (0.5 / norm).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(mean)
        found += [float(mean) / world_size, float(norm)]
    return found


def _hyper(rank: int, world_size: int, options: dict, changes: dict, set_bytes: int) -> None:
    with mock.patch.object(hyper_experts, "SET_BYTES", set_bytes):
        _work(rank, world_size, options, changes, True)


def _work(rank: int, world_size: int, options: dict, changes: dict, meta: bool, optimizer: str = "adamw") -> None:
    config = tiny_config(num_shared_experts=1, **changes)
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    alone = Decoder(config)
    expected = _steps(alone, ids, 0, 1, optimizer)
    torch.manual_seed(5)
    with torch.device("meta" if meta else "cpu"):
        spread = Decoder(config)
    parallel = ParallelConfig(**options)
    parallel.check(world_size, config)
    Layout(parallel, world_size, "cpu").apply(spread, torch.device("cpu"))
    spread.stand_for(rank, world_size)
    found = _steps(spread, ids, rank, world_size, optimizer)
    assert found == pytest.approx(expected, rel=1e-5)
    reshard(spread)
    wanted = dict(alone.named_parameters())
    for name, parameter in spread.named_parameters():
        # In norm: where a gradient is nearly 0, Adam's step has the size of the others whatever its sign.
        difference = torch.dist(whole(parameter.detach()), wanted[name].detach())
        assert difference < 1e-4 * wanted[name].norm(), (name, float(difference / wanted[name].norm()))
    state = dict(alone.named_buffers())
    for name, buffer in spread.named_buffers():
        torch.testing.assert_close(buffer, state[name], rtol=1e-4, atol=1e-5, msg=name)
    if any(router.adaptive for router in alone.routers):
        fresh = Decoder(config).named_buffers()
        assert any(not torch.equal(state[name], buffer) for name, buffer in fresh)


@pytest.mark.parametrize(
    ("options", "changes", "meta"),
    [
        ({}, {}, True),
        ({"shard": False}, {}, False),
        ({"expert": 2}, {}, True),
        ({"expert": 2, "shard": False}, {"num_experts": [4, 2], "num_experts_per_tok": 1}, False),
        ({"expert": 2}, {"experts_backend": "loop", "tie_word_embeddings": True}, True),
        ({}, MUP, True),
        ({"expert": 2}, {**MUP, "num_experts": [0, 4], "intermediate_size": 48}, True),
        ({"expert": 2}, {"num_experts": [0, 2], "num_experts_per_tok": [0, 2], "intermediate_size": 48}, True),
        ({}, {**LATENT, "num_key_value_heads": 4}, True),
        ({"expert": 2, "shard": False}, {**LATENT, "num_key_value_heads": 4}, False),
        ({"expert": 2, "exchange": "all_gather"}, {**APART, "router_orthogonality": "simbal"}, True),
        (
            {"expert": 2, "shard": False, "exchange": "all_gather"},
            {**RANKS, "router": "locmoe_plus", "router_aux_loss_scope": "sequence"},
            False,
        ),
        ({}, {"weight_diversity_loss_coef": 1.0, "output_diversity_loss_coef": 1.0}, True),
        ({"expert": 2}, {"weight_diversity_loss_coef": 1.0, "output_diversity_loss_coef": 1.0}, True),
        *(
            ({**layout, "shard": shard}, {**APART, "router_orthogonality": kind}, shard)
            for layout in ({}, {"expert": 2})
            for shard, kind in ((True, "simbal"), (False, "ernie"))
        ),
        *(
            ({**layout, "shard": shard}, {"router_aux_loss_scope": scope}, shard)
            for layout in ({}, {"expert": 2})
            for shard, scope in ((True, "sequence"), (False, "sequence"), (bool(layout), "global"))
        ),
        *(
            _slow_unless(
                bool(layout) or router in SHARDED,
                layout,
                {**RANKS, "router": router, "locality_loss_coef": local},
                True,
            )
            for layout in ({}, {"expert": 2})
            for router, local in (*((name, 0.0) for name in ROUTERS), ("softmax_topk", 1.0), ("grap", 1.0))
        ),
        *(
            _slow_unless(name in SHARDED, {"shard": False}, {**RANKS, "router": name}, False)
            for name, router in ROUTERS.items()
            if router.needs_context or router.adaptive
        ),
    ],
)
def test_two_ranks_train_as_one(options, changes, meta, call):
    call(_work, options, changes, meta)


@pytest.mark.parametrize("expert", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_four_ranks_that_gather_tokens_train_as_one(expert):
    """Of each token's three experts a rank has two at most; routers adapt to what all ranks counted."""
    layout = {"expert": expert, "exchange": "all_gather"}
    changes = {"router": "sigmoid_topk", "router_options": {"bias_update_rate": 0.01}}
    forked.call(_work, 4, layout, {"num_experts": 8, "num_experts_per_tok": 3, **changes}, True, "muon")


@pytest.mark.parametrize("options", [{}, {"shard": False}, {"expert": 2}, {"expert": 2, "shard": False}])
@pytest.mark.parametrize(
    "changes", [{}, {"router": "autonomy", "router_options": {"d_low": 8}}], ids=["gate", "stacks"]
)
def test_two_ranks_train_with_muon_as_one(options, changes, call):
    """Whole matrices are made orthogonal, whichever part of them a rank has."""
    call(_work, options, changes, options.get("shard", True), "muon")


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        _slow_unless(options == {"expert": 2} or kind == "unchosen", options, changes)
        for options in ({}, {"shard": False}, {"expert": 2}, {"expert": 2, "shard": False})
        for kind, changes in HYPER.items()
    ],
)
def test_two_ranks_train_hyper_experts_as_one(options, changes, call):
    """The root shares the generator out; all layers, and all ranks, add to its gradient."""
    two_of_six = 2 * 4 * (2 * 8 * 32 + 8 + 32)
    call(_hyper, options, changes, two_of_six if changes is HYPER["some at a time"] else hyper_experts.SET_BYTES)


def _in_time(rank: int, world_size: int, minutes: float) -> None:
    layout = Layout(ParallelConfig(data=2, expert=2, timeout_minutes=minutes), world_size, "cpu")
    groups = [
        *layout.mesh.get_all_groups(),
        *layout.for_all_else.get_all_groups(),
        *layout.for_experts.get_all_groups(),
    ]
    waited = {group.size(): group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert waited == {1: timedelta(minutes=minutes), 2: timedelta(minutes=minutes), 4: timedelta(seconds=60)}


def test_ranks_that_share_experts_wait_as_long_as_all_do():
    """Lightning says it of all ranks alone, as forked.call does."""
    forked.call(_in_time, 4, 7.0)


def _counted(rank: int, world_size: int) -> None:
    """Three steps of routers alone, on logits that are given and split over ranks."""
    logits = torch.randn(3, 48, 4, generator=torch.Generator().manual_seed(1))
    for name in ("sigmoid_topk", "quantile", "threshold", "expert_choice"):
        config, found = tiny_config(router=name), []
        for ranks, at in ((1, 0), (world_size, rank)):
            router = build_router(config, config.layer(0)).train()
            begun = {key: value.clone() for key, value in router.state_dict().items()}
            steps = RouterSteps([router])
            for number, step in enumerate(logits):
                steps.begin(number, at, ranks)
                routing = router.choose(step.chunk(ranks)[at])
                mask = torch.arange(len(routing.router_logits)) > 1  # the first two of each rank are padding
                mask[48 // world_size : 48 // world_size + 2] = False
                counts = router_stats(routing, mask).counts
                steps.add([counts], mask.sum(), [router.statistics(routing, mask)])
                with mock.patch("torch.distributed.is_initialized", return_value=ranks > 1):
                    steps.end()
            found.append({key: value for key, value in router.state_dict().items() if key != "weight"})
            assert all(not torch.equal(value, begun[key]) for key, value in found[-1].items())
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(value, found[1][key]) for key, value in found[0].items()), name


def test_what_routers_learn_of_a_step_is_the_same_to_the_last_bit(call):
    """Counts of float32 add up exactly, of however many ranks; the quantiles that follow from them are the same."""
    call(_counted)


def _uneven(rank: int, world_size: int) -> None:
    """All tokens of all ranks go to experts of one rank; the other's have a gradient of zeros."""
    config = tiny_config(num_experts_per_tok=1)
    torch.manual_seed(5)
    decoder = Decoder(config)
    with torch.no_grad():
        for block in decoder.blocks:
            block.mlp.router.weight.zero_()  # of equal experts it is always the same one that is chosen
    Layout(ParallelConfig(expert=2), world_size, "cpu").apply(decoder, torch.device("cpu"))
    decoder(torch.arange(20).view(1, 20)).logits.square().mean().backward()
    for block in decoder.blocks:
        grad = block.mlp.experts.down_proj.grad
        assert grad is not None
        norms = whole(grad).flatten(1).norm(dim=1)
        assert int((norms > 0).sum()) == 1


def _narrow(rank: int, world_size: int) -> None:
    """Where experts are gathered in bfloat16, routers are laid out by themselves, in float32."""
    config = tiny_config(router_orthogonality_loss_coef=1.0, router_orthogonality="simbal")
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    models = []
    for spread in (False, True):
        torch.manual_seed(5)
        decoder = Decoder(config)
        with torch.no_grad():
            for router in decoder.routers:
                router.weight.add_(0.1)
        if spread:
            Layout(ParallelConfig(gather_dtype="bfloat16"), world_size, "cpu").apply(decoder, torch.device("cpu"))
        losses = [routing.losses["router_orthogonality"].mean() for routing in decoder(ids).routings]
        sum(losses).backward()
        gradients = [whole(router.weight.grad) for router in decoder.routers]
        models.append([*(loss.detach() for loss in losses), *gradients])
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_losses_on_gate_embeddings_see_them_whole(call):
    call(_narrow)


def test_a_rank_without_tokens(call):
    call(_uneven)


def _filled(rank: int, world_size: int, folder: Path, changes: dict) -> None:
    """Every rank takes its parts of a checkpoint's weights, and keeps those of what the checkpoint lacks as drawn."""
    config, checkpoint = tiny_config(**changes), Checkpoint.open(folder)
    require_start(config, checkpoint, "source")
    torch.manual_seed(5)
    alone = Decoder(config)
    fill(alone, checkpoint)
    read, lacking = load_decoder(folder).stored(), set()
    for name, value in alone.stored().items():
        if name in read:
            assert torch.equal(value, read[name]), name
        else:
            lacking.add(name)
            assert bool(value.any()) != name.endswith(("shared_expert.down_proj.weight", "bias")), name
    assert bool(lacking) == bool(changes)
    for options in ({"expert": 2}, {"data": 2}):
        torch.manual_seed(5)
        with torch.device("meta"):
            decoder = Decoder(config)
        Layout(ParallelConfig(**options), world_size, "cpu").apply(decoder, torch.device("cpu"))
        fill(decoder, checkpoint)
        stored = decoder.stored()
        assert stored.keys() == alone.stored().keys()
        for name, value in alone.stored().items():
            assert torch.equal(whole(stored[name].detach()), value), (options, name)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_shared_experts": 1, "shared_expert_gate": True}, HYPER["unchosen"]],
    ids=["all", "no shared experts", "no adapters"],
)
def test_weights_of_a_checkpoint(changes, tmp_path, call):
    write_checkpoint(Decoder(tiny_config()), "mixtral", tmp_path / "source", torch.float32)
    call(_filled, tmp_path / "source", changes)


def _gathered(rank: int, world_size: int, changes: dict) -> None:
    """A walk over a model that ranks share gives what a walk over the whole gives; nobody is left waiting."""
    config = tiny_config(**{"num_shared_experts": 1, "tie_word_embeddings": True, **changes})
    torch.manual_seed(5)
    alone = Decoder(config)
    torch.manual_seed(5)
    spread = Decoder(config)
    for decoder in (alone, spread):  # what begins as 0 or 1 would not be missed
        generator = torch.Generator().manual_seed(6)
        for tensor in (*decoder.norm.parameters(), *(router.expert_bias for router in _biased(decoder))):
            tensor.data.normal_(generator=generator)
    Layout(ParallelConfig(expert=2), world_size, "cpu").apply(spread, torch.device("cpu"))
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(2, dtype=torch.long))
    needs = frozenset(Need)
    model = GatheredModel(spread)
    if rank:
        model.follow()
    else:
        with model.leading(), torch.no_grad():
            pairs = list(zip(walk_model(model, text, needs), walk(alone, text, needs), strict=True))
        for found, wanted in pairs[:-1]:
            torch.testing.assert_close(found.routing.router_logits, wanted.routing.router_logits)
            assert torch.equal(found.routing.topk_index, wanted.routing.topk_index)
            assert torch.equal(found.matrix("up"), wanted.matrix("up"))
            torch.testing.assert_close(found.attribution.following.rows, wanted.attribution.following.rows)
        torch.testing.assert_close(pairs[-1][0].loss, pairs[-1][1].loss, equal_nan=True)
    dist.barrier()


def _biased(decoder: Decoder) -> list:
    return [router for router in decoder.routers if hasattr(router, "expert_bias")]


ENDS = {"embedding_multiplier": 3.0, "logits_multiplier": 0.5, "router": "sigmoid_topk"}
LAYER_NORM = {"norm_type": "layer", "lm_head_bias": True, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    "changes",
    [{}, HYPER["unchosen"], HYPER["free"], ENDS, LAYER_NORM],
    ids=["plain", "unchosen", "free", "scaled ends and a biased choice", "layer norms"],
)
def test_probes_see_the_whole_of_a_shared_model(changes, call):
    call(_gathered, changes)
