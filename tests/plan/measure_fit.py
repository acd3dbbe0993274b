"""Runs ``moebed fit`` and writes how far a rank's memory rose above what it was before its model was built.

``python measure_fit.py OUT ARGUMENT ...``: the file OUT.RANK gets JSON with ``resident``, the kernel's high-water mark
until training ends, and ``in_use``, the most bytes that the C library had handed out (sampled), which leaves out what
its heap keeps of freed blocks. A process of its own, warmed up by a tiny model, so that neither an earlier test's
memory nor libraries loaded on first use are counted.
"""

import ctypes
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

import moebed.commands.fit
import moebed.commands.training_run
import moebed.training.command_line
from moebed.model.config import ModelConfig
from moebed.training.module import MoEModule
from moebed.training.optim import OptimizerConfig, build_optimizer


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = MallInfo


def in_use() -> int:
    """Bytes that malloc has handed out, those in mappings of their own included."""
    found = _libc.mallinfo2()
    return found.uordblks + found.hblkhd


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


class Watch(Callback):
    """Samples what is in use while training, and writes both peaks when training ends."""

    def __init__(self, out: str) -> None:
        self.out, self.most = out, 0
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        self.resident, self.in_use = resident("VmRSS"), in_use()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.most = max(self.most, in_use())
            time.sleep(0.003)

    def on_train_end(self, trainer, pl_module) -> None:
        peaks = {"resident": resident("VmHWM") - self.resident, "in_use": self.most - self.in_use}
        Path(f"{self.out}.{trainer.global_rank}").write_text(json.dumps(peaks))


def warm_up() -> None:
    """One step of a tiny model in each precision, so that the libraries have what they load on first use."""
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, moe_intermediate_size=32)
    for enabled in (False, True):
        module = MoEModule(config)
        ids = torch.zeros(2, 16, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module.losses.terms(ids, ids).nats.sum()
        loss.backward()
        build_optimizer(module, OptimizerConfig()).step()


if __name__ == "__main__":
    out, *arguments = sys.argv[1:]
    instantiate = moebed.training.command_line.TrainingCLI.instantiate_classes
    watching: list[Watch] = []

    def measured(cli) -> None:
        """The model is built in here."""
        warm_up()
        watching.append(Watch(out))
        instantiate(cli)
        cli.trainer.callbacks.append(watching[0])

    moebed.training.command_line.TrainingCLI.instantiate_classes = measured
    moebed.commands.training_run.ReportingCLI.after_fit = lambda cli: (
        None
    )  # no validation and report after the last step
    moebed.commands.fit.run("fit", arguments)
    sys.stderr.flush()
    os._exit(0)  # the sampling thread has no end of its own
