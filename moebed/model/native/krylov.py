"""Growth of a block Krylov space in the compiled library: products and orthogonalisation in one call.

N side, B vectors of a block, L of the space; vectors are rows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moebed.model import native
from moebed.model.native import compiled

_MULTIPLE = 32  # of the side, as in krylov.cpp
_WIDEST = 64  # of a block: a strip there
_CALL = compiled.structure(
    "KrylovCall",
    **dict.fromkeys(("side", "width", "first", "blocks", "passes", "bf16"), ctypes.c_int64),
    **dict.fromkeys(("chance_share", "conditioned", "orthogonal"), ctypes.c_float),
    **dict.fromkeys(("product", "lost", "chance", "basis", "image", "grown"), ctypes.c_void_p),
)


def fits(product: Tensor, width: int) -> bool:
    """Whether the library takes a matrix (N, N) and blocks of so many vectors.

    It is contiguous and in main memory, N a multiple of 32; float32, or bf16 where the processor has products of it.
    """
    types = [torch.float32]
    if native.instruction_set() in ("avx512_bf16", "amx"):
        types.append(torch.bfloat16)
    plain = product.dtype in types and product.device.type == "cpu" and product.is_contiguous()
    return plain and len(product) % _MULTIPLE == 0 and width <= _WIDEST and native.load() is None


def grow(
    product: Tensor,
    lost: Tensor,
    basis: Tensor,
    image: Tensor,
    chance: Tensor,
    first: int,
    blocks: int,
    *,
    share: float,
    passes: int,
    conditioned: float,
    orthogonal: float,
) -> int:
    """Add blocks to the space of a symmetric matrix, product + diag(lost), on the caller's thread.

    Args:
        product: (N, N), which ``fits``. Of bf16 it is multiplied by blocks rounded to bf16.
        lost: (N,) float32, contiguous.
        basis: (L, N) float32, contiguous; blocks up to and with the one at ``first`` are there.
        image: (L, N), likewise: of the basis, those before ``first`` are there.
        chance: (B, N) float32, contiguous; is added to an image before it is made orthogonal, ``share`` of its length.
        first: Of blocks, counted from 0.
        blocks: How many the space is to have.
        share: See ``chance``.
        passes: Of orthogonalisation, at most.
        conditioned: Least over largest pivot of a Cholesky factor, above which it makes a block orthonormal.
        orthogonal: A least pivot above which, from the second pass on, nothing was left in the space.

    Returns:
        How many blocks it has now: fewer where the next one's vectors are too close to dependent.
    """
    name = native.instruction_set()
    assert name is not None
    grown = torch.zeros((), dtype=torch.int64)
    numbers = {
        "side": len(product),
        "width": len(chance),
        "first": first,
        "blocks": blocks,
        "passes": passes,
        "bf16": product.dtype == torch.bfloat16,
        "chance_share": share,
        "conditioned": conditioned,
        "orthogonal": orthogonal,
    }
    tensors = {"product": product, "lost": lost, "chance": chance, "basis": basis, "image": image, "grown": grown}
    compiled.invoke(compiled.library(name).moebed_krylov, _CALL, numbers, tensors, backward=False)
    return int(grown)
