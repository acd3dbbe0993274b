"""One of two processes that train a tiny decoder with the interpreted kernels; test_kernels_distributed.py starts both.

Each takes one of two sequences, by DDP and by fully_shard, and holds loss and gradients to those of both sequences in
one process. Run as ``python kernels_two_processes.py RANK RENDEZVOUS`` with TRITON_INTERPRET=1.
"""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.experts import Experts
from triton_kernels import expert_mlp

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=24, max_position_embeddings=64, initializer_range=0.1,
    experts_backend="triton",
)  # fmt: skip


def step(model, ids):
    """The loss, its gradients by name left in the model."""
    loss = cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def same(name, model, loss, start, ids, strip=""):
    """Hold the mean loss of both processes and every gradient to one process's."""
    expected = step(start, ids)
    dist.all_reduce(loss, dist.ReduceOp.SUM)
    torch.testing.assert_close(loss / 2, expected, rtol=1e-5, atol=1e-6)
    gradients = {n.removeprefix(strip): p.grad for n, p in model.named_parameters()}
    assert any("experts" in n for n in gradients)
    for n, parameter in start.named_parameters():
        grad = gradients[n].full_tensor() if isinstance(gradients[n], DTensor) else gradients[n]
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{name} {n}: {m}")
    print(name, "agrees", flush=True)


def refuse_sharded(mesh):
    """Sharded matrices are refused in one line."""
    x, gate_up, down = torch.randn(8, 32), torch.randn(4, 48, 32), torch.randn(4, 32, 24)
    index, weight = torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1)
    sharded = distribute_tensor(gate_up, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="gate_up is a DTensor") as caught:
        expert_mlp(x, sharded, down, index, weight)
    assert "\n" not in str(caught.value)
    print("refusal agrees", flush=True)
    local = expert_mlp(x, sharded.to_local(), down[:2], index, weight)  # a rank's share is taken
    torch.testing.assert_close(
        local, expert_mlp(x, sharded.full_tensor()[dist.get_rank() * 2 :][:2], down[:2], index, weight)
    )


def main(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    start, ids = Decoder(CONFIG), torch.randint(0, CONFIG.vocab_size, (2, 25))
    mine = ids[rank : rank + 1]

    parallel = DistributedDataParallel(copy.deepcopy(start))
    same("DDP", parallel, step(parallel, mine), copy.deepcopy(start), ids, strip="module.")

    sharded = copy.deepcopy(start)
    for module in sharded.modules():
        if isinstance(module, Experts):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    same("FSDP2", sharded, step(sharded, mine), copy.deepcopy(start), ids)
    refuse_sharded(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
