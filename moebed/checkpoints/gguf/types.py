"""How numbers lie in a GGUF file: ggml's types, how many bytes they take, and how near they come to what was packed.

A row is cut into blocks of equally many numbers, and no block spans two rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moebed.errors import UserError

PACKAGE = "gguf"


@dataclass(frozen=True)
class GgmlType:
    """A ggml type.

    Args:
        name: What ggml calls it.
        block: Numbers in a block.
        num_bytes: Bytes of a block.
        dtype: What its numbers are when read; None where nothing here can read them.
        error: ‖Ŵ−W‖ / ‖W‖ of normal numbers after ggml's own rounding; None where it was not measured. 0 for what is
            not packed.
    """

    name: str
    block: int
    num_bytes: int
    dtype: torch.dtype | None = None
    error: float | None = None

    @property
    def packed(self) -> bool:
        """Whether its numbers are codes, which are turned into numbers as they are read."""
        return self.name not in ("F32", "F16", "BF16")


def _plain(name: str, dtype: torch.dtype) -> GgmlType:
    return GgmlType(name, 1, dtype.itemsize, dtype, 0.0)


def _packed(name: str, block: int, num_bytes: int, error: float | None = None) -> GgmlType:
    # Rounding to bfloat16 adds .0017 to the error, which is nothing beside that of any type but Q8_0.
    return GgmlType(name, block, num_bytes, torch.bfloat16, error)


# By the number that stands in a file. Errors of Q8_0, Q5_0, Q5_1, Q4_0, Q4_1 and MXFP4 were measured with gguf 0.19,
# those of the K types with a rebuilding of ggml's reference; importance matrices change them.
TYPES: dict[int, GgmlType] = {
    0: _plain("F32", torch.float32),
    1: _plain("F16", torch.float16),
    2: _packed("Q4_0", 32, 18, 0.086),
    3: _packed("Q4_1", 32, 20, 0.078),
    6: _packed("Q5_0", 32, 22, 0.043),
    7: _packed("Q5_1", 32, 24, 0.038),
    8: _packed("Q8_0", 32, 34, 0.0054),
    9: GgmlType("Q8_1", 32, 40),
    10: _packed("Q2_K", 256, 84, 0.30),
    11: _packed("Q3_K", 256, 110, 0.153),
    12: _packed("Q4_K", 256, 144, 0.072),
    13: _packed("Q5_K", 256, 176, 0.036),
    14: _packed("Q6_K", 256, 210, 0.018),
    15: GgmlType("Q8_K", 256, 292),
    16: _packed("IQ2_XXS", 256, 66),
    17: _packed("IQ2_XS", 256, 74),
    18: _packed("IQ3_XXS", 256, 98),
    19: _packed("IQ1_S", 256, 50),
    20: _packed("IQ4_NL", 32, 18),
    21: _packed("IQ3_S", 256, 110),
    22: _packed("IQ2_S", 256, 82),
    23: _packed("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: _packed("IQ1_M", 256, 56),
    30: _plain("BF16", torch.bfloat16),
    34: _packed("TQ1_0", 256, 54),
    35: _packed("TQ2_0", 256, 66),
    39: _packed("MXFP4", 32, 17, 0.114),
    40: _packed("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}
# general.file_type -> what such files are called; llama.cpp's llama_ftype.
FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S"},
    **{12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K"},
    **{19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S"},
    **{27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0"},
    **{38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0"},
}


def require_unpacker() -> None:
    """Raise UserError, which says what to install, where the package that unpacks weights is not there."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the package {PACKAGE} is missing, which unpacks the weights of GGUF files; pip install {PACKAGE}"
        ) from error


def unpack(kind: GgmlType, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The numbers (N, columns) float32 of packed rows (N, bytes of a row) uint8."""
    import gguf

    found: np.ndarray[Any, Any] = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind.name])
    return found
