"""Counts what an optimizer step costs in messages between ranks and in waits of the CPU for the device."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that need a value, or the number of values, from the device before they return.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "equal"}
# Of functional collectives, what only waits for one that was counted.
NO_MESSAGE = {"wait_tensor", "_wrap_tensor_autograd"}


class MessageCounter(TorchDispatchMode):
    """Counts, on a CPU, what would be a message or a wait on a device.

    A tensor made from Python's numbers, and what is computed of such alone, lies in main memory whatever the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.waits = collections.Counter(), collections.Counter()
        self._is_in_cpu_op = False
        self._in_memory: dict[int, torch.Tensor] = {}
        self._tolist = torch.Tensor.tolist  # which is no operator

    def __enter__(self):
        def tolist(tensor):
            self.waits["tolist"] += not self._is_in_cpu_op
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._opname
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        in_memory = bool(tensors) and all(id(x) in self._in_memory for x in tensors)
        if "c10d" in func.namespace:
            self.messages.update([name] if name not in NO_MESSAGE else [])
            for tensor in tensors:
                self._in_memory.pop(id(tensor), None)
        elif name in WAITS and kwargs.get("output_size") is None and not in_memory:
            self.waits[name] += 1
        self._is_in_cpu_op = func.namespace == "moebed"
        out = func(*args, **kwargs)
        self._is_in_cpu_op = False
        if name == "lift_fresh" or in_memory:
            self._in_memory |= {id(x): x for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


class CountSteps(Callback):
    """Counts an optimizer step from its first micro-batch to the next step's, and writes what it found.

    Args:
        out: A file of JSON a rank, ``RANK.json``, in this folder.
        step: Steps done before the one that is counted.
    """

    def __init__(self, out: str, step: int = 3) -> None:
        self.out, self.step = Path(out), step
        self._counter: MessageCounter | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and self._counter is None:
            self._counter = MessageCounter()
            self._counter.__enter__()
        elif trainer.global_step == self.step + 1 and self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
            self.out.mkdir(parents=True, exist_ok=True)
            found = {"messages": counter.messages, "waits": counter.waits}
            (self.out / f"{trainer.global_rank}.json").write_text(json.dumps(found))
            self.step = -1
