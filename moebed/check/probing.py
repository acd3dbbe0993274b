"""Step ``probes``: every probe on this device, of a model in memory and of a checkpoint, beside a model on a CPU.

The same random weights and text go through all; arrays of whole numbers must be equal, others close.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from moebed.check.contract import Found, Place, Row, Verdict
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.checkpoints.whole import write_checkpoint
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.contract import ProbeResult
from probes.registry import PROBES
from probes.running.choosing import probes_for
from probes.running.driver import needs_of, run_probes

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=24, initializer_range=0.2,
)  # fmt: skip
LENGTHS = (9, 4, 12)
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # of arrays that are no whole numbers

Results = Mapping[str, ProbeResult]


def rows(place: Place) -> Sequence[Row]:
    """Of the step."""
    names = probes_for(["all"], True)
    live = functools.cache(lambda device: live_results(device, names))

    def beside_cpu(results: Results) -> Found:
        return compare(results, live("cpu"))

    return [
        Row("a model in memory", lambda: beside_cpu(live("cuda")), gpus=1),
        Row("a checkpoint", lambda: beside_cpu(streamed_results(place.device, names, place.folder / "checkpoint"))),
        Row("a second time", lambda: compare(live_results(place.device, names), live(place.device))),
    ]


def decoder() -> Decoder:
    """Random weights, the same each time."""
    torch.manual_seed(3)
    return Decoder(CONFIG).eval()


def text() -> ProbeText:
    """Three sequences of two domains."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(CONFIG.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return ProbeText(ids.masked_fill(~mask, 0), mask, torch.arange(len(LENGTHS)) % 2, ("one", "two"))


def live_results(device: str, names: Sequence[str]) -> Results:
    """Of a model in memory."""
    probes = [PROBES[name]() for name in names]
    return run_probes(walk(decoder().to(device), text(), needs_of(probes)), probes)


def streamed_results(device: str, names: Sequence[str], folder: Path) -> Results:
    """Of the same model as a checkpoint, read a layer at a time."""
    if not folder.exists():
        write_checkpoint(decoder(), "mixtral", folder, torch.float32)
    model = PretrainedMoE(str(folder), text=text()).to(device)
    probes = [PROBES[name]() for name in names]
    try:
        return run_probes(model.views(text(), needs_of(probes)), probes)
    finally:
        model.close()


def compare(found: Results, wanted: Results) -> Found:
    """Array by array."""
    off, count = [], 0
    for name, result in wanted.items():
        ours = found[name].arrays
        if ours.keys() != result.arrays.keys():
            off.append(f"{name} has other arrays")
            continue
        for key, value in result.arrays.items():
            count += 1
            if not _alike(ours[key], value):
                off.append(f"{name} {key}")
    if off:
        said = f"{len(off)} of {count} arrays differ: {', '.join(off[:5])}"
        return Found(said, {"arrays": off}, Verdict.WRONG)
    return Found(f"{count} arrays of {len(wanted)} probes agree")


def _alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.shape != theirs.shape:
        return False
    if theirs.dtype.kind not in "fc":
        return bool(np.array_equal(ours, theirs))
    return bool(np.allclose(ours, theirs, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True))
