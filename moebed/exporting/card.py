"""The model card: what the model is, what it was trained on, the run's closing numbers, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.run import is_run, read_run, run_folder
from moebed.model.config import ModelConfig
from moebed.model.flops import count_parameters


@dataclass(frozen=True)
class Run:
    """What a run's folder tells of a checkpoint; empty where there is no such folder.

    Args:
        name: The folder's name.
        step: Optimizer steps of the checkpoint.
        recipe: Its ``config.yaml``.
        numbers: Its ``run_summary.json``: numbers, and what they were computed in.
    """

    name: str = ""
    step: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Path) -> Run:
        """What lies in the folder of the run that a ``.ckpt`` file belongs to."""
        if not is_run(checkpoint):
            return cls()
        step = read_run(checkpoint).get("global_step")
        folder = run_folder(checkpoint)
        if not (folder / "config.yaml").is_file():
            return cls(step=step)
        recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        summary = folder / "run_summary.json"
        numbers = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
        return cls(folder.name, step, recipe if isinstance(recipe, dict) else {}, numbers)

    @property
    def sampling(self) -> dict[str, Any]:
        """How the run sampled text while it trained, as settings of a generation config."""
        samples = self.recipe.get("samples") or {}
        if not samples.get("temperature"):
            return {}
        return {"do_sample": True, "temperature": samples["temperature"], "top_k": samples["top_k"]}


def model_card(
    name: str, config: ModelConfig, family: Family, in_transformers: bool, run: Run, has_tokenizer: bool
) -> str:
    """The text of README.md.

    Args:
        name: What the model is called.
        config: The model.
        family: In whose layout it is written.
        in_transformers: Whether transformers loads it.
        run: What is known of its training.
        has_tokenizer: Whether a tokenizer lies beside it.
    """
    head = {"tags": ["moebed", *(["mixture-of-experts"] if config.moe_layers else [])]}
    if in_transformers:
        head |= {"library_name": "transformers", "pipeline_tag": "text-generation"}  # type: ignore[dict-item]
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {name}", _model(config, family)]
    if run.recipe:
        parts.append(_training(run))
    if run.numbers:
        parts.append(_numbers(run))
    parts.append(_loading(in_transformers, has_tokenizer))
    return "\n\n".join(parts) + "\n"


def _table(head: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _each(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _of_machine(place: str) -> str:
    """A path as the card says it: where it begins at the root, its name alone, as a card is read elsewhere."""
    return Path(place).name if Path(place).is_absolute() else place


def _model(config: ModelConfig, family: Family) -> str:
    total, active = count_parameters(config)
    kind = "A Mixture-of-Experts" if config.moe_layers else "A dense"
    rows = {
        "layout": f"{family.model_type} ({family.architecture})",
        "parameters": f"{total:,}",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": f"{config.num_attention_heads} ({config.num_key_value_heads} for keys and values)",
        "vocabulary": config.vocab_size,
        "longest sequence": config.max_position_embeddings,
    }
    if config.moe_layers:
        rows |= {
            "parameters active for a token": f"{active:,}",
            "routed experts of a layer": _each(config.num_experts),
            "experts of a token": _each(config.num_experts_per_tok),
            "width of an expert": _each(config.moe_intermediate_size),
            "shared experts of a layer": _each(config.num_shared_experts),
            "router": config.router + (", weights of the chosen made to sum to 1" if config.norm_topk_prob else ""),
        }
    if config.shared_expert_intermediate_size is not None:
        rows["width of the shared expert"] = config.shared_expert_intermediate_size
    if config.hyper_experts is not None:
        rows["adapters beside the experts"] = (
            f"{config.hyper_experts.adapters}, {config.hyper_experts.adapter_size} wide"
        )
    if len(config.moe_layers) < config.num_hidden_layers:
        rows["width of a dense FFN"] = config.intermediate_size
    return f"{kind} language model, trained with moebed.\n\n{_table('model', rows)}"


def _training(run: Run) -> str:
    model, data, trainer = (run.recipe.get(key) or {} for key in ("model", "data", "trainer"))
    optimizer, tokenizer = model.get("optimizer") or {}, data.get("tokenizer") or {}
    rows = {
        "optimizer steps": run.step,
        "sequences of a batch and process": data.get("batch_size"),
        "batches of a step": trainer.get("accumulate_grad_batches"),
        "tokens of a sequence": data.get("sequence_length"),
        "precision": trainer.get("precision"),
        "learning rate": optimizer.get("learning_rate"),
        "schedule": optimizer.get("schedule"),
        "weights at the start": _of_machine(str(model.get("init_from") or "random")),
        "seed": run.recipe.get("seed_everything"),
        "tokenizer": tokenizer.get("kind"),
    }
    known = {key: value for key, value in rows.items() if value is not None}
    return f"## Training\n\n{_table('training', known)}\n\n{_data(data.get('sources'))}"


def _data(sources: list[dict[str, Any]] | None) -> str:
    if not sources:
        return (
            "Data: the corpus that moebed builds from the Python installation (code, prose) and generates (arithmetic)."
        )
    lines = []
    for source in sources:
        paths = source.get("path") or [source["name"]]
        where = _each([_of_machine(str(path)) for path in ([paths] if isinstance(paths, str) else paths)])
        chosen = [str(source[key]) for key in ("subset", "split", "revision") if source.get(key)]
        detail = f" ({', '.join(chosen)})" if source.get("kind") == "hub" and chosen else ""
        weight = f", weight {source['weight']}" if source.get("weight") is not None else ""
        lines.append(f"- {source['name']}: {source.get('kind', 'embedded')} {where}{detail}{weight}")
    return "Data:\n\n" + "\n".join(lines)


def _numbers(run: Run) -> str:
    step = run.numbers.get("step")
    rows = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in run.numbers.items()}
    rows.pop("step", None)
    text = f"## Numbers\n\nAt the end of the run, after {step} optimizer steps:\n\n{_table('quantity', rows)}"
    if step != run.step:
        text += f"\n\nThis checkpoint is of step {run.step}, for which these numbers do not hold."
    return text


def _loading(in_transformers: bool, has_tokenizer: bool) -> str:
    if not in_transformers:
        lines = ["from moebed.checkpoints import load_decoder", "", 'decoder = load_decoder("FOLDER")']
        end = "transformers has no class for this layout; `moebed probe FOLDER --out DIR` reads it too."
    else:
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += ['model = AutoModelForCausalLM.from_pretrained("FOLDER")']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")'] if has_tokenizer else []
        end = "`moebed probe FOLDER --out DIR` reads it too."
    code = "\n".join(lines if has_tokenizer or not in_transformers else [lines[0].split(",")[0], *lines[1:]])
    return f"## Loading\n\n```python\n{code}\n```\n\n{end}"
