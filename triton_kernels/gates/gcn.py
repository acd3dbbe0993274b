"""AMD machine code as Triton's own assembler text: registers, spills, matrix instructions."""

from __future__ import annotations

import re

from triton.compiler.compiler import CompiledKernel

from triton_kernels.gates.facts import Facts

LABEL = re.compile(r"^(\.LBB\S+):")
BRANCH = re.compile(r"^\s+s_c?branch\S*\s+(\.LBB\S+)")
INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]+)")


def main_loop(text: str) -> list[str]:
    """Names of the instructions in the shortest stretch that a backward branch closes around a matrix instruction."""
    lines: list[str] = []
    starts: dict[str, int] = {}
    best: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            starts[label[1]] = len(lines)
            continue
        if found := INSTRUCTION.match(line):
            lines.append(found[1])
        if (branch := BRANCH.match(line)) and branch[1] in starts:
            code = lines[starts[branch[1]] :]
            if any(name.startswith("v_mfma") for name in code) and (not best or len(code) < len(best)):
                best = code
    return best


def read(compiled: CompiledKernel) -> Facts:
    """Facts of one kernel that was compiled for an AMD architecture."""
    text = compiled.asm["amdgcn"]
    loop = main_loop(text)
    numbers = {
        name: int(found[1]) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else 0
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    products = [name for name in loop if name.startswith("v_mfma")]
    spilling = [name for name in loop if name.startswith("scratch_")]
    return Facts(
        registers=numbers["vgpr_count"],
        spills=numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
        loop_spills=len(spilling),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        loop=len(loop),
        mma={"v_mfma": len(products)} if products else {},
        shared_stores=sum(name.startswith("ds_write") for name in loop),
        shared_loads=sum(name.startswith("ds_read") for name in loop),
    )
