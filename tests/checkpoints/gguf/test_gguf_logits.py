"""GGUF files of tiny models, written by transformers and the gguf package: logits, in every form that files have."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import transformers
from gguf_files import packed, to_pairs, unpacked, write_gguf

from moebed.checkpoints import Checkpoint, load_decoder, write_checkpoint
from moebed.checkpoints.gguf import entries as gguf_entries
from moebed.checkpoints.gguf import model as gguf_model
from moebed.checkpoints.gguf.rounding import cosine_factor, cosine_noise
from moebed.checkpoints.gguf.types import TYPES
from moebed.errors import UserError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder

# Rows of 256 numbers, a block of the K types.
COMMON = {
    "vocab_size": 80,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-4,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
SPARSE = {**MOE, "moe_intermediate_size": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, **ROPE}),
    "mixtral-wide-heads": ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 128}),
    "mistral": ("mistral", {"sliding_window": 4, **ROPE}),
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", ROPE),
    "qwen2_moe": ("qwen2_moe", {**SPARSE, "shared_expert_intermediate_size": 512, "norm_topk_prob": False, **ROPE}),
    "qwen3_moe": ("qwen3_moe", {**SPARSE, "head_dim": 128, "norm_topk_prob": True, **ROPE}),
    "olmoe": ("olmoe", {**MOE, "norm_topk_prob": False, **ROPE}),
}
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_K"]
IDS = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))


def model_of(case):
    """A tiny model of transformers."""
    model_type, changes = CASES[case]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norm scales too, which start as 0 and 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
    return model


def saved(case, folder):
    model_of(case).save_pretrained(folder)
    return folder


def extras(case):
    """What converters write of some models beside their matrices."""
    if case == "mistral":
        return {"metadata": {"llama.attention.sliding_window": 4}}
    if case == "llama-3":
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](model_of(case).config, "cpu")
        plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
        return {"more": {"rope_freqs.weight": (plain / scaled).numpy()}}
    return {}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def same(found, wanted, within=1e-5):
    torch.testing.assert_close(found, wanted, rtol=0, atol=within * wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_float32_gives_the_logits_of_transformers(case, tmp_path):
    path = write_gguf(saved(case, tmp_path / "folder"), tmp_path / "model.gguf", **extras(case))
    same(logits(load_decoder(path)), logits(model_of(case)))


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=() if number % 4 == at or case == "mixtral" else pytest.mark.slow)
        for number, case in enumerate(CASES)
        for at, kind in enumerate(KINDS[1:])
    ],
)
def test_other_types_give_the_logits_of_what_was_packed(case, kind, tmp_path):
    """transformers computes with the numbers that the gguf package makes of the packed ones, rounded as ours are."""
    path = write_gguf(saved(case, tmp_path / "folder"), tmp_path / "model.gguf", kind, **extras(case))
    model = model_of(case)
    decoder = load_decoder(path)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    paired = case.startswith(("mixtral", "mistral", "llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not re.search(r"mlp\.gate\.|shared_expert_gate", name):
                turn = heads.get(name.split(".")[-2]) if paired else None
                parameter.copy_(left_of(parameter, kind, turn))
    same(logits(decoder), logits(model))


def left_of(parameter, kind, heads):
    """A matrix as its packed numbers have it; those of queries and keys are packed in the order of pairs."""
    values = parameter.numpy()
    if heads:
        whole = unpacked(to_pairs(values, heads), kind)
        rows = np.argsort(to_pairs(np.arange(len(values)), heads))
        values = whole[rows]
    else:
        values = unpacked(values, kind)
    return torch.from_numpy(values) if kind == "F16" else torch.from_numpy(values).bfloat16().float()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_within_the_stated_error(kind, tmp_path):
    path = write_gguf(saved("mixtral", tmp_path / "folder"), tmp_path / "model.gguf", kind)
    stated = next(one.error for one in TYPES.values() if one.name == kind)
    for found, wanted in zip(
        load_decoder(path).named_parameters(), load_decoder(tmp_path / "folder").parameters(), strict=True
    ):
        error = ((found[1] - wanted).norm() / wanted.norm()).item()
        if wanted.ndim == 1 or "router" in found[0] or kind == "F32":
            assert error == 0, found[0]
        else:
            assert error < 1.1 * max(stated, 0.002), found[0]
            assert error > 0.9 * stated, found[0]


def test_the_rows_of_queries_and_keys_are_what_the_logits_depend_on(tmp_path, monkeypatch):
    """The wrong order makes a model that computes, finitely, something else."""
    path = write_gguf(saved("mixtral", tmp_path / "folder"), tmp_path / "model.gguf")
    right = logits(load_decoder(path))
    llama = gguf_model.ARCHITECTURES["llama"]
    monkeypatch.setitem(gguf_model.ARCHITECTURES, "llama", dataclasses.replace(llama, pairs=False))
    wrong = logits(load_decoder(path))
    assert wrong.isfinite().all()
    assert (wrong - right).abs().max() > 0.1 * right.abs().max()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_any_rows_are_read_and_unpacked_a_few_at_a_time(kind, tmp_path, monkeypatch):
    """Of an expert's matrix among others, and of queries, whose rows are turned a head of 64 at a time."""
    path = write_gguf(saved("mixtral", tmp_path / "folder"), tmp_path / "model.gguf", kind)
    layer = "model.layers.1."
    for name in ("self_attn.q_proj.weight", "block_sparse_moe.experts.2.w3.weight"):
        entry = Checkpoint.open(path).entries[layer + name]
        at_once, few = torch.empty(entry.shape, dtype=entry.dtype), torch.empty(71, 256, dtype=entry.dtype)
        entry.read(0, at_once)
        monkeypatch.setattr(gguf_entries, "_AT_A_TIME", 30 * 256)
        for first in (0, 50, 256 - 71):
            entry.read(first, few)
            assert torch.equal(few, at_once[first : first + 71])
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *(("each_expert", "F32"), ("fused", "F32"), ("files", "F32"), ("fused", "Q4_K")),
        *(pytest.param(form, "Q4_K", marks=pytest.mark.slow) for form in ("each_expert", "files")),
    ],
)
def test_other_forms_hold_the_same_model(kind, form, tmp_path):
    folder = saved("mixtral", tmp_path / "folder")
    usual = write_gguf(folder, tmp_path / "usual.gguf", kind)
    options = {"per_file": 5} if form == "files" else {form: True}
    other = write_gguf(folder, tmp_path / "other.gguf", kind, **options)
    if form == "files":
        last = sorted(tmp_path.glob("other-*.gguf"))[-1]
        assert last != other
        other = last  # any of them stands for all
    for found, wanted in zip(load_decoder(other).parameters(), load_decoder(usual).parameters(), strict=True):
        assert torch.equal(found, wanted)


def small(model_type):
    """A config of a family that transformers has no class for."""
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_act": "gelu_tanh", "post_norms": True,
               "attn_logit_softcapping": 30.0, "norm_topk_prob": False, "tie_word_embeddings": True,
               "attention_multiplier": 0.088, "embedding_multiplier": 7.0, "logits_multiplier": 0.57,
               "num_key_value_heads": 2}  # fmt: skip
    if model_type == "deepseek":
        changes = {"num_experts": [0, 4, 4], "num_experts_per_tok": 2, "num_shared_experts": 2, "norm_topk_prob": False}
    sizes = {"vocab_size": 80, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
             "max_position_embeddings": 64, "intermediate_size": 512, "moe_intermediate_size": 256,
             "initializer_range": 0.1}  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
@pytest.mark.parametrize("model_type", ["deepseek", "grok-1"])
def test_families_without_a_class_in_transformers(model_type, kind, tmp_path):
    """Against the same weights in safetensors, which oracles of their own hold to the paper's models."""
    torch.manual_seed(2)
    decoder = Decoder(small(model_type)).eval()
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    write_checkpoint(decoder, model_type, tmp_path / "folder", torch.float32)
    path = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", kind)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.family.model_type == model_type
    found = load_decoder(checkpoint)
    if kind == "F32":
        same(logits(found), logits(decoder))
        return
    for (name, value), wanted in zip(found.named_parameters(), decoder.parameters(), strict=True):
        assert (value - wanted).norm() < 0.08 * wanted.norm(), name


def test_grok_files_from_before_its_numbers_had_keys(tmp_path):
    torch.manual_seed(2)
    config = dataclasses.replace(
        small("grok-1"),
        attention_multiplier=0.08838834764831845,
        embedding_multiplier=78.38367176906169,
        logits_multiplier=0.5773502691896257,
    )
    write_checkpoint(Decoder(config), "grok-1", tmp_path / "folder", torch.float32)
    keys = ("attn_logit_softcapping", "router_logit_softcapping", "attention.output_scale", "embedding_scale")
    without = tuple(f"grok.{key}" for key in (*keys, "logit_scale"))
    path = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", without=without, each_expert=True)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config == Checkpoint.open(tmp_path / "folder").config
    assert any("renormalises" in note for note in checkpoint.notes)


def test_optional_keys_may_be_absent(tmp_path):
    """Old files have neither widths of heads, nor the vocabulary's size, nor groups of heads that are all alike."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("mixtral", **{**COMMON, "num_key_value_heads": 4}, num_local_experts=2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.save_pretrained(tmp_path / "folder")
    keys = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")
    path = write_gguf(tmp_path / "folder", tmp_path / "m.gguf", without=tuple(f"llama.{key}" for key in keys))
    same(logits(load_decoder(path)), logits(model))


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    """As in Q4_K_M, and where rows are no whole blocks."""
    folder = saved("qwen2_moe", tmp_path / "folder")
    kinds = {"ffn_down": "Q5_0", "attn_v": "Q8_0", "token_embd|output": "Q8_0"}
    path = write_gguf(folder, tmp_path / "model.gguf", "Q4_K", kinds=kinds, metadata={"general.file_type": 15})
    (told, differs) = Checkpoint.open(path).notes
    assert "dequantised from Q4_K_M (gate Q4_K; up Q4_K; down Q5_0; attention Q4_K and Q8_0; embeddings Q8_0)" in told
    assert "expected relative error .072 (.043 of Q5_0)" in told
    assert "not all packed alike" in differs


def test_what_rounding_does_to_cosines_is_as_the_note_says():
    """Two unrelated vectors, two that are alike, two that are the same but for a part: the packed ones' cosines."""
    generator = np.random.default_rng(0)
    error = next(one.error for one in TYPES.values() if one.name == "Q4_K")
    first, other, third = generator.standard_normal((3, 800, 4096), dtype=np.float32)

    def cosine(a, b):
        return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    seen = {name: unpacked(values, "Q4_K") for name, values in (("first", first), ("other", other))}
    small_ = cosine(seen["first"], seen["other"]) - cosine(first, other) * cosine_factor(error)
    assert small_.std() == pytest.approx(cosine_noise(error, 4096), rel=0.1)
    assert abs(small_.mean()) < 1e-4
    half = unpacked(first + third, "Q4_K")
    ratio = cosine(seen["first"], half).mean() / cosine(first, first + third).mean()
    assert ratio == pytest.approx(cosine_factor(error), abs=5e-4)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.rope.scaling.type": "proportional", "llama.rope.scaling.factor": 4.0}, "proportional"),
        ({"llama.rope.dimension_count": 32}, "partial_rotary_factor is 0.5"),
        ({"llama.expert_gating_func": 2}, "expert_gating_func is 2"),
        ({"llama.block_count": 3}, "block_count is 3 but tensors of 2 layers are there"),
        ({"llama.expert_count": 1 << 30}, "expert_count is 1073741824"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count is an array"),
        ({"llama.attention.value_length": 32}, "differ in width"),
        ({"llama.feed_forward_length": 512}, "has shape [256, 256] but its header makes it [512, 256]"),
        ({"general.type": "adapter"}, "'adapter'"),
        ({"split.count": 2}, "one of 2 files"),
    ],
)
def test_what_is_not_computed_or_does_not_fit_is_one_line(metadata, words, tmp_path):
    path = write_gguf(saved("mixtral", tmp_path / "folder"), tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_architectures_are_refused_by_name(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", packed(np.ones((4, 32)), "F32")[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba' is not supported; the known ones are llama, qwen2"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_divisors_that_are_no_stretching_of_llama_3_are_refused(tmp_path):
    folder = saved("llama", tmp_path / "folder")
    more = {"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}
    path = write_gguf(folder, tmp_path / "model.gguf", more=more)
    with pytest.raises(UserError, match=r"rope_freqs\.weight divides frequency"):
        Checkpoint.open(path)


def test_settings_name_the_tokens_that_begin_and_end_a_text(tmp_path):
    metadata = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    path = write_gguf(saved("mixtral", tmp_path / "folder"), tmp_path / "model.gguf", metadata=metadata)
    found = Checkpoint.open(path).settings
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert json.dumps(dict(found))
