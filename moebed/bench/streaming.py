"""What streaming costs: reading a checkpoint beside a plain read of its files, a pass of text beside its products.

Sizes are in ``Shape``.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from moebed.checkpoints.families.registry import family_of
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.model.config import ModelConfig
from moebed.views.layer import MATRICES, LayerView, Need, ProbeText
from probes.registry import PROBES
from probes.running.driver import needs_of, run_probes

_BLOCK = 16 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint; Mixtral 8x7B's, but for the vocabulary, of which nothing is asked."""

    hidden: int = 4096
    width: int = 14336
    heads: int = 32
    kv_heads: int = 8
    experts: int = 8
    layers: int = 2
    vocabulary: int = 512
    tokens: int = 1100

    @property
    def config(self) -> ModelConfig:
        """As a model."""
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_experts=self.experts,
            num_experts_per_tok=2,
            moe_intermediate_size=self.width,
            norm_topk_prob=True,
        )

    @property
    def key_value(self) -> int:
        """Rows of the key projection."""
        return self.hidden // self.heads * self.kv_heads


def write_model(folder: Path, shape: Shape) -> Path:
    """A checkpoint in bf16 with random weights, the same in each layer; a file a layer."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.rand(size, generator=generator) - 0.5).mul_(0.03).bfloat16()

    one = torch.ones(shape.hidden, dtype=torch.bfloat16)
    layer = {
        "input_layernorm.weight": one,
        "post_attention_layernorm.weight": one.clone(),
        "block_sparse_moe.gate.weight": random(shape.experts, shape.hidden),
        "self_attn.q_proj.weight": random(shape.hidden, shape.hidden),
        "self_attn.k_proj.weight": random(shape.key_value, shape.hidden),
        "self_attn.v_proj.weight": random(shape.key_value, shape.hidden),
        "self_attn.o_proj.weight": random(shape.hidden, shape.hidden),
    }
    for expert in range(shape.experts):
        sizes = {
            "w1": (shape.width, shape.hidden),
            "w2": (shape.hidden, shape.width),
            "w3": (shape.width, shape.hidden),
        }
        layer |= {f"block_sparse_moe.experts.{expert}.{name}.weight": random(*size) for name, size in sizes.items()}
    ends = {
        "model.embed_tokens.weight": random(shape.vocabulary, shape.hidden),
        "lm_head.weight": random(shape.vocabulary, shape.hidden),
        "model.norm.weight": one.clone(),
    }
    folder.mkdir(parents=True)
    files = {"ends.safetensors": ends}
    files |= {
        f"layer-{index}.safetensors": {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
        for index in range(shape.layers)
    }
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(
        json.dumps(family_of("mixtral", "family").write_config(shape.config)), encoding="utf-8"
    )
    return folder


def forget_cached(folder: Path) -> None:
    """Have the next read of the files come from the disk, as far as the kernel goes along with it."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def keep_cached(folder: Path) -> None:
    """Have the files lie in the page cache: others' work may have driven out what was written or read just now."""
    plain_read(folder)


def plain_read(folder: Path) -> float:
    """Seconds to read the files into one buffer that is used again and again."""
    buffer = bytearray(_BLOCK)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # as the streamed read does
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def streamed_read(folder: Path) -> float:
    """Seconds to have every expert's matrices handed out, checked for NaN, as probes are given them."""
    start = time.perf_counter()
    model = PretrainedMoE(str(folder), memory_budget="2GiB")
    for view in model.views(None, frozenset({Need.WEIGHTS})):
        assert isinstance(view, LayerView)
        for name in MATRICES:
            for expert in range(view.num_experts):
                view.expert_matrix(name, expert)
    model.close()
    return time.perf_counter() - start


def random_text(shape: Shape) -> ProbeText:
    """As many tokens as the paper's long input."""
    ids = torch.randint(shape.vocabulary, (1, shape.tokens), generator=torch.Generator().manual_seed(1))
    return ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))


def text_pass(folder: Path, shape: Shape, dtype: str) -> float:
    """Seconds of a pass through one layer that shows every expert's output of every token to a probe."""
    start = time.perf_counter()
    model = PretrainedMoE(str(folder), layers=[0], dtype=dtype, text=random_text(shape))  # type: ignore[arg-type]
    probes = [PROBES["norm_vs_score"]()]
    run_probes(model.views(model.text, needs_of(probes)), probes)
    model.close()
    return time.perf_counter() - start


@torch.no_grad()
def products_alone(shape: Shape, dtype: torch.dtype) -> float:
    """Seconds of the same products of weights that lie in memory in the dtype of the products."""
    x, inner = torch.rand(shape.tokens, shape.hidden, dtype=dtype), torch.rand(shape.tokens, shape.width, dtype=dtype)
    wide, tall = torch.rand(shape.width, shape.hidden, dtype=dtype), torch.rand(shape.hidden, shape.width, dtype=dtype)
    query, key = (
        torch.rand(shape.hidden, shape.hidden, dtype=dtype),
        torch.rand(shape.key_value, shape.hidden, dtype=dtype),
    )
    start = time.perf_counter()
    for _ in range(shape.experts):
        torch.mm(x, wide.T)
        torch.mm(x, wide.T)
        torch.mm(inner, tall.T)
    for weight in (query, key, key, query):
        torch.mm(x, weight.T)
    return time.perf_counter() - start
