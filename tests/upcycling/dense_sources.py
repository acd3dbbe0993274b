"""Tiny dense checkpoints of every family that can be upcycled."""

import torch
import transformers

from moebed.checkpoints import Checkpoint
from moebed.model.config import ModelConfig
from moebed.training.module import MoEModule

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
FAMILIES = {
    "mistral": {"sliding_window": 5},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
}
SOURCES = [*FAMILIES, "run"]


def write_dense(folder, source="mistral", **changes):
    """Write a dense model; returns its path."""
    torch.manual_seed(5)
    if source == "run":
        return write_run(folder, num_experts=0, **changes)
    config = transformers.AutoConfig.for_model(source, **{**SIZES, **FAMILIES[source], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norm scales too, which start as 0 and 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(folder / source)
    return folder / source


def write_run(folder, **changes):
    """Write what a run's checkpoint holds of a model; returns the .ckpt file."""
    torch.manual_seed(5)
    module = MoEModule(ModelConfig(**{**SIZES, **changes}))
    path = folder / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    content = {"state_dict": module.state_dict(), "global_step": 3}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def logits(decoder, vocabulary=64):
    """Logits of two sequences."""
    ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return decoder.eval()(ids).logits


def tensors(path):
    """All parameters of a checkpoint by the decoder's names."""
    from moebed.checkpoints import load_decoder

    return {name: value.detach() for name, value in load_decoder(Checkpoint.open(path)).named_parameters()}
