"""Tokens that go to every rank, beside tokens that go to the ranks of their experts: the same model, without a wait."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moebed.errors import UserError
from moebed.model.decoder import Decoder
from moebed.model.routers import ROUTERS
from moebed.parallel.config import ParallelConfig
from moebed.parallel.sharding import Layout
from moebed.parallel.traffic import even_trips
from moebed.plan import activations
from moebed.plan.setup import Setup
from moebed.training.module import MoEModule
from tests.conftest import tiny_config
from tests.parallel.counting import MessageCounter
from tests.parallel.forked import call
from tests.parallel.parallel_runs import ROOT
from tests.triton_kernels.kernels_interpreted import interpreter  # noqa: F401

EXCHANGES = ("all_to_all", "all_gather")
OPTIONS = {"d_low": 8, "competition_rate": 1.0, "jitter": 0.1, "num_domains": 2}
# Routers with experts of their own, that run experts, that drop, of which a token has any number of experts.
SOME = ("softmax_topk", "autonomy", "competesmoe", "locmoe_plus", "relu")


def _spread(exchange: str, rank: int, world_size: int, recomputed: bool = False, **changes) -> Decoder:
    torch.manual_seed(5)
    with torch.device("meta"):
        decoder = Decoder(tiny_config(**{"num_hidden_layers": 1, **changes}), activation_checkpointing=recomputed)
    parallel = ParallelConfig(expert=world_size, exchange=exchange)
    Layout(parallel, world_size, "cpu").apply(decoder, torch.device("cpu"))
    decoder.stand_for(rank, world_size)
    for router in decoder.train().routers:
        router.begin_step(0)
    return decoder


def _ids(rank: int, world_size: int, length: int = 24) -> torch.Tensor:
    ids = torch.randint(0, 96, (2 * world_size, length), generator=torch.Generator().manual_seed(1))
    return ids.chunk(world_size)[rank]


def _step(decoder: Decoder, ids: torch.Tensor, dtype: str = "float32") -> list[torch.Tensor]:
    """Logits and gradients."""
    domain = (ids[:, :1] + torch.arange(ids.shape[1]) // 5) % 2
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = decoder(ids, domain=domain)
    out.logits.float().square().mean().backward()
    return [out.logits.detach(), *(p.grad.to_local() for p in decoder.parameters() if p.grad is not None)]


def _same_bits(rank: int, world_size: int, cases: dict) -> None:
    torch.use_deterministic_algorithms(True)  # so that what nobody computes holds NaN
    for name, case in cases.items():
        changes = {key: value for key, value in case.items() if key not in ("dtype", "one_expert")}
        found = []
        ways = [(exchange, changes) for exchange in EXCHANGES]
        ways += [("all_to_all", {**changes, "recomputed": False})] if "recomputed" in case else []
        for exchange, changed in ways:
            decoder = _spread(exchange, rank, world_size, **changed)
            if "one_expert" in case:  # of equal ones it is always the same that is chosen
                torch.nn.init.zeros_(decoder.blocks[0].mlp.router.weight.to_local())
            found.append(_step(decoder, _ids(rank, world_size), case.get("dtype", "float32")))
        if "one_expert" in case:
            busy = decoder.blocks[0].mlp.experts.down_proj.grad.to_local().flatten(1).any(dim=1).sum()
            dist.all_reduce(busy)
            assert busy == 1
        assert len(found[0]) > 10
        for first, *others in zip(*found, strict=True):
            assert all(torch.equal(first, other) for other in others), name


def _of_routers(names) -> dict:
    return {name: {"router": name, "expert_ranks": 2, "router_options": OPTIONS} for name in names}


def test_two_ranks_have_the_same_bits_by_either_exchange():
    """Of two numbers a sum has the same bits in any order."""
    cases = {
        "the loop": {"experts_backend": "loop"},
        "native": {"experts_backend": "native", "moe_intermediate_size": 32},
        "biases": {"experts_bias": True},
        "bfloat16": {"dtype": "bfloat16"},
        "recomputed": {"recomputed": True, "num_shared_experts": 1},
        "all tokens to one rank": {"num_experts_per_tok": 1, "one_expert": True},
    }
    call(_same_bits, 2, {**_of_routers(SOME), **cases})


@pytest.mark.slow
def test_two_ranks_have_the_same_bits_with_every_router():
    call(_same_bits, 2, _of_routers(name for name in ROUTERS if name not in SOME))


@pytest.mark.slow
def test_two_ranks_have_the_same_bits_with_the_kernels(interpreter):  # noqa: F811
    call(_same_bits, 2, {"triton": {"experts_backend": "triton", "moe_intermediate_size": 32}})


def _unequal(rank: int, world_size: int) -> None:
    """Numbers of tokens that one rank has had and the other has not: in the first pass, less, as much, more."""
    decoders = [_spread(exchange, rank, world_size, num_shared_experts=1) for exchange in EXCHANGES]
    for length in (20 + 4 * rank, 24 - 4 * rank, 24, 24 - rank, 1 + rank):
        found = [_step(decoder, _ids(rank, world_size, length)) for decoder in decoders]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, msg=str(length))
    if rank:  # the other, which is not asked, does not wait
        experts = decoders[1].blocks[0].mlp.experts
        with pytest.raises(UserError, match="a rank has 50 tokens, and in the first pass none had more than 48:"):
            experts.exchange.begin(experts, torch.zeros(50, 32), None)


def test_ranks_with_different_numbers_of_tokens():
    """Nobody asks the others, who are in another collective, so none waits; numbers are those of the all-to-all."""
    call(_unequal, 2)


def _counted(rank: int, world_size: int) -> None:
    # Beside rows, their weights and their experts: by all-to-all, how many; gradients of rows, weights and outputs.
    messages = {
        "all_to_all": {"alltoall_base_": 2, "all_to_all_single": 6},
        "all_gather": {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 3},
    }
    # How many rows come; where tokens have any number of experts, how many the busiest has.
    waits = {("all_to_all", "softmax_topk"): 1, ("all_to_all", "relu"): 2}
    for exchange in EXCHANGES:
        for router in ("softmax_topk", "relu"):
            decoder = _spread(exchange, rank, world_size, router=router)
            _step(decoder, _ids(rank, world_size))  # the first time, ranks compare how many tokens they have
            with MessageCounter() as counter:
                _step(decoder, _ids(rank, world_size))
            assert +counter.waits.total() == waits.get((exchange, router), 0), (exchange, router, counter.waits)
            sent = {name: n for name, n in counter.messages.items() if not name.endswith("base_") or "alltoall" in name}
            assert sent == messages[exchange]


def test_a_layer_waits_for_the_device_by_all_to_all_alone():
    call(_counted, 2)


def _kept(rank: int, world_size: int) -> None:
    """Bytes that the experts' forward pass keeps for the backward pass, of a rank that has half of them."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "experts_backend": "grouped_mm"}
    for num_experts, top_k in ((8, 2), (4, 3)):
        decoder = _spread("all_gather", rank, world_size, num_experts=num_experts, num_experts_per_tok=top_k, **sizes)
        experts, kept = decoder.blocks[0].mlp.experts, {}
        forward = experts.forward

        def watched(x, routing, beside, experts=experts, kept=kept, forward=forward):
            parameters = [experts.local(parameter) for parameter in experts.parameters()]
            others = {t.untyped_storage().data_ptr() for t in (x, *routing[2:4], *parameters)}

            def keep(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = forward(x, routing, beside)
            for other in others:
                kept.pop(other, None)
            return out

        experts.forward = watched
        decoder(_ids(rank, world_size, 64))
        setup = Setup(decoder.config, 2, 64, layout=ParallelConfig(1, world_size, exchange="all_gather"))
        planned = activations.dispatch(setup, 0) + activations.experts(setup, 0)
        assert sum(kept.values()) == pytest.approx(planned, rel=0.02)


def test_the_plan_counts_what_is_kept_where_ranks_gather_tokens():
    call(_kept, 2)


def _graphs(rank: int, world_size: int, exchange: str, wanted: int) -> None:
    """Of the routed experts, with the shared one beside them."""
    decoder = _spread(exchange, rank, world_size, num_shared_experts=1)
    eager, graphs = _step(decoder, _ids(rank, world_size)), []
    decoder.zero_grad()
    experts = decoder.blocks[0].mlp.experts
    experts.forward = torch.compile(experts.forward, backend=partial(_captured, graphs), dynamic=False)
    for one, other in zip(_step(decoder, _ids(rank, world_size)), eager, strict=True):
        torch.testing.assert_close(one, other)
    assert len(graphs) == wanted


def _captured(graphs: list, graph, inputs):
    graphs.append(graph)
    return graph.forward


@pytest.mark.slow
def test_experts_are_one_graph_where_ranks_gather_tokens():
    call(_graphs, 2, "all_gather", 1)
    call(_graphs, 2, "all_to_all", 4)


def _parts(rank: int, world_size: int) -> None:
    decoder, graphs = _spread("all_gather", rank, world_size, num_shared_experts=1), []
    eager = _step(decoder, _ids(rank, world_size))
    decoder.zero_grad()
    compiling = partial(nn.Module.compile, backend=partial(_captured, graphs))
    with mock.patch.object(nn.Module, "compile", lambda part, **options: compiling(part, **options)):
        MoEModule._compile_parts(SimpleNamespace(decoder=decoder, _compiled_terms=None))
    for one, other in zip(_step(decoder, _ids(rank, world_size)), eager, strict=True):
        torch.testing.assert_close(one, other)
    attention, shared = ({node.target for node in graph.graph.nodes} for graph in graphs)
    assert F.scaled_dot_product_attention in attention
    assert F.silu in shared


def test_what_is_compiled_of_a_model_that_ranks_share():
    """A graph each: attention, and the FFN that every token passes; the routed experts are not, by either exchange."""
    call(_parts, 2)


def table() -> list[str]:
    """What the all-gather costs beside the all-to-all: bytes, and rows that experts have room for; 64 experts."""
    experts, all_ranks = 64, (2, 4, 8, 16, 64)
    lines = ["| | " + " | ".join(f"{ranks} ranks" for ranks in all_ranks) + " |", "|---" * 6 + "|"]
    for top_k in (2, 6, 8):
        sent = [ranks / even_trips(experts, top_k, ranks) for ranks in all_ranks]
        rows = [ranks * min(top_k, experts // ranks) / top_k for ranks in all_ranks]
        cells = [f"{one:.3g}, {other:.3g}" for one, other in zip(sent, rows, strict=True)]
        lines.append(f"| {top_k} experts a token | " + " | ".join(cells) + " |")
    return lines


def test_readme_has_the_table_of_costs():
    lines = (ROOT / "moebed" / "parallel" / "README.md").read_text(encoding="utf-8").splitlines()
    expected = table()
    start = lines.index(expected[0])
    assert lines[start : start + len(expected)] == expected


if __name__ == "__main__":
    print("\n".join(table()))
