"""vLLM's routed experts: responses of its server under ``--enable-return-routed-experts``, one a line.

Of a response ``prompt_routed_experts`` (tokens, layers, K) and each choice's ``routed_experts`` are lists, as the
documentation of vLLM 0.21 has them. Later ones give, of completions, the base64 of an ``.npy`` that begins at the first
prompt token, and of chats lists that begin at the last one (its tests of routed experts on the main branch). The last
token that is generated goes through no layer, so it has no experts. Layers are those with experts, counted from 0. Ids
are ``prompt_token_ids`` and ``token_ids``, where ``return_token_ids`` asked for them; -1 stands for an expert that vLLM
does not know, as of tokens in its cache. Of several choices the first one has the prompt's tokens.

Lines may say more, which vLLM does not: ``domain``; ``layers`` and ``num_experts``, a number a layer; ``token_text``.

B sequences, T tokens, L layers with experts, K experts per token.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebed.errors import UserError
from moebed.traces.trace import NONE, RoutingTrace, choices_in, settled, text_of

KIND = "vllm"


@dataclass(frozen=True)
class _Sequence:
    rows: np.ndarray  # (tokens, L, K)
    ids: np.ndarray  # (tokens,)
    domain: str
    said: list[str]


def is_line(record: Mapping[str, Any]) -> bool:
    """Whether a line is a response of vLLM's that has experts in it."""
    return "prompt_routed_experts" in record or "choices" in record


def read(lines: Iterator[tuple[str, dict[str, Any]]], where: str, num_experts: int | None) -> RoutingTrace:
    """The trace that lines say.

    Args:
        lines: What an error calls each, and what it holds.
        where: The trace, in an error.
        num_experts: Of every layer, where a person says so.

    Raises:
        UserError: A line holds something else.
    """
    found: list[_Sequence] = []
    first: dict[str, Any] = {}
    for what, record in lines:
        first = first or record
        found += _sequences(record, what)
        if found and found[-1].rows.shape[1:] != found[0].rows.shape[1:]:
            raise UserError(f"{what}: its layers or experts per token are not as many as those of the lines before")
    if not found:
        raise UserError(f"{where} has no routed experts in it")
    known = [(one.rows != NONE).any(axis=(1, 2)) for one in found]
    kept = [(one, valid) for one, valid in zip(found, known, strict=True) if valid.any()]
    if not kept:
        raise UserError(f"{where} knows the experts of no token")
    rows = np.concatenate([one.rows[valid] for one, valid in kept])  # (T, L, K)
    layers = _numbers(first.get("layers"), rows.shape[1], f"{where}: layers") or list(range(rows.shape[1]))
    said = _numbers(first.get("num_experts"), rows.shape[1], f"{where}: num_experts")
    if len(set(layers)) < len(layers):
        raise UserError(f"{where}: layers names one twice")
    by_layer = {layer: rows[:, place] for place, layer in enumerate(layers)}
    choices, experts, notes = settled(by_layer, dict(zip(layers, said, strict=False)), num_experts, where)
    without = sum(int((~valid).sum()) for valid in known)
    if without:
        notes.append(f"{where}: {without} tokens whose experts vLLM did not know are left out")
    if "layers" not in first:
        notes.append(f"{where}: layers are counted from 0, those without experts are not")
    spoken = [word for one, valid in kept for word, keep in zip(one.said, valid, strict=False) if keep]
    text = text_of(
        [one.ids[valid] for one, valid in kept],
        [one.domain for one, _ in kept],
        spoken if len(spoken) == len(rows) else (),
    )
    return RoutingTrace(where, KIND, choices, experts, text, True, notes)


def write(trace: RoutingTrace) -> str:
    """A line a sequence, the sequence as a prompt, with what vLLM does not say."""
    most = max(index.shape[1] for index in trace.choices.values())
    padded = [np.pad(one, ((0, 0), (0, most - one.shape[1])), constant_values=NONE) for one in trace.choices.values()]
    rows, start, lines = np.stack(padded, axis=1), 0, []  # (T, L, K)
    for sequence, length in enumerate(trace.text.token_mask.sum(dim=1).tolist()):
        tokens = slice(start, start + length)
        start += length
        line: dict[str, Any] = {
            "prompt_token_ids": trace.text.token_ids[tokens].tolist(),
            "prompt_routed_experts": rows[tokens].tolist(),
            "domain": trace.text.domains[int(trace.text.domain[sequence])],
            "layers": list(trace.choices),
            "num_experts": list(trace.num_experts.values()),
        }
        said = list(trace.text.token_text[tokens])
        lines.append(json.dumps(line | ({"token_text": said} if said else {})))
    return "\n".join(lines) + "\n"


def _sequences(record: Mapping[str, Any], what: str) -> Iterator[_Sequence]:
    """A sequence a choice; of a response without choices, its prompt."""
    prompt_ids = _ids(record.get("prompt_token_ids"), what)
    prompt = _rows(record.get("prompt_routed_experts"), f"{what}: prompt_routed_experts")
    domain, said = record.get("domain", "text"), record.get("token_text", [])
    if not isinstance(domain, str) or not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise UserError(f"{what}: domain must be a word, and token_text a list of them")
    choices = record.get("choices") or [{}]
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise UserError(f"{what}: choices is no list of choices")
    for number, choice in enumerate(choices):
        generated = _rows(choice.get("routed_experts"), f"{what}: routed_experts")
        ids = _ids(choice.get("token_ids"), what)
        parts = [part for part in (prompt if number == 0 else None, generated) if part is not None]
        if not parts:
            continue
        if len({part.shape[1:] for part in parts}) > 1:
            raise UserError(f"{what}: prompt and completion differ in layers or in experts per token")
        rows, every = np.concatenate(parts), np.concatenate([prompt_ids, ids])
        begins = 0
        if prompt is None and len(prompt_ids) and len(rows) == len(ids):
            begins = len(prompt_ids) - 1  # a chat's
        elif number:  # the prompt is the first choice's
            begins = len(prompt_ids)
            rows = rows if prompt is not None else rows[begins:]
        known = every[begins : begins + len(rows)]
        known = np.pad(known, (0, len(rows) - len(known)), constant_values=NONE)
        yield _Sequence(rows, known, domain, said if len(said) == len(rows) else [])


def _rows(value: Any, what: str) -> np.ndarray | None:
    """Experts (tokens, L, K) from lists, or from the base64 of an ``.npy``; None where there are none."""
    if value is None:
        return None
    if isinstance(value, str):
        return choices_in(_npy(value, what), what, 3)
    return choices_in(value, what, 3)


def _npy(text: str, what: str) -> np.ndarray:
    """The array of an ``.npy`` in base64, whose size is looked at before it is believed."""
    try:
        content = base64.b64decode(text, validate=True)
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.kind not in "iu" or dtype.itemsize * int(np.prod(shape, dtype=object)) != len(content) - file.tell():
            raise ValueError("it is of another size than it says")
        return np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, binascii.Error, EOFError, TypeError, SyntaxError) as error:
        raise UserError(f"{what} is no array in base64 ({' '.join(str(error).split())[:80]})") from None


def _ids(value: Any, what: str) -> np.ndarray:
    if value is None:
        return np.zeros(0, np.int64)
    whole = isinstance(value, list) and all(type(one) is int and 0 <= one < 2**31 for one in value)
    if not whole:
        raise UserError(f"{what}: token ids are no list of whole numbers")
    return np.array(value, np.int64)


def _numbers(value: Any, count: int, what: str) -> list[int]:
    """A number a layer; none where nothing is said."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) != count or not all(type(n) is int and 0 <= n < 2**15 for n in value):
        raise UserError(f"{what} must be {count} whole numbers, one a layer")
    return value
