"""Collectives of PyTorch that are in flight together over gloo, without any code of moebed: does a rank die of them?

    python tests/parallel/stress_collectives.py SECONDS

Four ranks do what ``parallel.exchange: all_gather`` does of a layer. With torch 2.13.0 on two busy cores one of them
died once, within two minutes, of ``malloc(): unaligned tcache chunk detected`` in the backward pass of an all-gather; a
second run of 45 seconds and a third of 100 ended well. Tests of several ranks die so now and then.
"""

import faulthandler
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.multiprocessing as processes

RANKS, TOKENS, HIDDEN = 4, 48, 32


def work(rank: int, seconds: float, met_in: str) -> None:
    """One rank, until the time is over for all."""
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{met_in}/met", rank=rank, world_size=RANKS)
    group, begin, rounds = dist.group.WORLD, time.time(), 0
    weight = torch.randn(HIDDEN, HIDDEN, requires_grad=True)
    while True:
        goes_on = torch.tensor(float(time.time() - begin < seconds))
        dist.all_reduce(goes_on, dist.ReduceOp.MIN)
        if not goes_on:
            break
        for _ in range(20):
            x, scale = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.rand(TOKENS, 2, requires_grad=True)
            index = torch.randint(0, 8, (TOKENS, 2), dtype=torch.int32)
            gathered = [
                collectives.all_gather_single_autograd(one, gather_dim=0, group=group)
                for one in (index, scale, x @ weight)
            ]
            out = (gathered[2] * gathered[1].sum(1, keepdim=True)) @ weight + gathered[0].sum()
            summed = collectives.reduce_scatter_single_autograd(out.contiguous(), "sum", 0, group)
            (x + summed).square().mean().backward()
            rounds += 1
    print(f"rank {rank}: {rounds} rounds", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (float(sys.argv[1]), folder), nprocs=RANKS)
