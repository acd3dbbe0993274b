"""Ranks on GPUs, of which there are none here: no message and no operator is given a tensor that would lie elsewhere.

The runs by ``pytest -m slow tests/parallel/test_parallel_devices.py``.
"""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from moebed.cli import main
from moebed.model import native
from tests.parallel import forked
from tests.parallel.forked import call
from tests.parallel.main_memory import MainMemory
from tests.parallel.parallel_runs import fit, recipe


def _planted(rank: int, world_size: int) -> None:
    device = torch.device("cpu")
    with MainMemory() as found:
        there, here = torch.zeros(3, device=device), torch.zeros(3)
        dist.all_reduce(there)
        dist.all_reduce(here.to(device))
        dist.broadcast(torch.tensor(rank, device=device), src=0)
        found.refused.clear()
        for number, refused in enumerate(
            [
                lambda: dist.all_reduce(torch.tensor(rank)),
                lambda: dist.all_reduce(there.cpu()),
                lambda: there + torch.zeros(3),
                lambda: torch.cat([there, torch.arange(2.0)]),
                lambda: there.new_zeros(3) * here.exp(),
            ],
            start=1,
        ):
            refused()
            assert len(found.refused) == number, found.refused
        for fine in (
            lambda: there * torch.tensor(2.0),
            lambda: there[torch.arange(2)],
            lambda: here.cpu() + torch.arange(3),
            lambda: dist.broadcast_object_list([rank], src=0),
        ):
            fine()
            assert len(found.refused) == 5, found.refused
    assert found.collectives["allreduce_"] == 4


def test_what_a_device_would_refuse_is_found():
    call(_planted, 2)


def _watched(arguments: list[str], ranks: int, folder: Path) -> dict[str, int]:
    """Messages of a command's first rank, by operator; nothing that a rank does may be refused."""

    def work() -> int:
        with mock.patch.object(native, "load", return_value="as on a GPU"), MainMemory() as found:
            code = main(arguments)
        said = json.dumps({"refused": sorted(set(found.refused)), "messages": found.collectives})
        (folder / f"{os.environ['RANK']}.json").write_text(said)
        return code

    processes = forked._fork(work, ranks, folder)
    codes = processes.wait(300)
    assert codes == [0] * ranks, f"{codes}\n{processes.said}"
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    refused = [each for rank in found for each in rank["refused"]]
    assert not refused, "\n".join(refused)
    return found[0]["messages"]


CASES = {
    "EP-2": ({"router": "sigmoid_topk", "router_options": {"bias_update_rate": 0.01}}, ["all_to_all_single"]),
    "EP-2, gathered": ({}, ["reduce_scatter_tensor"]),
    "FSDP2-2": ({"router": "document_pool"}, ["_reduce_scatter_base_", "_allgather_base_"]),
    "replicated-2": ({"router": "quantile", "router_aux_loss_scope": "window"}, ["allreduce_"]),
    "DDP-2": ({}, ["allreduce_"]),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", CASES)
def test_a_run_and_what_continues_it(layout, tmp_path):
    """Training, logging, validation, probes, samples, checkpoints written and read."""
    model, messages = CASES[layout]
    path = recipe(tmp_path, 4, **model)
    content = yaml.safe_load(path.read_text())
    content["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 2, "num_sequences": 3, "probes": ["balance"]}
    content["trainer"] |= {"val_check_interval": 2, "accumulate_grad_batches": 2}
    path.write_text(yaml.safe_dump(content))
    optimizer = "adamw" if layout == "DDP-2" else "muon"
    options = [
        "--model.optimizer.name",
        optimizer,
        "--data.mixing.rule",
        "gate_load",
        "--data.mixing.every_n_steps",
        "2",
    ]
    arguments, ranks = fit(path, tmp_path / "run", layout, *options)
    sent = _watched(arguments, ranks, tmp_path / "first")
    assert all(sent.get(name) for name in [*messages, "broadcast_", "barrier"]), sent
    again = ["--ckpt_path", "last", "--trainer.max_steps", "6", "--parallel.checkpoint", "file"]
    _watched([*arguments, *(again if layout != "DDP-2" else again[:4])], ranks, tmp_path / "second")
