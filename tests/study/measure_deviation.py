"""How far pairs of runs lie apart, and what would bring them together: averaged weights, more held-out text.

    python -m tests.study.measure_deviation run DIR ARM SEED [STEPS]
    python -m tests.study.measure_deviation show DIR

``run`` trains one arm of recipes/studies/planted_small.yaml and keeps the loss on each held-out window, up to 2048 of a
domain where the study has 128, by the last weights and by means of the weights at the last steps (3, 6 and 11 of them,
10 steps apart). ``show`` pairs the arms that are there with ``random`` over seeds: for each of those, and for 128, 512
(the study's) and 2048 windows and all, how far a difference scatters by the choice of text alone, and how far pairs lie
apart (of fewer windows, the mean square over disjoint parts).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback

from moebed.cli import main
from moebed.study.recipe import study_content
from moebed.study.resolving import as_arguments
from moebed.study.statistics import deviation_range

STUDY = Path(__file__).parents[2] / "recipes" / "studies" / "planted_small.yaml"
EVERY, MEANS, WINDOWS = 10, (1, 3, 6, 11), (128, 512, 2048)


class MeasureMeans(Callback):
    """Keeps weights of the last steps, and in the end the loss of their means on each held-out window.

    Args:
        out: The file.
    """

    def __init__(self, out: str) -> None:
        self.out, self.kept = out, []

    def on_train_batch_end(self, trainer, module, *_):
        """Keep the weights, if it is time."""
        left = trainer.max_steps - trainer.global_step
        if left % EVERY == 0 and left <= EVERY * (max(MEANS) - 1):
            self.kept.append({key: value.clone() for key, value in module.decoder.state_dict().items()})

    @torch.no_grad()
    def on_fit_end(self, trainer, module):
        """Measure."""
        decoder, found = module.decoder.eval(), {}
        loader = trainer.datamodule.val_dataloader()
        for count in MEANS:
            last = self.kept[-count:]
            decoder.load_state_dict({key: torch.stack([one[key] for one in last]).mean(0) for key in last[0]})
            nats, tokens = [], []
            for batch in loader:
                nats.append(module.losses.terms(batch["input_ids"], batch["labels"]).nats)
                tokens.append((batch["labels"] >= 0).sum(dim=1))
            held_out = torch.cat(tokens) > 0  # not what fills the last batch
            found[f"mean_{count}"] = (torch.cat(nats) / torch.cat(tokens))[held_out].numpy()
        np.savez(self.out, **found)


def run(folder: Path, arm: str, seed: int, steps: int) -> None:
    """Train an arm."""
    study = study_content(STUDY)
    overrides = study["arms"][arm] | {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.callbacks": [
            {
                "class_path": "tests.study.measure_deviation.MeasureMeans",
                "init_args": {"out": f"{folder}/{arm}_{seed}.npz"},
            }
        ],
        "trainer.default_root_dir": f"{folder}/{arm}_{seed}",
        "trainer.enable_progress_bar": False,
        "checkpoint.every_n_train_steps": steps,
        "data.max_validation_windows": 2048,
        "data.seed": seed,
        "seed_everything": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    base = STUDY.parent / study["base"]
    if code := main(["fit", "--config", str(base), *as_arguments(overrides)]):
        sys.exit(code)


def show(folder: Path) -> None:
    """Print the table."""
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for path in sorted(folder.glob("*.npz")):
        arm, _, seed = path.stem.rpartition("_")
        found.setdefault(arm, {})[int(seed)] = dict(np.load(path))
    base = found.pop("random")
    for arm, runs in found.items():
        seeds = sorted(runs.keys() & base.keys())
        for name in next(iter(runs.values())):
            differences = np.stack([runs[seed][name] - base[seed][name] for seed in seeds])  # (n, windows)
            loss = np.mean([runs[seed][name].mean() for seed in seeds])
            print(f"{arm}, {name}, {len(seeds)} pairs: loss {loss:.4f}, difference {differences.mean():+.4f}")
            of_text = np.sqrt(differences.var(axis=1, ddof=1).mean())  # of a window
            for windows in (*WINDOWS, differences.shape[1]):
                line = f"    {windows} windows: the text alone scatters by {of_text / np.sqrt(windows):.4f}"
                if len(seeds) > 1:
                    deviation = _deviation(differences, windows)
                    low, high = deviation_range(deviation, len(seeds) - 1)
                    line += f", pairs by {deviation:.4f} [{low:.4f}, {high:.4f}]"
                print(line)


def _deviation(differences: np.ndarray, windows: int) -> float:
    """Of the means over so many windows of differences (n, all windows)."""
    parts = differences.shape[1] // windows
    means = [differences[:, start::parts].mean(axis=1) for start in range(parts)]
    return float(np.sqrt(np.mean([mean.var(ddof=1) for mean in means])))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", folder, arm, seed, *steps]:
            run(Path(folder), arm, int(seed), int(*steps or (500,)))
        case ["show", folder]:
            show(Path(folder))
        case _:
            sys.exit(__doc__)
