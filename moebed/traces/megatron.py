"""Megatron-LM's traces of routing, ``router_trace_rank*.jsonl`` under ``--moe-routing-trace-path``.

A line is a record of one layer, step and rank, as ``megatron/core/transformer/moe/router_trace.py`` writes it (commit
d98e8a6, August 2026): ``{"step", "stage", "block", "layer", "rank", "num_tokens", "topk", "top_indices"}``, the last
one (tokens, K). It says neither ids nor sequences: the tokens of one step and rank are taken as one text, in which no
token follows another. Ranks are taken as parts of a batch, whose layers have the same numbers; of ranks that noted down
the same, which share their tokens, one is taken. Records of blocks other than the decoder, which predict further
tokens, are left out.

Records that moebed writes say more: ``num_experts``, and the first one ``token_ids``, ``sequence_lengths``, ``domains``
of the sequences and ``token_text``.

T tokens, K experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moebed.errors import UserError
from moebed.traces.trace import NONE, RoutingTrace, choices_in, settled, text_of

KIND = "megatron"
_Batch = dict[int, np.ndarray]  # choices (T, K) of one step and rank, by layer


def is_line(record: Mapping[str, Any]) -> bool:
    """Whether a line is a record of Megatron's."""
    return "top_indices" in record and "layer" in record


def read(lines: Iterator[tuple[str, dict[str, Any]]], where: str, num_experts: int | None) -> RoutingTrace:
    """The trace that records say; see :func:`moebed.traces.vllm.read`."""
    batches: dict[tuple[int, int], _Batch] = {}
    told: dict[tuple[int, int], dict[str, Any]] = {}
    experts: dict[int, int] = {}
    others = 0
    for what, record in lines:
        if record.get("block", "decoder") != "decoder":
            others += 1
            continue
        step, layer, rank = (_number(record.get(key), f"{what}: {key}") for key in ("step", "layer", "rank"))
        index = choices_in(record.get("top_indices"), f"{what}: top_indices", 2)
        if record.get("num_tokens", len(index)) != len(index) or record.get("topk", index.shape[1]) != index.shape[1]:
            raise UserError(f"{what}: top_indices is not of num_tokens and topk, as the record says")
        batch = batches.setdefault((step, rank), {})
        if layer in batch:
            raise UserError(f"{what}: step {step} has layer {layer} of rank {rank} twice")
        if batch and len(next(iter(batch.values()))) != len(index):
            raise UserError(f"{what}: layer {layer} has {len(index)} tokens, the layers before had others")
        batch[layer] = index
        if "num_experts" in record:
            experts[layer] = _number(record["num_experts"], f"{what}: num_experts")
        if "sequence_lengths" in record:
            told[step, rank] = record
    if not batches:
        raise UserError(f"{where} has no record of a decoder's layer")
    notes = [f"{where}: {others} records of other blocks than the decoder are left out"] if others else []
    batches, more = _whole(batches, where)
    layers = sorted(next(iter(batches.values())))
    widths = {layer: max(batch[layer].shape[1] for batch in batches.values()) for layer in layers}
    choices = {
        layer: np.concatenate([_padded(batch[layer], widths[layer]) for batch in batches.values()]) for layer in layers
    }
    found, count, said = settled(choices, experts, num_experts, where)
    sizes = {key: len(next(iter(batch.values()))) for key, batch in batches.items()}
    if set(told) >= set(batches):
        parts = [_told(told[key], sizes[key], where) for key in batches]
        ids, domains, words = ([one for part in parts for one in part[place]] for place in range(3))
        text = text_of(ids, domains, words)
        return RoutingTrace(where, KIND, found, count, text, True, notes + more + said)
    text = text_of([np.full(size, NONE) for size in sizes.values()])
    notes.append(f"{where} does not say which tokens follow one another: a step's tokens of one rank are one text")
    return RoutingTrace(where, KIND, found, count, text, False, notes + more + said)


def write(trace: RoutingTrace) -> str:
    """A record a layer, all of one step, with what Megatron does not say."""
    records: list[dict[str, Any]] = []
    for layer, index in trace.choices.items():
        record = {
            "step": 0,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": layer,
            "rank": 0,
            "num_tokens": len(index),
            "topk": index.shape[1],
            "top_indices": index.tolist(),
            "num_experts": trace.num_experts[layer],
        }
        records.append(record)
    text = trace.text
    records[0] |= {
        "sequence_lengths": text.token_mask.sum(dim=1).tolist(),
        "token_ids": text.token_ids.tolist(),
        "domains": [text.domains[number] for number in text.domain.tolist()],
    }
    if text.token_text:
        records[0]["token_text"] = list(text.token_text)
    return "".join(json.dumps(record) + "\n" for record in records)


def _whole(batches: Mapping[tuple[int, int], _Batch], where: str) -> tuple[dict[tuple[int, int], _Batch], list[str]]:
    """Steps of which no layer is missing, each once."""
    layers = set().union(*batches.values())
    kept: dict[tuple[int, int], _Batch] = {}
    seen: dict[tuple[int, ...], tuple[int, int]] = {}
    partial = copies = 0
    for key, batch in sorted(batches.items()):
        if set(batch) != layers:
            partial += 1
            continue
        mark = (key[0], *(hash(batch[layer].tobytes()) for layer in sorted(layers)))
        if mark in seen:
            copies += 1
            continue
        seen[mark], kept[key] = key, batch
    if not kept:
        raise UserError(f"{where}: no step has all of its layers {', '.join(map(str, sorted(layers)))}")
    notes = [f"{where}: {partial} steps of a rank that lack layers are left out"] if partial else []
    return kept, notes + ([f"{where}: {copies} copies of other ranks' tokens are left out"] if copies else [])


def _told(record: Mapping[str, Any], tokens: int, where: str) -> tuple[list[Any], ...]:
    """Ids, domains and what tokens say, of the sequences of a step."""
    lengths, ids = record["sequence_lengths"], record.get("token_ids", [NONE] * tokens)
    domains, said = record.get("domains", []), record.get("token_text", [])
    lists = all(isinstance(one, list) for one in (lengths, ids, domains, said))
    if not lists or not all(type(one) is int and one > 0 for one in lengths) or sum(lengths) != tokens:
        raise UserError(f"{where}: sequence_lengths do not add up to the {tokens} tokens of the step")
    if len(ids) != tokens or not all(type(one) is int and NONE <= one < 2**31 for one in ids):
        raise UserError(f"{where}: token_ids are not {tokens} whole numbers")
    if len(domains) not in (0, len(lengths)) or len(said) not in (0, tokens):
        raise UserError(f"{where}: domains must be as many as sequences, and token_text as tokens")
    if not all(isinstance(one, str) for one in (*domains, *said)):
        raise UserError(f"{where}: domains and token_text must be words")
    return np.split(np.array(ids, np.int64), np.cumsum(lengths)[:-1]), domains, said


def _padded(index: np.ndarray, width: int) -> np.ndarray:
    return np.pad(index, ((0, 0), (0, width - index.shape[1])), constant_values=NONE)


def _number(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise UserError(f"{what} is {str(value)[:40]!r}; it must be a whole number")
    return value
