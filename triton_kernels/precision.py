"""Where the kernels run, and with what precision they multiply."""

from __future__ import annotations

import numpy as np
import torch
import triton

from triton_kernels.activations import activate


def interpreted() -> bool:
    """Whether the kernels were imported for Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""
    return not isinstance(activate, triton.runtime.JITFunction)


def version() -> tuple[int, int]:
    """Triton's version, (3, 9) for 3.9.0."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def interpreter_fault() -> str | None:
    """Why this Triton cannot interpret with this NumPy, or None."""
    if version() < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        # It takes scalars out of arrays of one element, which NumPy no longer does.
        return (
            f"Triton {triton.__version__} cannot interpret with NumPy {np.__version__}: install Triton 3.7 or newer, or"
            " NumPy below 2.4"
        )
    return None


def constants(dtype: torch.dtype) -> dict[str, str | bool]:
    """The constexprs PRECISION and UPCAST of a launch on dtype.

    float32 is multiplied as PyTorch's own products are: in TF32 only where ``torch.backends.cuda.matmul`` asks for it.
    """
    # Not allow_tf32: once anybody has used the newer switch, reading the older one is an error.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": interpreted()}
