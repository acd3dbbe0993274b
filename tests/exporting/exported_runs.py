"""Tiny runs to export: a folder with checkpoint, config.yaml, run_summary.json and tokenizer."""

import json

import torch
import yaml

from moebed.data.tokenizer import BytesTokenizer, train_bpe
from moebed.model.config import ModelConfig
from moebed.training.module import MoEModule

TEXT = ["the cat sat on the mat.\n\nIt saw 12 rats, é and <|endoftext|> too." * 5]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 40,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "initializer_range": 0.3,
}
RECIPE = {
    "seed_everything": 7,
    "trainer": {"precision": "32-true", "accumulate_grad_batches": 2},
    "model": {"optimizer": {"learning_rate": 0.004, "schedule": "cosine"}, "init_from": "/home/somebody/dense_model"},
    "data": {
        "sources": [{"name": "rhymes", "kind": "files", "path": "texts/rhymes.txt", "weight": 2.0}],
        "tokenizer": {"kind": "bpe"},
        "sequence_length": 48,
        "batch_size": 3,
    },
    "samples": {"temperature": 0.7, "top_k": 9},
}


def write_run(folder, tokenizer="bpe", step=20, numbers_step=20, **changes):
    """Write a run; returns its .ckpt file and its model."""
    torch.manual_seed(5)
    module = MoEModule(ModelConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
    run = folder / "my_run"
    (run / "checkpoints").mkdir(parents=True)
    content = {"state_dict": module.state_dict(), "global_step": step}
    module.on_save_checkpoint(content)
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    (run / "run_summary.json").write_text(json.dumps({"step": numbers_step, "val/loss": 3.25}))
    if tokenizer:
        kind = train_bpe(TEXT, 290) if tokenizer == "bpe" else BytesTokenizer()
        kind.save(run / "tokenizer")
    return run / "checkpoints" / "last.ckpt", module.decoder
