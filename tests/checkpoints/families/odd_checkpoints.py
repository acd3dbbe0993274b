"""Checkpoints in which one setting or one tensor is odd, and what transformers and moebed make of each."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints.families import FAMILIES
from moebed.checkpoints.families.declared import HARMLESS_SETTINGS
from moebed.errors import UserError
from moebed.model.config import ModelConfig

COMMON = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = {**MOE, "moe_intermediate_size": 16, "norm_topk_prob": False}
FINE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.0}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
          "v_head_dim": 6}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {**LOCAL, "head_dim": 8},  # left out, its class has it null
    "olmoe": {**MOE, "norm_topk_prob": False},
    "qwen2_moe": {**SPARSE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": {**SPARSE, "head_dim": 8, "mlp_only_layers": [0]},
    "granitemoe": {**LOCAL, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 20},
    "glm4_moe": {**FINE, "head_dim": 8, "use_qk_norm": True},
    "dots1": FINE,
    "minimax_m2": {**LOCAL, "head_dim": 8, "rotary_dim": 4},
    "deepseek_v2": {**FINE, **LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**FINE, **LATENT},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
                     "tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "llama": {},
    "qwen2": {},
    "gpt_oss": {**LOCAL, "head_dim": 8, "sliding_window": 5, "initializer_range": 0.7},
    "flex_olmo": {**MOE, "norm_topk_prob": True},
    "phimoe": {**LOCAL, "attention_bias": True, "lm_head_bias": True},
}  # fmt: skip
# Endings of cases that say what was said before: the default, or the value of another place.
SAME = (" left out", "=null", "=null added", "={}", "={} added", "partial_rotary_factor=1.0 added",
        'rope_parameters={"rope_type": "default"}')  # fmt: skip
IDS = torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(2))
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {"rope_type": "longrope", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 8,
            "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}  # fmt: skip
# Another value of a setting that is not its kind's: where only some mean anything, or the file leaves it null.
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"],
    "sliding_window": [5, 0, 64],
    "head_dim": [8, 16, 4],
    "clip_qkv": [0.05, 8.0],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2, ["sliding_attention"] * 2],
    "mlp_only_layers": [[], [1], [0, 1], [7], None],
    "num_key_value_heads": [4, 1, None],
    "dtype": ["bfloat16", "float16"],
    "problem_type": ["regression"],
    "architectures": [["OtherForCausalLM"]],
    "decoder_sparse_step": [2, 0, 3],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 7.0},
        {"rope_theta": 7.0},
        {"rope_type": "default"},
        {},
        None,
        YARN,
        {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5},
        {**YARN, "beta_fast": None, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
        {**YARN, "mscale": 0, "mscale_all_dim": 1.0, "truncate": None},
        {**YARN, "factor": None},
        {**YARN, "factor": "4"},
        {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 300.0},
        LONGROPE,
        {**LONGROPE, "factor": None, "attention_factor": 0.5},
        {**LONGROPE, "original_max_position_embeddings": 32},
        {**LONGROPE, "long_factor": [1.0]},
        {"rope_type": "longrope", "rope_theta": 300.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"rope_type": "proportional", "rope_theta": 300.0, "factor": 4.0},
        {"rope_type": "linear", "rope_theta": 300.0},
        {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0, "beta_fast": 2.0},
        {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 300.0, "factor": 4.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_type": "llama3", "rope_theta": 30.0, "factor": 8.0, "low_freq_factor": 0.1, "high_freq_factor": 0.5,
         "original_max_position_embeddings": 4},
    ],
}  # fmt: skip
LLAMA3 = VALUES["rope_parameters"][-1]
# Settings that a class does not list: those of older versions, those that its code asks for, and others' own.
ADDED: dict[str, list[Any]] = {
    "rope_theta": [7.0, None, "many"],
    "rope_scaling": [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {"type": "linear", "factor": 4.0},
        {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        {key: value for key, value in LONGROPE.items() if key != "rope_theta"},
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        None,
        {},
    ],
    "original_max_position_embeddings": [4],
    "partial_rotary_factor": [0.5, 1.0],
    "head_dim": [8, 4],
    "sliding_window": [5],
    "layer_types": [["full_attention", "sliding_attention"]],
    "num_local_experts": [4, 3],
    "num_experts": [4, 3],
    "attention_bias": [True],
    "mlp_bias": [True],
    "clip_qkv": [0.05],
    "torch_dtype": ["bfloat16"],
    "auto_map": [{"AutoConfig": "configuration_other.OtherConfig"}],
    "quantization_config": [{"quant_method": "fp8"}],
    "quantization": [{"group_size": 32, "bits": 4}],
    "compression_config": [{"quant_method": "compressed-tensors"}],
    "residual_multiplier": [0.22],
    "scoring_func": ["sigmoid"],
    "routed_scaling_factor": [2.5],
    "text_config": [{"hidden_size": 64}],
    "of_a_later_version": [True, [1, 2], {"nested": {"deep": 1}}],
}


class Case(NamedTuple):
    """One odd thing: what it is called, the words of which a refusal or a note has one, and the folder's content."""

    name: str
    words: tuple[str, ...]
    settings: dict[str, Any]
    tensors: Callable[[dict[str, torch.Tensor]], None] | None = None


def write_base(family: str, folder: Path) -> transformers.PreTrainedConfig:
    """A tiny model as transformers writes it."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **deepcopy(COMMON | SIZES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(folder)
    return config


def others(key: str, value: Any) -> list[Any]:
    """Other values of a setting, by its kind; null among them."""
    if key in VALUES:
        return [other for other in VALUES[key] if other != value]
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, 2 * value, 0, None, f"{value}"]
    if isinstance(value, float):
        return [value * 4 + 0.5, 0.0, None]
    if isinstance(value, str):
        return ["other", None]
    if isinstance(value, list):
        return [[], None]
    return [3, True] if value is None else [None]


def setting_cases(config: transformers.PreTrainedConfig, settings: dict[str, Any]) -> Iterator[Case]:
    """Each setting of a class with each of its other values, or left out; and settings that the class does not list."""
    listed = [field.name for field in dataclasses.fields(config)]
    two = FAMILIES[config.model_type].same
    names = {key: (key,) for key in (*listed, *settings, *ADDED)}
    names |= {one: pair for pair in two.items() for one in pair}
    for key in listed:
        for value in others(key, settings.get(key, getattr(config, key))):
            yield Case(f"{key}={json.dumps(value)}", names[key], {**settings, key: value})
    for key in settings:
        if key not in ("model_type", "transformers_version"):
            yield Case(f"{key} left out", names[key], {name: value for name, value in settings.items() if name != key})
    for key, values in ADDED.items():
        for value in values if key not in listed else ():
            yield Case(f"{key}={json.dumps(value)} added", names[key], {**settings, key: value})


def tensor_cases(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[Case]:
    """Each kind of tensor missing, of another shape or type, holding NaN, or with a bias; and tensors beside them."""
    kinds = {name: name for name in tensors if "layers" not in name or ".layers.1." in name}
    kinds = {name: name for name in kinds if "experts." not in name or "experts.1." in name}
    for name in kinds:

        def case(kind: str, change: Callable[[dict[str, torch.Tensor]], None], name: str = name) -> Case:
            return Case(f"{name} {kind}", (name, name.replace(".weight", ".bias")), settings, change)

        yield case("missing", lambda found, name=name: found.pop(name))
        yield case("cut", lambda found, name=name: found.update({name: found[name][1:].clone()}))
        yield case("nan", lambda found, name=name: found[name].view(-1)[3:4].fill_(float("nan")))
        yield case("bfloat16", lambda found, name=name: found.update({name: found[name].bfloat16()}))
        yield case("renamed", lambda found, name=name: found.update({name + "_": found.pop(name)}))
        if tensors[name].ndim == 2 and "layers" in name and name.endswith(".weight"):
            bias = name.replace(".weight", ".bias")
            if bias not in tensors:
                yield case(
                    "bias", lambda found, name=name, bias=bias: found.update({bias: torch.ones(len(found[name]))})
                )
    for name, value in {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.ones(4),
        "model.layers.1.self_attn.sinks": torch.ones(4),
        "model.layers.2.input_layernorm.weight": torch.ones(32),
        "model.layers.1.input_layernorm.weight_scale": torch.ones(1),
        "model.extra": torch.ones(3),
        "score.weight": torch.ones(2, 32),
    }.items():
        yield Case(
            f"{name} added", (name,), settings, lambda found, name=name, value=value: found.update({name: value})
        )


def classless_cases(family: str, settings: dict[str, Any]) -> Iterator[Case]:
    """Each setting of a family that transformers has no class for, with each of its other values or left out."""
    found = FAMILIES[family]
    added = {
        **ADDED,
        **{key: [3] for key in found.harmless},
        **{key: others(key, v) for key, v in found.defaults.items()},
    }
    added |= {key: [3] for key in sorted(HARMLESS_SETTINGS - {"model_type", "auto_map"})}
    for key, value in settings.items():
        if key not in ("model_type", *HARMLESS_SETTINGS):
            yield Case(f"{key} left out", (key,), {name: one for name, one in settings.items() if name != key})
            for other in VALUES.get(key, others(key, value)):
                if other != value:
                    yield Case(f"{key}={json.dumps(other)}", (key,), {**settings, key: other})
    for key, values in added.items():
        for value in values if key not in settings else ():
            yield Case(f"{key}={json.dumps(value)} added", (key,), {**settings, key: value})


def tied_cases(settings: dict[str, Any]) -> Iterator[Case]:
    """Flag and files that do not agree on whether the head is the embedding."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = {**settings, "tie_word_embeddings": True}

    def same(found: dict[str, torch.Tensor]) -> None:
        found[head] = found[embedding].clone()

    words = ("tie_word_embeddings", head, embedding)
    yield Case("tied, both stored and different", words, tied, lambda found: None)
    yield Case("tied, both stored and equal", words, tied, same)
    yield Case("tied, embedding alone", words, tied, lambda found: found.pop(head))
    yield Case("tied, head alone", words, tied, lambda found: found.pop(embedding))
    yield Case("not tied, embedding alone", words, settings, lambda found: found.pop(head))
    yield Case("not tied, head alone", words, settings, lambda found: found.pop(embedding))


def build(case: Case, base: Path, folder: Path) -> Path:
    """The folder of a case; its weights are the base's own file where they are not changed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.settings))
    if case.tensors is None:
        os.link(base / "model.safetensors", folder / "model.safetensors")
        return folder
    tensors = load_file(base / "model.safetensors")
    case.tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the few tokens that every case is asked for."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def by_transformers(folder: Path) -> torch.Tensor | str:
    """The logits, or why there are none: it fails, or would begin with random weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            found = logits_of(model)
    except Exception as error:  # noqa: BLE001 - whatever it is, there are no logits
        return f"{type(error).__name__}: {error}"
    if told["missing_keys"] or told.get("mismatched_keys"):
        return f"random weights for {sorted(told['missing_keys'])[:1]}"
    return found if found.isfinite().all() else "NaN"


class Base(NamedTuple):
    """The checkpoint in which nothing is odd, as moebed reads it."""

    logits: torch.Tensor
    config: ModelConfig

    @classmethod
    def of(cls, folder: Path) -> Base:
        checkpoint = Checkpoint.open(folder)
        return cls(logits_of(load_decoder(checkpoint)), checkpoint.config)


class Outcome(NamedTuple):
    """What became of a case: used, harmless, noted, refused, wrong or no case at all, and what was said."""

    kind: str
    said: str


def judge(case: Case, folder: Path, base: Base, theirs: torch.Tensor | str | None) -> Outcome:
    """What moebed makes of a case, held against transformers' logits or, without a class, against what is declared.

    Args:
        case: The case.
        folder: Its checkpoint.
        base: The checkpoint in which nothing is odd.
        theirs: transformers' logits, or why it has none; None of a family for which it has no class.
    """
    try:
        checkpoint = Checkpoint.open(folder)
        found = logits_of(load_decoder(checkpoint))
    except UserError as error:
        return _refusal(case, folder, str(error))
    named = [note for note in checkpoint.notes if any(word in note for word in case.words)]
    changed = not torch.equal(found, base.logits)
    declared = set(case.words) <= HARMLESS_SETTINGS | set(FAMILIES[checkpoint.family.model_type].harmless)
    if isinstance(theirs, str) and declared:
        return Outcome("no case", f"transformers itself does not take it: {theirs}")
    if theirs is None:
        same = case.name.endswith(SAME)
        used = changed or checkpoint.config != base.config
        kind = "used" if used else "noted" if named else "harmless" if declared or same else "wrong"
        return Outcome(kind, "; ".join(named) or "it changes nothing, and nothing is said")
    if isinstance(theirs, str):
        return Outcome("noted" if named else "wrong", f"read, although transformers: {theirs}")
    distance = (found - theirs).abs().max().item()
    if distance > 1e-4 * theirs.abs().max().item():
        return Outcome("wrong", f"logits differ from transformers' by {distance:.2g}; notes {checkpoint.notes}")
    if named:
        return Outcome("noted", named[0])
    return Outcome("used" if changed else "harmless", "")


def _refusal(case: Case, folder: Path, said: str) -> Outcome:
    """A refusal names what is odd, or the tensor that does not fit the setting; so does the note for weights alone."""

    def names(text: str) -> bool:
        return any(word in text for word in case.words) or ("tensor" in text and "config" in text)

    if "\n" in said or not names(said):
        return Outcome("wrong", f"refused without its name: {said}")
    try:
        notes = Checkpoint.open(folder, runs=False).notes
    except UserError:
        return Outcome("refused", said)
    if "holds NaN" in said or any(names(note) for note in notes):
        return Outcome("refused", said)
    return Outcome("wrong", f"weights alone are looked at without a note; whole: {said}")
