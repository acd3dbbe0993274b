"""Routing metadata: which rows of the sorted order belong to which expert. Stable, without atomics.

T tokens, K experts per token, A = T·K assignments (also the rows R), E experts; sizes are run-time values.

A counting sort. Each program of ``count`` counts BLOCK assignments to EXPERTS experts; ``scan`` sums the blocks of one
expert, in steps of SCAN blocks; ``tiles`` sums the experts and writes the table of tiles that the grouped products
walk; ``place`` puts each assignment into its row. Within an expert, rows keep the order of the tokens. Few assignments
take one launch, ``route_small``, one program that does all of it. Nothing is read back on the host, so the sizes of
all tensors depend on T, K, E and BM alone.

An assignment outside the experts is left out and counted as expert E; an absent one (ragged) is left out.
"""

import triton
import triton.language as tl

SIZES = ["size", "E", "K", "num_blocks", "num_tiles"]  # no compilation of its own for a 1 or a multiple of 16


@triton.jit
def read_experts(index, weight, i, size, E, RAGGED: tl.constexpr):
    """Experts of assignments i: E for one outside the experts, -1 for none.

    Where RAGGED, an assignment of weight 0 is none, and so is the index -1.
    """
    # Compared in 64 bits, so that no index comes back into the range by losing its upper ones.
    wanted = tl.load(index + i, mask=i < size, other=0).to(tl.int64)
    expert = tl.where((wanted >= 0) & (wanted < E), wanted, E).to(tl.int32)
    none = i >= size
    if RAGGED:
        none = none | (wanted == -1) | (tl.load(weight + i, mask=i < size, other=0.0) == 0.0)
    return tl.where(none, -1, expert)


@triton.jit
def place_block(expert, experts, base, i, size, K, E, order, token, slot):
    """Rows of the assignments i to these experts, whose next free rows are base; how many each expert got."""
    hit = ((expert[:, None] == experts[None, :]) & (experts < E)[None, :]).to(tl.int32)
    row = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + base[None, :]), 1)
    mine = tl.sum(hit, 1) > 0
    tl.store(order + row, i, mask=mine)
    tl.store(token + row, i // K, mask=mine)
    tl.store(slot + i, row, mask=mine)
    return tl.sum(hit, 0)


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    index, weight, counts, size, E, num_blocks,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """counts[e, block] = assignments of the block to expert e; e = E counts those outside."""
    block = tl.program_id(0)
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    expert = read_experts(index, weight, block * BLOCK + tl.arange(0, BLOCK), size, E, RAGGED)
    hit = (expert[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + experts.to(tl.int64) * num_blocks + block, tl.sum(hit, 0), mask=experts <= E)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(counts, totals, num_blocks, SCAN: tl.constexpr):
    """A line of counts becomes what comes before each block in the same expert; totals[e] is its sum."""
    expert = tl.program_id(0)
    line = counts + expert.to(tl.int64) * num_blocks
    total = 0
    for first in range(0, num_blocks, SCAN):
        blocks = first + tl.arange(0, SCAN)
        count = tl.load(line + blocks, mask=blocks < num_blocks, other=0)
        tl.store(line + blocks, total + tl.cumsum(count, 0) - count, mask=blocks < num_blocks)
        total += tl.sum(count, 0)
    tl.store(totals + expert, total)


@triton.jit(do_not_specialize=SIZES)
def tiles_kernel(
    totals, offsets, tile_expert, tile_start, tile_count, inside, E, num_tiles,
    BLOCK_M: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Program e < E: offsets[e], the first row of expert e, and its tiles.

    Tile i < tile_count covers rows tile_start[i] to tile_start[i] + BM of expert tile_expert[i]; -1 after them, which
    program E writes, with tile_count, and inside, which is 1 unless an assignment is outside the experts.
    """
    expert = tl.program_id(0)
    row = 0
    tile = 0
    for first in range(0, expert, SCAN):
        others = first + tl.arange(0, SCAN)
        total = tl.load(totals + others, mask=others < expert, other=0)
        row += tl.sum(total, 0)
        tile += tl.sum((total + BLOCK_M - 1) // BLOCK_M, 0)
    mine = tl.load(totals + expert)
    tl.store(offsets + expert, row)
    number = expert
    last = tile + (mine + BLOCK_M - 1) // BLOCK_M
    if expert == E:
        tl.store(tile_count, tile)
        tl.store(inside, (mine == 0).to(tl.int32))
        number = -1
        last = num_tiles
    for first in range(tile, last, SCAN):
        tiles = first + tl.arange(0, SCAN)
        tl.store(tile_expert + tiles, tl.zeros((SCAN,), tl.int32) + number, mask=tiles < last)
        tl.store(tile_start + tiles, row + (tiles - tile) * BLOCK_M, mask=tiles < last)


@triton.jit(do_not_specialize=SIZES)
def place_kernel(
    index, weight, counts, offsets, order, token, slot, size, K, E, num_blocks,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """order[row] = assignment, token[row] = its token, slot[assignment] = row, or -1 for one that is left out."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    expert = read_experts(index, weight, i, size, E, RAGGED)
    base = tl.load(counts + experts.to(tl.int64) * num_blocks + block, mask=experts < E, other=0)
    base += tl.load(offsets + experts, mask=experts < E, other=0)
    place_block(expert, experts, base, i, size, K, E, order, token, slot)
    if tl.program_id(1) == 0:
        tl.store(slot + i, -1, mask=(i < size) & ((expert < 0) | (expert == E)))


@triton.jit(do_not_specialize=SIZES)
def route_small_kernel(
    index, weight, offsets, order, token, slot, tile_expert, tile_start, tile_count, inside, size, K, E, num_tiles,
    RAGGED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """What the four kernels above write, by one program."""
    row = 0
    tile = 0
    for part in range(0, E, EXPERTS):
        experts = part + tl.arange(0, EXPERTS)
        total = tl.zeros((EXPERTS,), tl.int32)
        for first in range(0, size, BLOCK):
            expert = read_experts(index, weight, first + tl.arange(0, BLOCK), size, E, RAGGED)
            hit = (expert[:, None] == experts[None, :]) & (experts < E)[None, :]
            total += tl.sum(hit.to(tl.int32), 0)
        base = row + tl.cumsum(total, 0) - total
        tl.store(offsets + experts, base, mask=experts < E)
        tiles = (total + BLOCK_M - 1) // BLOCK_M
        before = tile + tl.cumsum(tiles, 0) - tiles
        for first in range(0, num_tiles, BLOCK):
            place = first + tl.arange(0, BLOCK)
            mine = (place[:, None] >= before[None, :]) & (place[:, None] < (before + tiles)[None, :])
            start = base[None, :] + (place[:, None] - before[None, :]) * BLOCK_M
            found = tl.sum(mine.to(tl.int32), 1) > 0
            tl.store(tile_expert + place, tl.sum(tl.where(mine, experts[None, :], 0), 1), mask=found)
            tl.store(tile_start + place, tl.sum(tl.where(mine, start, 0), 1), mask=found)
        row += tl.sum(total, 0)
        tile += tl.sum(tiles, 0)
        for first in range(0, size, BLOCK):
            i = first + tl.arange(0, BLOCK)
            expert = read_experts(index, weight, i, size, E, RAGGED)
            base += place_block(expert, experts, base, i, size, K, E, order, token, slot)
    outside = 0
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        expert = read_experts(index, weight, i, size, E, RAGGED)
        outside += tl.sum((expert == E).to(tl.int32), 0)
        tl.store(slot + i, -1, mask=(i < size) & ((expert < 0) | (expert == E)))
    for first in range(tile, num_tiles, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(tile_expert + place, -1, mask=place < num_tiles)
        tl.store(tile_start + place, 0, mask=place < num_tiles)
    tl.store(offsets + E, row)
    tl.store(tile_count, tile)
    tl.store(inside, (outside == 0).to(tl.int32))
