"""Runs of a study without training: a small program in place of `moebed fit`, and results made up for tables."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# argv: study folder, name, steps, behaviour. It goes on where its checkpoint is, a step each hundredth of a second.
PROGRAM = """
import json, os, pathlib, sys, time
out, name, steps, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
folder = out / name
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none are named"))
if behaviour == "fails":
    sys.exit("moebed: error: no space on the disk")
if behaviour == "diverges":
    print("moebed: error: the loss is nan at step 3", file=sys.stderr)
    sys.exit(3)
step = folder / "step"
done = int(step.read_text()) if step.exists() else 0
while done < steps:
    time.sleep(0.01)
    done += 1
    (folder / "half").write_text(str(done))
    os.replace(folder / "half", step)
    (out / "status" / (name + ".step")).write_text(str(done))
if behaviour != "ends early":
    (folder / "run_summary.json").write_text(json.dumps({"step": steps, "val/loss": 3.0}))
"""


@dataclass
class FakeRun:
    """What the runner reads of a run."""

    name: str
    steps: int = 3
    behaviour: str = "works"
    needs: str | None = None
    identity: dict = field(default_factory=dict)
    finished: str = "run_summary.json"
    arguments: tuple = ()
    from_random: bool = True
    devices: int = 0

    @property
    def hash(self):
        return json.dumps(self.identity, sort_keys=True)


def program(out: Path):
    """Makes the command line of a fake run."""
    return lambda run: [sys.executable, "-S", "-c", PROGRAM, str(out), run.name, str(run.steps), run.behaviour]


def made_up_study(losses: dict[str, list[float]], **changes) -> dict:
    """Content of a study.json: for each arm its losses, a seed each; the first arm is the baseline."""

    def run(arm: str, seed: int, loss: float) -> dict:
        steps = [100, 200, 300]
        rng = np.random.default_rng(seed)
        curve = [loss + 1.2, loss + 0.4, loss]
        spearman = (0.1 + 0.05 * rng.normal(size=4) + [0, 0.1, 0.2, 0.2 + (arm != next(iter(losses)))]).tolist()
        return {
            "folder": f"runs/{arm}/seed_{seed}",
            "config_hash": "0123456789ab",
            "status": "finished",
            "why": "",
            "loss": loss,
            "bits_per_byte": loss / 2,
            "domains": {"code": loss / 3, "prose": loss / 2 + 0.01 * seed},
            "guessing_loss": 7.6,
            "curve": {"step": steps, "loss": curve, "bits_per_byte": [value / 2 for value in curve]},
            "tokens_per_second": 1000.0 + seed,
            "headlines": {
                "norm_vs_score/spearman": {"step": [0, *steps], "value": spearman},
                "balance/max_violation": {"step": [0, *steps], "value": [0.9, 0.5, 0.4, 0.3 + seed / 100]},
            },
        }

    seeds = list(range(1, 1 + max(len(values) for values in losses.values())))
    study = {
        "format": 1,
        "name": "made_up",
        "question": "Is one better than the other?",
        "baseline": next(iter(losses)),
        "seeds": seeds,
        "settings": {},
        "match": [],
        "tolerance": 0.02,
        "arms": {
            arm: {
                "steps_before": [],
                "settings": {} if arm == next(iter(losses)) else {"model.config.router": arm},
                "steps": 300,
                "tokens": 614_400,
                "total_parameters": 4_000_000,
                "active_parameters": 2_000_000,
                "active_flops_per_token": 3_500_000,
                "runs": {str(seed): run(arm, seed, loss) for seed, loss in zip(seeds, values, strict=True)},
            }
            for arm, values in losses.items()
        },
    }
    return {**study, **changes}
