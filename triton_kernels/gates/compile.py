"""Machine code of a ``KernelSpec`` for an architecture, on a machine that has none.

Triton compiles for a ``GPUTarget``; its own cache, keyed by the source of the kernel and of all that it calls, keeps
the code, and what was read from the code is kept beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from triton_kernels.configs import ARCHS
from triton_kernels.gates import facts, gcn, sass
from triton_kernels.gates.facts import Facts
from triton_kernels.spec import KernelSpec

TARGETS = {
    arch: GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    for arch in ARCHS
}
ELEMENT = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


class CompileError(Exception):
    """The compiler refused a kernel; the message is its last line."""


def compile_spec(spec: KernelSpec, dtype: str, arch: str) -> CompiledKernel:
    """Compile one kernel for one element type (``fp16``, ``bf16``, ``fp32``) and architecture.

    Raises:
        CompileError: the compiler refuses it, or kernels are being interpreted in this process.
    """
    if knobs.runtime.interpret:
        raise CompileError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    names = list(spec.kernel.arg_names)
    missing = set(names) ^ (set(spec.arguments) | set(spec.constexprs))
    if missing:
        raise CompileError(f"{spec.name}: the spec and the kernel disagree on {', '.join(sorted(missing))}")
    signature, hints = {}, {}
    for position, name in enumerate(names):
        argument = spec.arguments.get(name)
        signature[name] = argument.type.replace("T", dtype) if argument else "constexpr"
        if argument and argument.aligned and not argument.type.startswith("tensordesc"):
            hints[(position,)] = [["tt.divisibility", 16]]
    constants = {name: ELEMENT[dtype] if value == "T" else value for name, value in spec.constexprs.items()}
    source = ASTSource(spec.kernel, signature, constants, hints)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a refusal by ptxas is printed there in full
            return triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"{spec.name} for {arch} in {dtype}: {lines[0]}") from error


def facts_of(spec: KernelSpec, dtype: str, arch: str) -> Facts:
    """What the machine code of a kernel holds; from the cache where neither kernel nor reader has changed.

    Raises:
        CompileError: as ``compile_spec``.
    """
    compiled = compile_spec(spec, dtype, arch)
    readers = b"".join(Path(str(module.__file__)).read_bytes() for module in (facts, sass, gcn))
    cache = get_cache_manager(hashlib.sha256(compiled.hash.encode() + readers).hexdigest())
    kept = cache.get_file("facts.json")
    if kept is not None:
        return Facts(**json.loads(Path(kept).read_text(encoding="utf-8")))
    read: Callable[[CompiledKernel], Facts] = gcn.read if arch.startswith("gfx") else sass.read
    found = read(compiled)
    cache.put(json.dumps(asdict(found)), "facts.json", binary=False)
    return found
