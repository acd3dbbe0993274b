"""Every way to upcycle a real dense model: ``python -m tests.upcycling.measure_real_model DIR``.

Upcycles SmolLM2-135M (see tests/real_model.py), trains what comes out by ``recipes/upcycled.yaml``, probes it before
and after, exports it, and prints a table of the methods whose results lie in DIR. Checkpoints are removed as it goes.
Names of methods after DIR are those to measure (``random`` to ``inter`` are partitions); ``begin`` or ``go_on`` is a
half of it alone.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.data.datamodule import TextDataModule
from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import TokenizerConfig
from moebed.model.decoder import Decoder, evaluating
from moebed.model.flops import count_parameters
from moebed.model.losses import IGNORE_INDEX, token_losses
from moebed.training.metrics import TextLoss
from tests.conftest import SHARED
from tests.real_model import real_model
from tests.upcycling.same_routing import compared, off

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "upcycled.yaml"
TEXTS = [f"--domain={path.stem}={path}" for path in sorted((SHARED / "data").glob("*.txt"))]
COPIES = ["--num-experts", "4"]  # of which a token has two, or as many neurons and FLOPs
PARTS = ["--method", "partition", "--num-experts", "8", "--by"]
# Eight parts too, of which a token has two: one that all have, and one of seven, not scaled (LLaMA-MoE-v2, 2411.15708).
RESIDUAL = ["--method", "partition", "--num-experts", "7", "--num-experts-per-tok", "1", "--output-scale", "1"]
OF_TEXT = [*TEXTS, "--sequence-length", "128", "--domain-tokens", "512"]
METHODS = {
    "copy": ["--method", "copy", *COPIES],
    "noise": ["--method", "noise", *COPIES],
    "drop": ["--method", "drop", *COPIES],
    "split": ["--method", "split", *COPIES],
    "scratch": ["--method", "scratch", *COPIES],
    "cluster": ["--method", "cluster", "--num-experts", "8"],
    "random": [*PARTS, "random"],
    "contiguous": [*PARTS, "contiguous"],
    "up_cluster": [*PARTS, "cluster"],
    "inner": [*PARTS, "inner", *OF_TEXT],
    "inner_centroid": [*PARTS, "inner", "--router", "hidden_centroid", *OF_TEXT],
    "inter": [*RESIDUAL, "--by", "inter", *OF_TEXT],
}
PROBES = "matrix_similarity,balance,norm_vs_score"
# The high-water mark begins anew once all is imported: the one of a process counts the memory of who started it too.
MEASURE = """
import json, re, sys
import torch
import moebed.upcycling.upcycle
from moebed.cli import main
read = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
code = main(sys.argv[1:])
print(json.dumps([code, read("VmHWM") - before]))
"""


def moebed(*arguments: object, code: str = "import sys; from moebed.cli import main; sys.exit(main())") -> str:
    """Call a command in a process of its own, beside the data that recipes name; returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def upcycled(dense: Path, out: Path, *options: str) -> tuple[float, int]:
    """Upcycle; returns seconds, the interpreter's start included, and bytes of memory beyond what imports took."""
    begin = time.perf_counter()
    said = moebed("upcycle", dense, "--out", out, *options, code=MEASURE)
    code, memory = json.loads(said.splitlines()[-1])
    assert code == 0
    return time.perf_counter() - begin, memory


def data_of(tokenizer: Path) -> TextDataModule:
    """The text of the recipe, in a model's own tokens."""
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]
    text = SHARED / "data"
    sources = [SourceConfig(**{**one, "path": str(text / Path(one["path"]).name)}) for one in content["sources"]]
    windows = {key: content[key] for key in ("sequence_length", "batch_size", "max_validation_windows")}
    data = TextDataModule(sources, TokenizerConfig("auto", path=str(tokenizer)), **windows)
    data.setup()
    return data


@torch.no_grad()
def held_out(decoder: Decoder, data: TextDataModule) -> dict[str, float]:
    """Loss in nats a token, and bits per byte, of the validation text."""
    found = TextLoss(len(data.domains))
    with evaluating(decoder):
        for batch in data.val_dataloader():
            nats = token_losses(decoder(batch["input_ids"]).logits, batch["labels"]).sum(dim=1)
            tokens = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
            found.update(nats, tokens, batch["label_bytes"].sum(dim=1), batch["domain"])
    numbers = found.compute()
    return {name: float(numbers[name]) for name in ("loss", "bits_per_byte")}


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ours or of transformers' model."""
    return model.eval()(ids).logits


def theirs(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def is_of_transformers(folder: Path) -> bool:
    """Whether an exported folder is of a family that transformers has: residual experts are of none."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] != "moebed"


def probed(checkpoint: Path, out: Path) -> dict[str, float]:
    """Headlines of some probes on 1,024 tokens of each domain."""
    sizes = ["--sequence-length", 128, "--domain-tokens", 1024]
    moebed("probe", checkpoint, "--out", out, "--probes", PROBES, *sizes, *TEXTS)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found = {name: one["headlines"] for name, one in summary["probes"].items()}
    return {f"{name}.{key}": one["value"] for name, headlines in found.items() for key, one in headlines.items()}


def begin(method: str, folder: Path) -> dict[str, Any]:
    """Upcycle: seconds, memory, and how the new model begins. Its checkpoint stays in ``folder``."""
    dense, moe = real_model(), folder / method / "moe"
    seconds, memory = upcycled(dense, moe, *METHODS[method])
    decoder, data = load_decoder(Checkpoint.open(moe)), data_of(dense)
    ids = data.probe_batch(2)["input_ids"]
    wanted = logits_of(theirs(dense), ids)
    total, active = count_parameters(decoder.config)
    return {
        "parameters": total,
        "active": active,
        "upcycle_seconds": seconds,
        "upcycle_bytes": memory,
        "logits_off": off(logits_of(decoder, ids), wanted),
        "before": held_out(decoder, data),
    }


def go_on(method: str, folder: Path) -> dict[str, Any]:
    """Train what :func:`begin` left, probe it before and after, export it; its checkpoints are removed."""
    place, dense = folder / method, real_model()
    moe, run = place / "moe", place / "run"
    result: dict[str, Any] = {"probes_before": probed(moe, place / "probes_before")}
    started = time.perf_counter()
    moebed("fit", "--config", RECIPE, "--config", moe / "start.yaml", "--trainer.default_root_dir", run)
    result["fit_seconds"] = time.perf_counter() - started
    checkpoint = run / "checkpoints" / "last.ckpt"
    decoder, data = load_decoder(Checkpoint.open(checkpoint)), data_of(dense)
    result["run"] = json.loads((run / "run_summary.json").read_text(encoding="utf-8"))
    result["after"] = held_out(decoder, data)
    result["probes_after"] = probed(checkpoint, place / "probes_after")
    moebed("export", checkpoint, "--out", place / "exported")
    if is_of_transformers(place / "exported"):
        result["exported"] = compared(decoder, theirs(place / "exported"), data.probe_batch(4)["input_ids"])
    shutil.rmtree(place)
    return result


def table(folder: Path) -> str:
    """A row a method whose beginning was measured."""
    lines = ["| method | parameters, active | upcycled in, memory | first loss | after | fit |", "|" + "---|" * 6]
    for method in METHODS:
        if not (folder / f"{method}.json").exists():
            continue
        one = json.loads((folder / f"{method}.json").read_text(encoding="utf-8"))
        if "before" not in one:
            continue
        after = f"{one['after']['loss']:.3f} | {one['fit_seconds']:.0f} s" if "after" in one else "|"
        lines.append(
            f"| `{method}` | {one['parameters'] / 1e6:.0f} M, {one['active'] / 1e6:.0f} M "
            f"| {one['upcycle_seconds']:.0f} s, {one['upcycle_bytes'] / 1e6:.0f} MB "
            f"| {one['before']['loss']:.3f} | {after} |"
        )
    return "\n".join(lines)


def main(folder: Path, stages: Mapping[str, Callable[[str, Path], dict[str, Any]]], methods: Sequence[str]) -> None:
    """Measure some methods; what was found of each is kept as it is found."""
    folder.mkdir(parents=True, exist_ok=True)
    for method in methods:
        kept = folder / f"{method}.json"
        for name, stage in stages.items():
            found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
            found |= stage(method, folder)
            kept.write_text(json.dumps(found, indent=2), encoding="utf-8")
            print(method, name, "done", flush=True)
    print(table(folder))


if __name__ == "__main__":
    known = {"begin": begin, "go_on": go_on}
    chosen = {name: stage for name, stage in known.items() if name in sys.argv[2:]} or known
    main(Path(sys.argv[1]).absolute(), chosen, [name for name in sys.argv[2:] if name in METHODS] or list(METHODS))
