"""What an optimizer step costs in messages between ranks and in waits for the device, held to formulas."""

import json

import pytest
import torch
import yaml

from moebed.model.decoder import Decoder
from moebed.parallel.config import ParallelConfig
from moebed.parallel.sharding import Layout
from tests.conftest import tiny_config
from tests.parallel.counting import MessageCounter
from tests.parallel.forked import call, run
from tests.parallel.parallel_runs import fit, recipe

LAYERS = 2  # of the recipe, both with experts; balanced over the whole batch, with a shared expert
COUNTED = 3  # the step after so many


def _counted(tmp_path, layout, accumulate, logged):
    path = recipe(tmp_path, COUNTED + 2)
    content = yaml.safe_load(path.read_text())
    counter = {"out": str(tmp_path / "counted"), "step": COUNTED}
    content["trainer"] |= {
        "callbacks": [{"class_path": "tests.parallel.counting.CountSteps", "init_args": counter}],
        "log_every_n_steps": COUNTED + 1 if logged else 100,
        "limit_val_batches": 0,
        "accumulate_grad_batches": accumulate,
    }
    content["checkpoint"] = {"every_n_train_steps": 1000}
    path.write_text(yaml.safe_dump(content))
    arguments, ranks = fit(path, tmp_path / "run", layout)
    run(arguments, ranks, tmp_path / "logs")
    found = [json.loads(file.read_text()) for file in sorted((tmp_path / "counted").glob("*.json"))]
    assert len(found) == ranks
    assert all(one == found[0] for one in found), "ranks that do not do the same wait for each other"
    return found[0]


def _messages(layout, accumulate, logged):
    """All-reduces, gathers, scatters and exchanges of a step."""
    # The load of every micro-batch, what the ranks were asked, and what is logged.
    all_reduces = accumulate + 1 + logged
    if layout == "1 process":
        return {}
    if layout.startswith("DDP"):
        return {"allreduce_": all_reduces + 1}  # one bucket of gradients, at the step's end
    meshes = 1 if layout == "FSDP2-2" else 3  # dimensions of meshes over which the gradient's norm is summed
    spread = layout != "FSDP2-2"
    sharded = 0 if layout.startswith("EP") else LAYERS  # experts that ranks of `data` share
    # The rest of each layer, and embedding with head: forward and backward, except the last, which stays gathered.
    groups = LAYERS + 1 + sharded
    found = {
        "allreduce_": all_reduces + meshes,
        "_allgather_base_": accumulate * (2 * (groups - 1) + 1),
        "_reduce_scatter_base_": accumulate * groups,
    }
    if layout == "EP-2, gathered":  # experts, rows and their weights, outputs; backward, all but the first in reverse
        found |= {"all_gather_into_tensor": accumulate * 4 * LAYERS, "reduce_scatter_tensor": accumulate * 3 * LAYERS}
    elif spread:  # how many rows, and their experts; rows, their weights and their outputs, forward and backward
        found |= {"alltoall_base_": accumulate * 2 * LAYERS, "all_to_all_single": accumulate * 6 * LAYERS}
    return found


def _waits(layout, accumulate, logged):
    """Is the norm finite; what is logged; was a rank asked to end; how many rows each rank gets of each layer."""
    several = layout != "1 process"
    exchanges = accumulate * LAYERS if "EP" in layout and "gathered" not in layout else 0
    return {"_local_scalar_dense": 1 + several, "tolist": (logged or not several) + exchanges}


SHORT = [("1 process", 2, False), ("EP-2", 2, False)]
LONG = [
    (layout, accumulate, logged)
    for layout in ("1 process", "DDP-2", "DDP-4", "FSDP2-2", "EP-2", "EP-4", "FSDP2×EP", "EP-2, gathered")
    for accumulate, logged in ((1, True), (4, True), (4, False))
]


def _check(tmp_path, layout, accumulate, logged):
    found = _counted(tmp_path, layout, accumulate, logged)
    assert found["messages"] == _messages(layout, accumulate, logged)
    assert {name: count for name, count in found["waits"].items() if count} == {
        name: count for name, count in _waits(layout, accumulate, logged).items() if count
    }


@pytest.mark.parametrize(("layout", "accumulate", "logged"), SHORT)
def test_a_step_costs_what_it_must(tmp_path, layout, accumulate, logged):
    _check(tmp_path, layout, accumulate, logged)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "accumulate", "logged"), LONG)
def test_a_step_costs_what_it_must_in_every_layout(tmp_path, layout, accumulate, logged):
    _check(tmp_path, layout, accumulate, logged)


def _step_whose_router_runs_the_experts(rank, world_size, router, options, wanted):
    config = tiny_config(router=router, router_options=options)
    decoder = Decoder(config).train()
    Layout(ParallelConfig(data=world_size), world_size, "cpu").apply(decoder, torch.device("cpu"))
    for one in decoder.routers:
        one.begin_step(0)
    with MessageCounter() as counter:
        decoder(torch.arange(32).view(2, 16) + rank).logits.square().mean().backward()
    assert counter.messages["_allgather_base_"] == wanted, counter.messages


@pytest.mark.parametrize(
    ("router", "options"),
    [("softmax_topk", {}), ("expert_norm", {}), ("competesmoe", {"competition_rate": 1.0})],
)
def test_experts_that_their_router_ran_are_gathered_once(router, options):
    """Each layer's rest and experts forward and backward; embedding, norm and head, which stay, once."""
    call(_step_whose_router_runs_the_experts, 2, router, options, 2 * 2 * LAYERS + 1)
