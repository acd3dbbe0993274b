"""Does planted text of depth 2 take two layers of attention?

    python -m tests.data.measure_depth DIR [SEED ...]

Trains dense models of one layer and of two on planted text of one domain, 8 symbols, at depth 2, for 800 steps of 4096
tokens, the one layer with as many parameters as the two; and the one-layer model on the same text at depth 1, which one
layer can look up. Prints the loss over the floor, and over it too what one loses who knows the language but only the
last symbol, and only how often each symbol is.
"""

import json
import sys
from pathlib import Path

import numpy as np

from moebed.cli import main
from moebed.data.planted import PlantedConfig, PlantedLanguage
from moebed.study.resolving import as_arguments

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_planted.yaml"
LANGUAGE = {"domains": 1, "symbols": 8, "branching": 2}
STEPS = 800
# Layers, depth, width of the FFN: of one layer so much more that attention's parameters are made up for.
MODELS = {"one layer": (1, 2, 341), "two layers": (2, 2, 128), "one layer, depth 1": (1, 1, 341)}


def blind(depth: int) -> tuple[float, float]:
    """Nats a symbol over the entropy rate: of who knows the last symbol alone, and of who knows none."""
    language = PlantedLanguage(PlantedConfig(**LANGUAGE, depth=depth))
    joint = np.einsum("ab,abc->bc", language.contexts[0], language.tables[0])  # (last, next)
    last, marginal = joint.sum(1), joint.sum(0)

    def entropy(chances: np.ndarray) -> float:
        return float(-(chances * np.log(chances)).sum())

    return entropy(joint) - entropy(last) - language.entropy_rate, entropy(marginal) - language.entropy_rate


def run(folder: Path, name: str, seed: int) -> float:
    """Train a model; nats over the floor."""
    layers, depth, width = MODELS[name]
    out = folder / f"{name.replace(' ', '_')}_{seed}"
    overrides = {
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS // 4,
        "trainer.callbacks": [],
        "trainer.default_root_dir": str(out),
        "trainer.enable_progress_bar": False,
        "checkpoint.every_n_train_steps": STEPS,
        "model.config.vocab_size": 9,
        "model.config.num_hidden_layers": layers,
        "model.config.num_experts": 0,
        "model.config.intermediate_size": width,
        "data.sources": [{"name": "d0", "kind": "planted", "planted": {**LANGUAGE, "depth": depth}}],
        "data.seed": seed,
        "seed_everything": seed,
    }
    if not (out / "run_summary.json").exists() and (
        code := main(["fit", "--config", str(RECIPE), *as_arguments(overrides)])
    ):
        sys.exit(code)
    return json.loads((out / "run_summary.json").read_text(encoding="utf-8"))["val/nats_over_floor"]


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder, *seeds]:
            for seed in map(int, seeds or ["1"]):
                for name, (_, depth, _) in MODELS.items():
                    last, none = blind(depth)
                    found = run(Path(folder), name, seed)
                    print(f"{name}, seed {seed}: {found:.3f} over the floor; last symbol {last:.3f}, none {none:.3f}")
        case _:
            sys.exit(__doc__)
