"""What streaming costs: reading a checkpoint beside a plain read of its files, a pass of text beside its products.

E experts, H hidden, F expert intermediate, T tokens.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from moebed.config import ModelConfig
from moebed.families.registry import family_of
from moebed.pretrained import PretrainedMoE
from moebed.views import MATRICES, LayerView, Need, ProbeText
from probes.driver import needs_of, run_probes
from probes.registry import PROBES

HIDDEN, WIDTH, EXPERTS, VOCABULARY, KEY_VALUE = 4096, 14336, 8, 512, 1024
_CONFIG = ModelConfig(  # one layer at Mixtral 8x7B's size; the vocabulary is small because nothing is asked of it
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    moe_intermediate_size=WIDTH,
    norm_topk_prob=True,
)
TOKENS = 1100
_BLOCK = 16 << 20


def write_layer(folder: Path) -> Path:
    """A checkpoint of one layer, bf16, with random weights: 2.9 GB."""
    family = family_of("mixtral", "family")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) - 0.5).mul_(0.03).bfloat16()

    attention = "model.layers.0.self_attn"
    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "model.layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "model.layers.0.block_sparse_moe.gate.weight": random(EXPERTS, HIDDEN),
        f"{attention}.q_proj.weight": random(HIDDEN, HIDDEN),
        f"{attention}.k_proj.weight": random(KEY_VALUE, HIDDEN),
        f"{attention}.v_proj.weight": random(KEY_VALUE, HIDDEN),
        f"{attention}.o_proj.weight": random(HIDDEN, HIDDEN),
    }
    for expert in range(EXPERTS):
        prefix = f"model.layers.0.block_sparse_moe.experts.{expert}"
        shapes = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}
        tensors |= {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.write_config(_CONFIG)))
    return folder


def forget_cached(folder: Path) -> None:
    """Have the next read of the files come from the disk, as far as the kernel goes along with it."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(folder: Path) -> float:
    """Seconds to read the files into one buffer that is used again and again."""
    buffer = bytearray(_BLOCK)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def streamed_read(folder: Path) -> float:
    """Seconds to have every expert's matrices handed out, checked for NaN, as probes are given them."""
    start = time.perf_counter()
    model = PretrainedMoE(str(folder), memory_budget="4GiB")
    for view in model.views(None, frozenset({Need.WEIGHTS})):
        assert isinstance(view, LayerView)
        for name in MATRICES:
            for expert in range(view.num_experts):
                view.expert_matrix(name, expert)
    model.close()
    return time.perf_counter() - start


def random_text() -> ProbeText:
    """As many tokens as the paper's long input."""
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))


def text_pass(folder: Path, dtype: str) -> float:
    """Seconds of a pass that shows every expert's output of every token to a probe."""
    start = time.perf_counter()
    model = PretrainedMoE(str(folder), memory_budget="8GiB", dtype=dtype, text=random_text())  # type: ignore[arg-type]
    probes = [PROBES["norm_vs_score"]()]
    run_probes(model.views(model.text, needs_of(probes)), probes)
    model.close()
    return time.perf_counter() - start


@torch.no_grad()
def products_alone(dtype: torch.dtype) -> float:
    """Seconds of the same products of weights that lie in memory in the dtype of the products."""
    x, inner = torch.rand(TOKENS, HIDDEN, dtype=dtype), torch.rand(TOKENS, WIDTH, dtype=dtype)
    wide, tall = torch.rand(WIDTH, HIDDEN, dtype=dtype), torch.rand(HIDDEN, WIDTH, dtype=dtype)
    query, key = torch.rand(HIDDEN, HIDDEN, dtype=dtype), torch.rand(KEY_VALUE, HIDDEN, dtype=dtype)
    start = time.perf_counter()
    for _ in range(EXPERTS):
        torch.mm(x, wide.T)
        torch.mm(x, wide.T)
        torch.mm(inner, tall.T)
    for weight in (query, key, key, query):
        torch.mm(x, weight.T)
    return time.perf_counter() - start
