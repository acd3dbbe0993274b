"""A small run, laid out over ranks in any way, and what it logged."""

from pathlib import Path

import yaml

from moebed.data.corpus import embedded_documents

ROOT = Path(__file__).resolve().parents[2]

# Ranks and the options that lay a run out over them; the global batch is 8 sequences in each.
LAYOUTS = {
    "1 process": (1, []),
    "DDP-2": (2, ["--trainer.strategy", "ddp"]),
    "DDP-4": (4, ["--trainer.strategy", "ddp"]),
    "FSDP2-2": (2, ["--parallel.data", "2"]),
    "replicated-2": (2, ["--parallel.data", "2", "--parallel.shard", "false"]),
    "EP-2": (2, ["--parallel.expert", "2"]),
    "EP-4": (4, ["--parallel.expert", "4"]),
    "FSDP2×EP": (4, ["--parallel.data", "2", "--parallel.expert", "2"]),
    "EP-2, gathered": (2, ["--parallel.expert", "2", "--parallel.exchange", "all_gather"]),
}


def recipe(folder: Path, steps: int, **model) -> Path:
    """A recipe of a small MoE with a shared expert, probes and global balancing, in float32."""
    next(embedded_documents("prose"))  # gathered once a process, which takes seconds: here, and not in each fork of it
    content = yaml.safe_load((ROOT / "recipes" / "tiny_mixtral.yaml").read_text())
    content["trainer"] |= {
        "accelerator": "cpu",
        "precision": 32,
        "max_steps": steps,
        "val_check_interval": 10,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    content["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 10, "num_sequences": 3}
    content["checkpoint"] = {"every_n_train_steps": 5}
    content["samples"] = {"prompt_tokens": 2, "new_tokens": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    content["model"]["config"] |= sizes | {
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_shared_experts": 1,
        "router_aux_loss_scope": "global",
        "router_z_loss_coef": 0.001,
        "vocab_size": 512,
        **model,
    }
    content["data"] |= {
        "tokenizer": {"kind": "bpe", "vocab_size": 512},
        "sources": [{"name": domain, "max_bytes": 60_000} for domain in ("code", "prose", "math")],
        "sequence_length": 32,
        "validation_fraction": 0.15,  # of few documents, which every version of Python has others of
        "max_validation_windows": 4,
        "cache_dir": str(folder / "cache"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(recipe: Path, run: Path, layout: str, *options: str) -> tuple[list[str], int]:
    """Arguments of `moebed fit` in a layout, and its number of ranks."""
    ranks, options_of_layout = LAYOUTS[layout]
    fixed = ["--trainer.default_root_dir", str(run), "--trainer.devices", str(ranks)]
    batch = ["--data.batch_size", str(8 // ranks)]
    return ["fit", "--config", str(recipe), *fixed, *batch, *options_of_layout, *options], ranks


def curves(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar by step; of a step that was written twice, the later value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted((run / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found
