"""The recipe of a run that takes a second, on one CPU and text that is made up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def probing(every: int, sequences: int = 2, **arguments: Any) -> list[dict[str, Any]]:
    """Callbacks of a recipe: probes at steps."""
    arguments = {"every_n_steps": every, "num_sequences": sequences, **arguments}
    return [{"class_path": "probes.ProbeCallback", "init_args": arguments}]


def made_up_text(paragraphs: int = 120) -> str:
    """Paragraphs that differ from each other."""
    return "\n\n".join(f"{i}: the cat sat on the mat and saw {i}. " * 6 for i in range(paragraphs))


def small_recipe(folder: Path, text: str | None = None, **sections: Mapping[str, Any] | None) -> dict[str, Any]:
    """Content of a recipe of a two-layer MoE on bytes; its text lies in ``folder``, and its cache.

    Args:
        folder: Where to.
        text: What to train on; made up if not given.
        sections: Settings by section, such as ``trainer={"max_steps": 2}``, which go before those here; ``config`` is
            that of the model. A section that is None is left out.
    """
    (folder / "text.txt").write_text(made_up_text() if text is None else text, encoding="utf-8")
    trainer = {
        "default_root_dir": str(folder / "run"),
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    config = {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    content: dict[str, Any] = {
        "seed_everything": 7,
        "trainer": trainer,
        "checkpoint": {"every_n_train_steps": 2},
        "samples": {"prompt_tokens": 4, "new_tokens": 4},
        "model": {"optimizer": {"warmup_steps": 2}, "config": {**config, **(sections.pop("config", None) or {})}},
        "data": {
            "sources": [{"name": "text", "kind": "files", "path": str(folder / "text.txt")}],
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 32,
            "batch_size": 2,
            "max_validation_windows": 4,
            "cache_dir": str(folder / "cache"),
        },
    }
    for name, settings in sections.items():
        if settings is None:
            del content[name]
        else:
            content[name] |= settings
    return content


def write_recipe(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write ``recipe.yaml``."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    return path
