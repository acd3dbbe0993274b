"""What a module and a datamodule offer to the probes, one's own among them: looked at before it is used.

B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from moebed.data.loader import domains_of_tokens
from moebed.errors import UserError
from moebed.views.layer import HeadView, LayerView, Need, ProbeText

IGNORE_INDEX = -100
SHAPES = {"input_ids": "(B, S)", "labels": "(B, S)", "domain": "(B,)"}  # of whole numbers


def views_of(module: LightningModule, text: ProbeText, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
    """The module's views, one after another.

    Raises:
        UserError: It has none, or gives something else.
    """
    own = type(module).__name__
    views = getattr(module, "views", None)
    if views is None:
        raise UserError(f"{own} has no views(text, needs): the probes cannot look into it")
    found = views(text, needs)
    if not isinstance(found, Iterable):
        raise UserError(
            f"{own}.views gives a {type(found).__name__}; it must give layer views, as views.live.walk does"
        )
    return _views(found, own)


def _views(found: Iterable[Any], own: str) -> Iterator[LayerView | HeadView]:
    iterator = iter(found)
    try:
        for view in iterator:
            if not isinstance(view, LayerView | HeadView):
                raise UserError(
                    f"{own}.views gives one of type {type(view).__name__}; each must be the view of a layer"
                )
            yield view
    finally:
        if hasattr(iterator, "close"):
            iterator.close()  # a walk restores the model when it is closed, also after an error


def probe_text(trainer: Trainer, num_sequences: int) -> ProbeText:
    """The datamodule's held-out sequences; positions without a label are padding.

    Raises:
        UserError: The datamodule offers no text, none that is not padding, or something else.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "probe_batch"):
        raise UserError("the probes need text: give the trainer a datamodule that has probe_batch(num_sequences)")
    batch, domains = datamodule.probe_batch(num_sequences), getattr(datamodule, "domains", None)
    if isinstance(domains, str) or not isinstance(domains, Iterable):
        raise UserError(
            f"{type(datamodule).__name__} has no domains; give it the names of its text's, such as ('mine',)"
        )
    domains = tuple(domains)
    _require_batch(batch, len(domains), f"{type(datamodule).__name__}.probe_batch")
    mask = batch["labels"] != IGNORE_INDEX
    if not bool(torch.any(mask)):
        raise UserError("the probes' text holds no tokens; raise the callback's num_sequences or give more text")
    text = ProbeText(batch["input_ids"], mask, batch["domain"], domains, token_domain=domains_of_tokens(batch))
    tokenizer = getattr(datamodule, "tokenizer", None)
    if tokenizer is None:
        return text
    ids = text.token_ids.tolist()
    said = {number: tokenizer.says(number) for number in set(ids)}
    return replace(text, token_text=tuple(said[number] for number in ids), says=tokenizer.says)


def _require_batch(batch: Any, num_domains: int, who: str) -> None:
    """Raise UserError where what a datamodule gives as a batch is none."""
    if not isinstance(batch, Mapping):
        raise UserError(f"{who} gives a {type(batch).__name__}; it must give {_wanted()}, by name")
    for name, shape in SHAPES.items():
        found = batch.get(name)
        if isinstance(found, Tensor):
            if not found.is_floating_point() and found.ndim == len(shape.split(", ")):
                continue
            said = f"{found.dtype} {tuple(found.shape)}"
        else:
            said = "missing" if found is None else type(found).__name__
        raise UserError(f"{who}: {name} is {said}; it must be whole numbers {shape}")
    sizes = {name: tuple(batch[name].shape) for name in SHAPES}
    if sizes["labels"] != sizes["input_ids"] or sizes["domain"] != sizes["input_ids"][:1]:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"{who} gives {said}; it must give {_wanted()} of the same B and S")
    domain = batch["domain"]
    if domain.numel() and not 0 <= int(domain.min()) <= int(domain.max()) < num_domains:
        raise UserError(
            f"{who}: domain has numbers from {int(domain.min())} to {int(domain.max())}; domains are {num_domains}"
        )


def _wanted() -> str:
    return ", ".join(f"{name} {shape}" for name, shape in SHAPES.items())
