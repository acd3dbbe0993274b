"""What accumulation makes of the balancing loss: its gradient by each scope beside that of a large batch, and the time.

    python -m tests.training.measure_scope DIR

Trains recipes/study_planted.yaml for 200 steps. Before the first and after the last, the gradient of the load-balancing
loss alone is taken over windows of n micro-batches of 4 sequences: with the assignments of each micro-batch by itself,
with those so far in the window (``global``, as Megatron-LM has it), and with those of the whole window (``window``,
which is what one batch of 4 n sequences has). Printed are the distance from the last over its length, mean over 8
windows, and the time of a step with and without a forward pass more, by the processor's clock, medians of 15 in turns.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from moebed.cli import main
from moebed.model.losses import load_balancing_loss
from moebed.study.resolving import as_arguments
from moebed.training.step_losses import StepTerms

ROOT = Path(__file__).parents[2]
STEPS, ROWS, WINDOWS = 200, 4, 8


class MeasureScope(Callback):
    """Measures at the start and at the end."""

    def on_train_start(self, trainer, module):
        """Of random weights."""
        measure(module, trainer.datamodule, 0)

    def on_train_end(self, trainer, module):
        """Of trained ones."""
        measure(module, trainer.datamodule, trainer.global_step)


@torch.enable_grad()
def measure(module, data, step: int) -> None:
    """Print a line for each n."""
    module.train()
    rows = {key: torch.cat([batch[key] for batch in data.upcoming(WINDOWS)]) for key in ("input_ids", "labels")}
    for parts in (2, 4, 8):
        distances = []
        for window in range(WINDOWS):
            first = window * 32 % (len(rows["labels"]) - ROWS * parts + 1)
            cuts = [slice(first + ROWS * part, first + ROWS * (part + 1)) for part in range(parts)]
            terms = [module.losses.terms(rows["input_ids"][cut], rows["labels"][cut]) for cut in cuts]
            exact, so_far, alone = (_gradient(module, terms, kind) for kind in ("window", "global", "micro"))
            distances.append([float((found - exact).norm() / exact.norm()) for found in (so_far, alone)])
        so_far, alone = np.mean(distances, axis=0)
        print(f"step {step}, {parts} micro-batches: global {so_far:.2f}, micro {alone:.2f}", end="; ", flush=True)
        plain, ahead = _times(module, [(rows["input_ids"][cut], rows["labels"][cut]) for cut in cuts])
        print(f"a step {plain:.3f} s, with a forward pass more {ahead:.3f} s, {ahead / plain:.2f} times")


def _gradient(module, terms: list[StepTerms], kind: str) -> Tensor:
    counts = [torch.stack(one.counts) for one in terms]  # (L, E) of each micro-batch
    total: Tensor = torch.zeros(())
    for part, one in enumerate(terms):
        known = {"window": sum(counts), "global": sum(counts[: part + 1]), "micro": counts[part]}[kind]
        layers = [load_balancing_loss(probs, count) for probs, count in zip(one.mean_probs, known, strict=True)]
        total = total + torch.stack(layers).mean() / len(terms)
    parameters = [parameter for parameter in module.decoder.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros(0) if one is None else one.flatten() for one in found])


def _times(module, batches) -> tuple[float, float]:
    taken: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(30):
        begin = time.process_time()
        if turn % 2:
            with torch.no_grad():
                for ids, labels in batches:
                    module.losses.terms(ids, labels)
        for ids, labels in batches:
            (module.losses.terms(ids, labels).nats.mean() / len(batches)).backward()
        taken[bool(turn % 2)].append(time.process_time() - begin)
    module.zero_grad()
    return float(np.median(taken[False])), float(np.median(taken[True]))


def run(folder: Path) -> None:
    """Train, and print the table."""
    overrides = {
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS,
        "trainer.precision": 32,
        "trainer.callbacks": [{"class_path": "tests.training.measure_scope.MeasureScope"}],
        "trainer.default_root_dir": str(folder),
        "trainer.enable_progress_bar": False,
    }
    if code := main(["fit", "--config", str(ROOT / "recipes" / "study_planted.yaml"), *as_arguments(overrides)]):
        sys.exit(code)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder]:
            run(Path(folder))
        case _:
            sys.exit(__doc__)
