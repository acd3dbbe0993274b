"""What four ranks really send for their experts is what the probe counts of the routing alone, byte for byte."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moebed.model.decoder import Decoder
from moebed.parallel.config import ParallelConfig
from moebed.parallel.sharding import Layout
from moebed.parallel.traffic import between_ranks, bytes_per_trip, link_bytes, trips_between_ranks, trips_to_all
from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.registry import make_probes
from probes.running.driver import needs_of, run_probes
from tests.conftest import tiny_config
from tests.parallel.forked import call

RANKS, SEQUENCES, LENGTH = 4, 8, 24


class SentBytes(TorchDispatchMode):
    """Bytes (X,) that this rank gives to each rank of rows and what is beside them, as if each to each went directly.

    By all-to-all, agreeing on their number is left out. By all-gather every rank is given all that this one has, by
    reduce-scatter a part each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to = np.zeros(RANKS, np.int64)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "all_to_all_single":
            rows, _, splits = args[:3]
        elif func._opname == "alltoall_base_" and len(args[4]):  # experts of each row; without splits, how many rows
            rows, splits = args[1], args[4]
        elif func._opname == "all_gather_into_tensor":
            rows, splits = args[0], [len(args[0])] * RANKS
        elif func._opname == "reduce_scatter_tensor":
            rows, splits = args[0], [len(args[0]) // RANKS] * RANKS
        else:
            return func(*args, **(kwargs or {}))
        self.to += np.array(splits) * rows[0].numel() * rows.element_size() if len(rows) else 0
        return func(*args, **(kwargs or {}))


def _counted(rank: int, world_size: int, router: str, recomputed: bool, dtype: str, exchange: str, norm: bool) -> None:
    sizes = {"num_experts": 8, "expert_ranks": RANKS, "ranks_per_node": 2, "num_hidden_layers": 3}
    config = tiny_config(router=router, post_norms=norm, **sizes)
    ids = torch.randint(0, 96, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    alone = Decoder(config)
    torch.manual_seed(5)
    spread = Decoder(config, activation_checkpointing=recomputed).train()
    Layout(ParallelConfig(expert=RANKS, exchange=exchange), world_size, "cpu").apply(spread, torch.device("cpu"))
    spread.stand_for(rank, world_size)
    with SentBytes() as sent:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            out = spread(ids.chunk(RANKS)[rank])
        out.logits.float().square().mean().backward()
    itemsize = 2 if dtype == "bfloat16" else 4
    assignments, trips = torch.zeros(2, RANKS, RANKS, dtype=torch.int64)
    for routing in out.routings:
        index = routing.topk_index.masked_fill(~routing.assigned, -1).numpy()
        where = (index, np.full(len(index), rank), config.num_experts, RANKS)
        assignments += torch.from_numpy(between_ranks(*where))
        trips += torch.from_numpy(trips_between_ranks(*where))
    measured = torch.zeros(RANKS, RANKS, dtype=torch.int64)
    measured[rank] = torch.from_numpy(sent.to)
    for mine in (assignments, trips, measured):
        dist.all_reduce(mine)
    each = bytes_per_trip(config.hidden_size, itemsize, config.num_experts_per_tok, recomputed, norm_after=norm)
    each_token = np.repeat(np.arange(RANKS), SEQUENCES * LENGTH // RANKS)
    made = 3 * trips_to_all(each_token, RANKS) if exchange == "all_gather" else trips.numpy()
    counted = link_bytes(made, each)
    assert np.array_equal(counted, measured), f"{counted}\n{measured}"
    assert bool((measured > 0).all())
    assert bool((trips < assignments).any())
    if dtype == "bfloat16" or router == "locmoe_plus" or norm:
        return  # a walk is in float32, and drops nothing; the probe knows of no norm
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(SEQUENCES, dtype=torch.long))
    options = {"ranks": RANKS, "ranks_per_node": 2, "itemsize": itemsize, "recomputed": recomputed}
    options["exchange"] = exchange
    probes = make_probes(["traffic"], {"traffic": options})
    found = run_probes(walk(alone, text, needs_of(probes)), probes)["traffic"].arrays
    assert np.array_equal(sum(found[f"bytes/{layer}"] for layer in range(3)), measured)
    assert np.array_equal(sum(found[f"assignments/{layer}"] for layer in range(3)), assignments)
    assert np.array_equal(sum(found[f"trips/{layer}"] for layer in range(3)), trips)
    for layer in range(3):
        assert sum(float(found[f"{where}/{layer}"]) for where in ("self", "node", "across")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("router", "recomputed", "dtype", "exchange", "norm"),
    [
        ("softmax_topk", False, "float32", "all_to_all", False),
        ("softmax_topk", False, "bfloat16", "all_to_all", False),
        pytest.param("softmax_topk", True, "float32", "all_to_all", False, marks=pytest.mark.slow),
        ("softmax_topk", True, "float32", "all_to_all", True),
        pytest.param("grap", False, "float32", "all_to_all", False, marks=pytest.mark.slow),
        ("locmoe_plus", False, "float32", "all_to_all", False),
        ("softmax_topk", True, "float32", "all_gather", False),
    ],
)
def test_3_7_12_four_ranks_send_what_the_probe_counts(router, recomputed, dtype, exchange, norm):
    call(_counted, RANKS, router, recomputed, dtype, exchange, norm)
