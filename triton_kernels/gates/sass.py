"""NVIDIA machine code as ``nvdisasm`` prints it: its loops, and what the main one holds.

The main loop is the innermost natural loop with the most matrix instructions. Of it counts the shortest way from its
head through these instructions to its back edge: neither waiting loops, nor what a flat kernel does between two tiles.
"""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from triton import knobs
from triton.compiler.compiler import CompiledKernel

from triton_kernels.gates.facts import Facts

LABEL = re.compile(r"^(\.\S+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@\S+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);?")
TARGET = re.compile(r"`\((\.\S+?)\)")
MMA = re.compile(r"^(HGMMA|HMMA|UTC[A-Z]*MMA|IMMA|IGMMA|QGMMA)\b")
HGMMA_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")
HMMA_SHAPE = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
WIDTH = re.compile(r"\.(128|64)\b")
# Multiply-adds a cycle of the four tensor cores of an SM together: a 16-bit type (H100, A100), halved for TF32.
HGMMA_RATE, HMMA_RATE = 2048, 1024


@dataclass(frozen=True)
class Instruction:
    """One line: what guards it, its name with modifiers, and its operands."""

    guard: str
    name: str
    operands: str


@dataclass(frozen=True)
class Block:
    """Straight-line code: its instructions and the numbers of the blocks that can follow."""

    instructions: list[Instruction]
    next: list[int]


def disassemble(cubin: bytes) -> str:
    """Text of a cubin, with labels in place of addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    return done.stdout


def parse(text: str) -> list[Block]:
    """Basic blocks in the order of their addresses."""
    groups: list[list[Instruction]] = [[]]
    starts: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            if groups[-1]:
                groups.append([])
            starts[label[1]] = len(groups) - 1
        elif found := INSTRUCTION.match(line):
            groups[-1].append(Instruction((found[1] or "").strip(), found[2], found[3].strip()))
            if found[2].split(".")[0] in ("BRA", "EXIT", "RET", "BRX"):
                groups.append([])
    blocks = []
    for number, group in enumerate(groups):
        follows = []
        last = group[-1] if group else None
        name = last.name.split(".")[0] if last else ""
        if last is not None and name == "BRA" and (target := TARGET.search(last.operands)):
            follows.append(starts[target[1]])
        # "BRA !UP0, `(label)" is conditional as "@P0 BRA `(label)" is.
        leaves = last is not None and name in ("BRA", "EXIT", "RET", "BRX") and not last.guard
        conditional = last is not None and name == "BRA" and re.match(r"!?U?P\d", last.operands)
        if (not leaves or conditional) and number + 1 < len(groups):
            follows.append(number + 1)
        blocks.append(Block(group, follows))
    return blocks


def natural_loops(blocks: list[Block]) -> list[tuple[int, int, set[int]]]:
    """Loops as (head, last block, members): an edge to a block that dominates the edge's origin closes one."""
    before: list[set[int]] = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        for follower in block.next:
            before[follower].add(number)
    everything = set(range(len(blocks)))
    # What no branch reaches (targets of jump tables) is entered from outside.
    dominators = [{n} if n == 0 or not before[n] else set(everything) for n in everything]
    changed = True
    while changed:
        changed = False
        for number in everything:
            if number and before[number]:
                found = set.intersection(*(dominators[b] for b in before[number])) | {number}
                if found != dominators[number]:
                    dominators[number], changed = found, True
    loops = []
    for number, block in enumerate(blocks):
        for head in block.next:
            if head in dominators[number]:
                members, todo = {head}, [number]
                while todo:
                    member = todo.pop()
                    if member not in members:
                        members.add(member)
                        todo += before[member]
                loops.append((head, number, members))
    return loops


def shortest_way(blocks: list[Block], members: set[int], start: int, end: int) -> list[int]:
    """Blocks after start, up to end, on the way of the fewest instructions in members; none where there is no way."""
    waiting: list[tuple[int, int, list[int]]] = [(0, start, [])]
    seen: set[int] = set()
    while waiting:
        length, number, way = heapq.heappop(waiting)
        if number == end:
            return way
        if number not in seen:
            seen.add(number)
            for follower in set(blocks[number].next) & members - seen:
                heapq.heappush(waiting, (length + len(blocks[follower].instructions), follower, [*way, follower]))
    return []


def main_loop(blocks: list[Block]) -> list[Instruction]:
    """Instructions once around the innermost loop with the most matrix instructions; none where there is no such."""
    found = []
    loops = natural_loops(blocks)
    for head, last, members in loops:
        # Matrix instructions that a loop inside this one holds are that one's.
        inner = {n for h, _, m in loops if m < members and h != head for n in m}
        own = {n: sum(bool(MMA.match(i.name)) for i in blocks[n].instructions) for n in members - inner}
        stops = [head, *(n for n in sorted(own) if own[n] and n not in (head, last)), last]
        way = [head, *(n for pair in itertools.pairwise(stops) for n in shortest_way(blocks, members, *pair))]
        code = [i for n in way for i in blocks[n].instructions]
        if any(own.values()):
            found.append((sum(own.values()), -len(code), code))
    return max(found, key=lambda entry: entry[:2])[2] if found else []


def products(code: list[Instruction]) -> tuple[int, float]:
    """FLOPs that one issuer of matrix instructions issues in this code, and cycles that these keep its units busy."""
    flops, cycles = 0, 0.0
    for instruction in code:
        slow = 2 if ".TF32" in instruction.name else 1
        if shape := (instruction.name.startswith("HGMMA") and HGMMA_SHAPE.search(instruction.name + ".")):
            m, n, k = (int(size) for size in shape.groups())
            flops += 2 * m * n * k
            cycles += m * n * k / HGMMA_RATE * slow
        elif instruction.name.startswith("HMMA"):
            m, n, k = HMMA_SHAPE.get(instruction.name.split(".")[1], (0, 0, 0))
            flops += 2 * m * n * k
            cycles += m * n * k / (HMMA_RATE / 4) * slow  # a warp has one of the four tensor cores
    return flops, cycles


def _narrow(code: list[Instruction], *names: str) -> int:
    return sum(i.name.split(".")[0] in names and ".128" not in i.name for i in code)


def _count(code: list[Instruction], *names: str) -> int:
    return sum(i.name.split(".")[0] in names for i in code)


def _widths(code: list[Instruction]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for instruction in code:
        name = instruction.name.split(".")[0]
        if name == "LDGSTS":
            width = WIDTH.search(instruction.name)
            found[width[1] if width else "32"] += 1
        elif name == "UTMALDG":
            found["tma"] += 1
    return dict(found)


def _in_flight(code: list[Instruction]) -> int:
    for instruction in code:
        if instruction.name.startswith("WARPGROUP.DEPBAR"):
            return int(instruction.operands.split(",")[-1], 16)
    return -1


def ttgir_conversions(text: str) -> int:
    """Layout conversions in the innermost loops of Triton's GPU dialect that hold a product; index vectors excepted.

    A loop around another that holds one is not innermost, even where a product was moved out of the inner loop. What an
    "if" without a product holds is not done in each step, such as what a flat kernel does between two tiles.
    """
    open_regions: list[dict[str, int]] = []
    most = 0
    for line in text.splitlines():
        for kind in re.findall(r"scf\.for|[{}]", re.sub(r"\{[^{}]*\}", "", line)):
            if kind == "scf.for" or (kind == "{" and "scf.for" not in line):
                open_regions.append({"loop": kind == "scf.for", "products": 0, "conversions": 0, "inner": 0})
            elif kind == "}" and open_regions:
                closed = open_regions.pop()
                innermost = closed["loop"] and closed["products"] and not closed["inner"]
                if innermost:
                    most = max(most, closed["conversions"])
                if open_regions:
                    outer = open_regions[-1]
                    outer["inner"] += innermost or closed["inner"]
                    if not closed["loop"] and closed["products"]:  # an "if" inside belongs to its loop
                        outer["products"] += closed["products"]
                        outer["conversions"] += closed["conversions"]
        if open_regions and re.search(r"(tt\.dot|warp_group_dot|tc_gen5_mma) ", line):
            open_regions[-1]["products"] += 1
        if open_regions and "ttg.convert_layout" in line and re.search(r"-> tensor<\d+x\d+x", line):
            open_regions[-1]["conversions"] += 1
    return most


def read(compiled: CompiledKernel) -> Facts:
    """Facts of one kernel that was compiled for an NVIDIA architecture."""
    text = disassemble(compiled.asm["cubin"])
    blocks = parse(text)
    everything = [instruction for block in blocks for instruction in block.instructions]
    loop = main_loop(blocks)
    flops, cycles = products(loop)
    ttgir = compiled.asm["ttgir"]
    buffers = [int(count) for count in re.findall(r"memdesc<(\d+)x\d+x\d+x[a-z]+\d+, [^>]*#smem", ttgir)]
    return Facts(
        registers=int(re.search(r"REG:(\d+)", _resources(compiled.asm["cubin"]))[1]),  # type: ignore[index]
        spills=_count(everything, "LDL", "STL"),
        loop_spills=_count(loop, "LDL", "STL"),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        loop=len(loop),
        mma=dict(Counter(found[1] for i in loop if (found := MMA.match(i.name)))),
        mma_flops=flops,
        tensor_cycles=cycles,
        loads=_widths(loop),
        narrow_loads=_narrow(loop, "LDGSTS", "LDG", "LD"),
        plain_loads=_count(loop, "LDG", "LD"),
        shared_stores=_count(loop, "STS", "STSM"),
        shared_loads=_count(loop, "LDS", "LDSM"),
        conversions=ttgir_conversions(ttgir),
        narrow_stores=_narrow(everything, "STG", "ST"),
        wide_stores=_count(everything, "STG", "ST", "UTMASTG") - _narrow(everything, "STG", "ST"),
        in_flight=_in_flight(loop),
        stages=max(buffers, default=0),
    )


def _resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=True
        ).stdout
