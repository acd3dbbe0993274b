"""Numbers that a change of form must leave as they are, bit for bit, on one machine.

    python -m tests.golden write FILE [NAME ...]
    python -m tests.golden compare FILE FILE

Twenty steps in float32 of small versions of five recipes, and every probe over each tiny checkpoint (``ORACLES``).
Only the command line is used, so that the file written before a change of layout can be compared with the one after.
"""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

from moebed.cli import main
from tests.conftest import ORACLES

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FITTED = ("demo", "tiny_mixtral", "tiny_deepseekmoe", "tiny_grok", "tiny_dense")
PROBED = ("mixtral", "deepseekmoe", "grok-1", "mistral")
STEPS = 20
_LIVE_PROBES = ["balance", "norm_vs_score", "matrix_similarity"]  # all of them take longer to draw than to find
_TIMES = ("probes_cost/", "train/tokens_per_second")


def write(names: tuple[str, ...] = FITTED + PROBED) -> dict[str, dict[str, float | str | None]]:
    """The numbers of some recipes and checkpoints, by name; computed anew, on one thread."""
    torch.set_num_threads(1)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _fitted(name, Path(folder)) if name in FITTED else _probed(name, Path(folder))
    return found


def compare(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """What differs, a line each."""
    lines = [f"{name}: in one file alone" for name in sorted(before.keys() ^ after.keys())]
    for name in before.keys() & after.keys():
        for key in sorted(before[name].keys() | after[name].keys()):
            one, other = (side[name].get(key, "missing") for side in (before, after))
            if repr(one) != repr(other):  # NaN is NaN here
                lines.append(f"{name}: {key}: {one} and {other}")
    return lines


def _fitted(name: str, folder: Path) -> dict[str, float | str | None]:
    """Every logged number of a run, all that its probes said, and a digest of its weights."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    recipe["trainer"] |= {
        "default_root_dir": str(folder / "run"),
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "max_steps": STEPS,
        "val_check_interval": STEPS,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    for callback in recipe["trainer"].get("callbacks", []):
        callback["init_args"] = {"every_n_steps": STEPS, "num_sequences": 2, "probes": _LIVE_PROBES}
    recipe["checkpoint"] = {"every_n_train_steps": STEPS}
    recipe["data"] |= {
        "tokenizer": {"kind": "bytes"},
        "sequence_length": 64,
        "batch_size": 4,
        "max_validation_windows": 16,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _moebed("fit", "--config", str(folder / "recipe.yaml"))
    weights = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    digest = hashlib.sha256()
    for key, weight in sorted(weights.items()):
        digest.update(key.encode() + weight.contiguous().numpy().tobytes())
    return {**_curves(folder / "run"), **_headlines(folder / "run"), "weights": digest.hexdigest()}


def _probed(name: str, folder: Path) -> dict[str, float | str | None]:
    """Every headline of every probe; with text where the checkpoint has experts to route it to."""
    expected = ORACLES / name / "expected_dynamic_short.npz"
    text = []
    if expected.exists():
        np.save(folder / "ids.npy", np.load(expected)["input_ids"])
        text = ["--input-ids", str(folder / "ids.npy")]
    _moebed("probe", str(ORACLES / name), "--out", str(folder / "out"), *text)
    return _headlines(folder / "out")


def _moebed(*arguments: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(arguments)
    if code:
        raise RuntimeError(said.getvalue())


def _curves(run: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        f"{tag}@{event.step}": event.value
        for tag in events.Tags()["scalars"]
        if not tag.startswith(_TIMES)
        for event in events.Scalars(tag)
    }


def _headlines(out: Path) -> dict[str, float | None]:
    path = out / "summary.json"
    probes = json.loads(path.read_text(encoding="utf-8"))["probes"] if path.exists() else {}
    found: dict[str, float | None] = {}
    for probe, result in probes.items():
        for key, headline in result["headlines"].items():
            found[f"{probe}/{key}"] = headline["value"]
            for end, bound in zip(("low", "high"), headline.get("interval", ()), strict=False):
                found[f"{probe}/{key}/{end}"] = bound
    return found


def _main(arguments: list[str]) -> int:
    match arguments:
        case ["write", file, *names]:
            found = write(tuple(names) or FITTED + PROBED)
            Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{file}: {sum(map(len, found.values()))} numbers of {', '.join(found)}")
            return 0
        case ["compare", before, after]:
            files = [json.loads(Path(file).read_text(encoding="utf-8")) for file in (before, after)]
            lines = compare(files[0], files[1])
            print("\n".join(lines) or f"all {sum(map(len, files[0].values()))} numbers are equal")
            return bool(lines)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
