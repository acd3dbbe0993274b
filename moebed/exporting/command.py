"""``moebed export CKPT --out DIR``: a run's checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moebed.arguments import OneLineParser
from moebed.checkpoints.hub import find_checkpoint, require_nameable
from moebed.machine.places import require_empty
from moebed.machine.progress import say, waiting
from moebed.names import FAMILIES, OWN_LAYOUT


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(
        prog="moebed export",
        description="Write a checkpoint as a Hugging Face folder: weights, config, tokenizer, generation config and "
        "model card. A model that no family of transformers expresses is written in moebed's own layout.",
    )
    parser.add_argument("checkpoint", help="a run's .ckpt file, or the folder of a checkpoint")
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder to write")
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="a family by its model_type, such as mixtral, olmoe, deepseek_v3, llama or emo, or moebed for its own "
        "layout; default the first that transformers loads and that expresses the model",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default as in the checkpoint")
    return parser


def run(command: str, arguments: Sequence[str]) -> None:
    """Export.

    Raises:
        UserError: The checkpoint cannot be read, the family cannot express it, or the folder cannot be written.
    """
    options = build_parser().parse_args(arguments)
    out = Path(options.out)
    require_nameable(options.checkpoint)
    if options.family is not None:
        FAMILIES.require(options.family, "--family", also=(OWN_LAYOUT,))
    require_empty(out)
    # Heavy imports wait until the options are known to be well formed.
    with waiting("loading PyTorch"):
        import torch

        from moebed.checkpoints.checkpoint import Checkpoint
        from moebed.checkpoints.writing_bar import WritingBar
        from moebed.exporting.export import export, plan_export

    path = find_checkpoint(options.checkpoint)
    source = Checkpoint.open(path)
    plan = plan_export(source, options.family)
    for note in source.notes:
        say(f"note: {note}")
    with WritingBar() as bar:
        notes = export(
            source, path, plan, out, getattr(torch, options.dtype) if options.dtype else None, bar.start, bar.update
        )
    for note in notes:
        say(f"note: {note}")
    loads = f"{plan.family.architecture} of transformers loads it" if plan.in_transformers else "moebed reads it"
    say(f"checkpoint: {out} ({plan.family.model_type}); {loads}")
