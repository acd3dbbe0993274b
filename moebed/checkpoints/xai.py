"""xai-org's own release of Grok-1: one pickle a tensor, matrices as (in, out), most of them in 8 bits.

    ckpt-0/tensor00000_000            embedding (V, H), float32
    ckpt-0/tensor00001_000            last norm (H,)
    ckpt-0/tensor00002_000 and on     twelve for each layer, in the order of SLOTS; the layers as their names sort,
                                      decoder_layer_10 before decoder_layer_2

A pickle is a program. Here a few of its instructions build inert records of a tensor's dtype, shape and place in the
file; it can name nothing but those records, and the numbers are read from the file afterwards, a part at a time.

K rows and N columns of a stored matrix, G groups of rows that share a scale, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moebed.checkpoints.files import NamedEntry, TensorEntry
from moebed.errors import UserError

# Slot -> the port's name and whether it lies transposed; {e} where the first dimension counts experts.
SLOTS = (
    ("moe_block.experts.{e}.linear.weight", True),
    ("moe_block.experts.{e}.linear_1.weight", True),
    ("moe_block.experts.{e}.linear_v.weight", True),
    ("attn.k_proj.weight", True),
    ("attn.o_proj.weight", True),
    ("attn.q_proj.weight", True),
    ("attn.v_proj.weight", True),
    ("pre_attn_norm.scale", False),
    ("post_attn_norm.scale", False),
    ("pre_moe_norm.scale", False),
    ("post_moe_norm.scale", False),
    ("moe_block.gate.weight", True),
)
# What the released model has beside its shapes (github.com/xai-org/grok-1, run.py); JAX's GELU is the tanh form.
RELEASED: dict[str, Any] = {
    "model_type": "grok-1",
    "num_experts_per_tok": 2,
    "max_position_embeddings": 8192,
    "head_dim": 128,
    "max_attn_value": 30.0,
    "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_DTYPES = {"i1": torch.int8, "f4": torch.float32, "f2": torch.float16, "bfloat16": torch.bfloat16}
_OUT_OF_LINE = 1 << 16  # pickle writes longer strings of bytes outside its frames


class _DType:
    """Stands for numpy.dtype(name, ...)."""

    def __init__(self, name: Any, *flags: Any) -> None:
        self.name = name if isinstance(name, str) else getattr(name, "dtype_name", "")

    def __setstate__(self, state: Any) -> None:
        pass


class _BFloat16:
    """Stands for ml_dtypes.bfloat16."""

    dtype_name = "bfloat16"


class _Payload:
    """Bytes that were left in the file."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size


class _Array:
    """Stands for a numpy array: what it is, and where its numbers are."""

    shape: tuple[int, ...] = ()
    dtype = torch.uint8
    payload: _Payload | bytes = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, payload = state
        if dtype.name not in _DTYPES or fortran_order or not isinstance(payload, _Payload | bytes):
            raise pickle.UnpicklingError(f"an array of {dtype.name or 'an unknown dtype'} in an unknown order")
        self.shape, self.dtype, self.payload = tuple(shape), _DTYPES[dtype.name], payload
        size = payload.size if isinstance(payload, _Payload) else len(payload)
        if size != math.prod(self.shape) * self.dtype.itemsize:
            raise pickle.UnpicklingError(f"{size} bytes for {list(self.shape)} of {self.dtype}")

    def open(self, path: Path) -> Tensor:
        """The numbers, mapped from the file; read-only by agreement."""
        if isinstance(self.payload, bytes):
            raw = np.frombuffer(bytearray(self.payload), np.uint8)
        else:
            raw = np.memmap(path, np.uint8, "c", self.payload.offset, (self.payload.size,))
        return torch.from_numpy(raw).view(self.dtype).view(self.shape)


class _Quantized:
    """Stands for QuantizedWeight8bit: weight (..., K, N) int8 and scales (..., G, N)."""

    weight: _Array
    scales: _Array


def _reconstruct(*ignored: Any) -> _Array:
    return _Array()


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("ml_dtypes", "bfloat16"): _BFloat16,
    ("__main__", "QuantizedWeight8bit"): _Quantized,
    ("model", "QuantizedWeight8bit"): _Quantized,
}


_Unpickler: Any = pickle._Unpickler  # the one in Python: its instructions can be replaced


class _Reader(_Unpickler):
    """Admits the names above and nothing else; skips long strings of bytes and remembers where they are."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_Unpickler.dispatch)

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for an admitted name."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs; nothing of it was run")
        return _ADMITTED[module, name]

    def _bytes(self, size: int) -> None:
        if size < _OUT_OF_LINE:
            self.append(self.read(size))
            return
        self.append(_Payload(self.file.tell(), size))
        self.file.seek(size, 1)

    def load_binbytes(self) -> None:
        self._bytes(struct.unpack("<I", self.read(4))[0])

    def load_binbytes8(self) -> None:
        self._bytes(struct.unpack("<Q", self.read(8))[0])

    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8


def read_pickled_tensor(path: Path) -> _Array | _Quantized:
    """What a file of the release holds; its numbers stay in the file.

    Raises:
        UserError: The pickle names anything but arrays and 8-bit weights, or is damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            found = _Reader(file).load()
            arrays = [found.weight, found.scales] if isinstance(found, _Quantized) else [found]
            if not all(isinstance(array, _Array) for array in arrays):
                raise pickle.UnpicklingError("it holds no tensor")
            if file.tell() > size:
                raise pickle.UnpicklingError("it is cut short")
    except (
        pickle.UnpicklingError,
        EOFError,
        struct.error,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        raise UserError(
            f"{path} is not a tensor of the release: {error or 'it is cut short'}; download it again"
        ) from error
    return found


class XaiEntry(NamedEntry):
    """A tensor of the release under the port's name, turned to (out, in) and, from 8 bits, to bfloat16."""

    def __init__(self, path: Path, found: _Array | _Quantized, transposed: bool, expert: int | None = None) -> None:
        self.path, self.position, self._transposed, self._expert = path, expert or 0, transposed, expert
        quantized = isinstance(found, _Quantized)
        self._array = found.weight if isinstance(found, _Quantized) else found
        self._scales = found.scales if isinstance(found, _Quantized) else None
        shape = self._array.shape if expert is None else self._array.shape[1:]
        self.shape = (shape[1], shape[0]) if transposed else tuple(shape)
        self.dtype = torch.bfloat16 if quantized else self._array.dtype
        if self._scales is not None and (
            len(self._scales.shape) != len(self._array.shape) or self._array.shape[-2] % self._scales.shape[-2]
        ):
            raise UserError(f"{path}: scales {list(self._scales.shape)} do not fit weights {list(self._array.shape)}")

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns) with the rows from ``first`` on."""
        rows = slice(first, first + out.shape[0])
        whole = self._array.open(self.path)
        if self._expert is not None:
            whole = whole[self._expert]
        if not self._transposed:
            out.copy_(whole.view(-1, out.shape[-1])[rows])
            return
        part = whole[:, rows]  # (K, rows of out)
        if self._scales is None:
            out.copy_(part.T)
            return
        scales = self._scales.open(self.path)
        scales = (scales if self._expert is None else scales[self._expert])[:, rows].float()  # (G, rows of out)
        groups = scales.shape[0]
        per_group = part.shape[0] // groups
        for group in range(groups):
            columns = slice(group * per_group, (group + 1) * per_group)
            out[:, columns] = (part[columns].float() * scales[group]).T.to(out.dtype)


def release_folder(folder: Path) -> Path | None:
    """The folder of the release's tensors, ``folder`` itself or its ``ckpt-0``; None where there is none."""
    return next((path for path in (folder, folder / "ckpt-0") if (path / "tensor00000_000").is_file()), None)


def open_release(folder: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Settings, as a ``config.json`` of the port would have them, and entries under the port's names.

    Raises:
        UserError: A file is missing or is no tensor of the release.
    """
    files = sorted(folder.glob("tensor*_000"))
    layers, rest = divmod(len(files) - 2, len(SLOTS))
    if layers < 1 or rest or files != [folder / f"tensor{index:05d}_000" for index in range(len(files))]:
        expected = next(i for i in range(len(files) + 1) if not (folder / f"tensor{i:05d}_000").is_file())
        raise UserError(
            f"{folder}: {len(files)} files are not 2 and {len(SLOTS)} for each layer; tensor{expected:05d}_000 is the "
            "first that is missing"
        )
    entries: dict[str, TensorEntry] = {
        "model.embed_tokens.weight": XaiEntry(files[0], read_pickled_tensor(files[0]), False),
        "model.norm.scale": XaiEntry(files[1], read_pickled_tensor(files[1]), False),
    }
    order = sorted(range(layers), key=lambda layer: f"decoder_layer_{layer}/")
    experts = 0
    for place, layer in enumerate(order):
        for slot, (name, transposed) in enumerate(SLOTS):
            path, name = files[2 + place * len(SLOTS) + slot], f"model.layers.{layer}.{name}"
            found = read_pickled_tensor(path)
            if "{e}" not in name:
                entries[name] = XaiEntry(path, found, transposed)
                continue
            experts = (found.weight if isinstance(found, _Quantized) else found).shape[0]
            for expert in range(experts):
                entries[name.format(e=expert)] = XaiEntry(path, found, transposed, expert)
    vocabulary, hidden = entries["model.embed_tokens.weight"].shape
    head = RELEASED["head_dim"]
    settings = {
        **RELEASED,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "intermediate_size": entries["model.layers.0.moe_block.experts.0.linear.weight"].shape[0],
        "num_attention_heads": entries["model.layers.0.attn.q_proj.weight"].shape[0] // head,
        "num_key_value_heads": entries["model.layers.0.attn.k_proj.weight"].shape[0] // head,
    }
    return settings, entries
