"""What packing has done to a model's weights, in words for whoever looks at results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from moebed.checkpoints.gguf.header import Header
from moebed.checkpoints.gguf.types import FILE_TYPES, GgmlType

# What a person calls a tensor -> its name in the file. In the order in which they are told.
_CLASSES = {
    "gate": r"ffn_(gate|gate_up)(_exps|_shexp|\.\d+)?\.weight",
    "up": r"ffn_(up|gate_up)(_exps|_shexp|\.\d+)?\.weight",
    "down": r"ffn_down(_exps|_shexp|\.\d+)?\.weight",
    "attention": r"attn_(q|k|v|output)\.weight",
    "embeddings": r"(token_embd|output)\.weight",
}
_NEURON = 4096  # numbers of a neuron, for an example


def notes_on_rounding(header: Header) -> list[str]:
    """How near the weights of a file are to those that were packed; nothing where none are packed."""
    kinds = {name: _kinds(header, pattern) for name, pattern in _CLASSES.items()}
    packed = {kind for found in kinds.values() for kind in found if kind.packed}
    if not packed:
        return []
    called = FILE_TYPES.get(header.get("general.file_type", int, -1)) or _names(packed)
    told = "; ".join(f"{name} {_names(found)}" for name, found in kinds.items() if found)
    notes = [f"{header.path}: dequantised from {called} ({told}), {_expected(kinds)}"]
    if len({frozenset(kinds[name]) for name in ("gate", "up", "down")}) > 1:
        notes.append(
            f"{header.path}: gate, up and down are not all packed alike, so that errors differ within one expert: "
            "what one of them shows beside another may be the packing's"
        )
    if any(key.startswith("quantize.imatrix.") for key in header.values):
        notes.append(
            f"{header.path}: packed with an importance matrix, which puts the error where the model feels it least; "
            "the plain error may be larger than the expected one"
        )
    return notes


def cosine_factor(error: float) -> float:
    """What independent relative errors of two vectors make of their cosine: it is multiplied by this."""
    return 1 / (1 + error**2)


def cosine_noise(error: float, numbers: int) -> float:
    """Standard deviation that they add to a small cosine of two vectors of so many numbers."""
    return float(error * (2 / numbers) ** 0.5)


def _expected(kinds: dict[str, list[GgmlType]]) -> str:
    """The error of the experts' matrices, and what it does to cosines."""
    ffn = {kind.name: kind.error for name in ("gate", "up", "down") for kind in kinds[name]}
    measured = [error for error in ffn.values() if error]
    if not measured or None in ffn.values():
        return (
            "whose error was not measured here: what is small may be the packing's. Routers, norms and biases are as "
            "they were"
        )
    error = max(measured)
    others = [f"{short(one)} of {name}" for name, one in ffn.items() if one and one != error]
    beside = f" ({', '.join(others)})" if others else ""
    factor = short(cosine_factor(error), 4) if error > 0.01 else "more than .9999"
    return (
        f"expected relative error {short(error)}{beside}. A cosine of two matrices or neurons is seen as {factor} of "
        "what it was, since their errors have nothing in common; only of copies packed alike it stays 1, and what they "
        f"differ by below {short(error)} of their length is lost. A small cosine stays as small, and of two neurons of "
        f"{_NEURON:,} numbers gains noise of {short(cosine_noise(error, _NEURON))}. Routers, norms and biases are as "
        "they were"
    )


def _kinds(header: Header, pattern: str) -> list[GgmlType]:
    """The types of the tensors of a class, the most frequent first."""
    wanted = re.compile(rf"(blk\.\d+\.)?{pattern}")
    found = Counter(info.kind for name, info in header.tensors.items() if wanted.fullmatch(name))
    return [kind for kind, _ in found.most_common()]


def _names(kinds: Iterable[GgmlType]) -> str:
    names = [kind.name for kind in kinds]
    return " and ".join(names) if len(names) < 3 else ", ".join(names)


def short(value: float, digits: int = 2) -> str:
    """A number below 1, such as .072."""
    return f"{value:.{digits}g}".removeprefix("0")
