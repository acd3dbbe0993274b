"""Routing metadata: which rows of the sorted order belong to which expert. Stable, without atomics.

T tokens, K experts per token, A = T·K assignments (also the rows R), E experts.

A counting sort in three launches: each block of assignments counts its experts, one program turns the counts into
bases, each block places its assignments. Within an expert, rows keep the order of the tokens. A fourth launch
writes the table of tiles that the grouped products walk. Nothing is read back on the host, so the sizes of all
tensors depend on T, K, E and BM alone.
"""

import triton
import triton.language as tl


@triton.jit
def count_kernel(index, counts, size, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts[block, e] = assignments of the block to expert e."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BLOCK_E)
    chosen = tl.load(index + i, mask=i < size, other=-1).to(tl.int32)
    hit = (chosen[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + block * E + experts, tl.sum(hit, 0), mask=experts < E)


@triton.jit
def scan_kernel(counts, offsets, num_blocks, E: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Counts become what comes before them in the same expert; offsets[e] is the first row of expert e. One program."""
    experts = tl.arange(0, BLOCK_E)
    lines = tl.arange(0, CHUNK)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, num_blocks, CHUNK):
        inside = (first + lines < num_blocks)[:, None] & (experts < E)[None, :]
        cells = counts + (first + lines)[:, None] * E + experts[None, :]
        count = tl.load(cells, mask=inside, other=0)
        tl.store(cells, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    ends = tl.cumsum(total, 0)
    tl.store(offsets + 1 + experts, ends, mask=experts < E)
    tl.store(offsets + experts, ends - total, mask=experts == 0)


@triton.jit
def place_kernel(
    index, counts, offsets, order, token, slot, size,
    K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """order[row] = assignment, token[row] = its token, slot[assignment] = row, or -1 for an expert outside E."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BLOCK_E)
    chosen = tl.load(index + i, mask=i < size, other=-1).to(tl.int32)
    hit = (chosen[:, None] == experts[None, :]) & (experts < E)[None, :]
    base = tl.load(counts + block * E + experts, mask=experts < E, other=0)
    base += tl.load(offsets + experts, mask=experts < E, other=0)
    rank = tl.cumsum(hit.to(tl.int32), 0) - 1
    row = tl.sum(tl.where(hit, rank + base[None, :], 0), 1)
    valid = tl.sum(hit.to(tl.int32), 1) > 0
    tl.store(slot + i, tl.where(valid, row, -1), mask=i < size)
    tl.store(order + row, i, mask=valid)
    tl.store(token + row, i // K, mask=valid)


@triton.jit
def tiles_kernel(
    offsets, tile_expert, tile_start, tile_count, num_tiles,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tile i < tile_count covers rows tile_start[i] to tile_start[i] + BM of expert tile_expert[i]; -1 after them."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + experts, mask=experts < E, other=0)
    stop = tl.load(offsets + experts + 1, mask=experts < E, other=0)
    tiles = tl.where(experts < E, (stop - start + BLOCK_M - 1) // BLOCK_M, 0)
    after = tl.cumsum(tiles, 0)
    mine = (tile[:, None] >= (after - tiles)[None, :]) & (tile[:, None] < after[None, :])
    row = start[None, :] + (tile[:, None] - (after - tiles)[None, :]) * BLOCK_M
    found = tl.sum(mine.to(tl.int32), 1) > 0
    expert = tl.sum(tl.where(mine, experts[None, :], 0), 1)
    tl.store(tile_expert + tile, tl.where(found, expert, -1), mask=tile < num_tiles)
    tl.store(tile_start + tile, tl.sum(tl.where(mine, row, 0), 1), mask=tile < num_tiles)
    if tl.program_id(0) == 0:
        tl.store(tile_count, tl.sum(tiles, 0))
