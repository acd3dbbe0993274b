"""Memory of one rank: what stays, and what is alive at each moment of a step; the largest moment is the peak.

P parameters' bytes on this rank, W ranks = D x X, r and c bytes of a parameter and of a product's operands.

What is counted are live tensors, and cuBLAS's workspaces. Left out are a CUDA context, NCCL's buffers, and freed memory
that an allocator holds and cannot reuse: on a CPU the C library's heap keeps what is freed (see
moebed.machine.allocator), and with activation checkpointing, whose large blocks come and go among what stays, that is
much (see tests/plan/test_plan_memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from moebed.model.flops import Shapes, count, layer_shapes, outer_shapes
from moebed.plan import activations
from moebed.plan.activations import Parts
from moebed.plan.setup import Setup

NOT_CAST = (
    "embedding",
    "norms",
    "router",
    "adapter embeddings",
)  # used in float32, or looked up, whatever the precision


BY_MUON = ("attention", "dense FFN", "router", "experts", "shared experts")  # but for vectors

# cuBLAS's, of the thread that goes forward and of autograd's: on an H100 or H200 PyTorch gives each 32 MiB, and less on
# what is older.
WORKSPACES = 2 * 2**25


class Moment(NamedTuple):
    """What is alive at one moment of a step, by part, in bytes."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def rank_elements(setup: Setup, shapes: Shapes) -> int:
    """Elements of these parameters on one rank.

    Routed experts are split over X on their first axis and sharded over D on their second, which D divides. Of all else
    the first axis n is cut into chunks of ceil(n / D·X) rows, and a rank with fewer rows keeps the padding (FSDP2).
    """
    total = 0
    for part, tensors in shapes.items():
        for first, *rest in tensors:
            if part == "experts":
                ranks = setup.layout.expert * (setup.layout.data if setup.layout.shard else 1)
                total += first * math.prod(rest) // ranks
            else:
                total += (-(-first // setup.world_size) if setup.layout.shard else first) * math.prod(rest)
    return total


def unsharded_elements(setup: Setup, shapes: Shapes) -> int:
    """Elements of these parameters once gathered: a rank gathers its own columns' experts, and all else."""
    experts = count(shapes.get("experts", []))
    return sum(map(count, shapes.values())) - experts + experts // setup.layout.expert


def matrices(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of two dimensions and more."""
    return [shape for shape in shapes if len(shape) > 1]


def all_shapes(setup: Setup) -> list[Shapes]:
    """Of everything outside the layers, then of each layer."""
    config = setup.config
    return [outer_shapes(config), *(layer_shapes(config, index) for index in range(config.num_hidden_layers))]


def state(setup: Setup) -> Parts:
    """What stays over a whole step beside gradients: P, AdamW's two moments 2·P, and what the strategy adds.

    Muon has one moment of what it trains.

    DDP copies gradients into buckets of the same size. FSDP2 keeps embedding, last norm and head gathered, the block
    in use and the next one (prefetched), in the dtype that they are gathered in.
    """
    shapes, parameter = all_shapes(setup), setup.precision.parameter
    own = parameter * sum(rank_elements(setup, part) for part in shapes)
    parts = {"parameters": own, "Adam's moments": 2 * own}
    if setup.optimizer == "muon":
        hidden = [
            {part: matrices(part_shapes) for part, part_shapes in one.items() if part in BY_MUON} for one in shapes
        ]
        by_muon = parameter * sum(rank_elements(setup, part) for part in hidden)
        parts["Adam's moments"] = 2 * (own - by_muon)
        parts["Muon's momentum"] = by_muon
    if setup.gathers:
        outer, *blocks = [setup.gathered_bytes * unsharded_elements(setup, part) for part in shapes]
        parts["gathered: embedding, head"] = outer
        parts["gathered: two blocks"] = sum(sorted(blocks)[-2:])
    elif setup.uses_ddp:
        parts["DDP buckets"] = own
    if setup.device == "gpu":
        parts["cuBLAS"] = WORKSPACES
    return parts


def _casts(setup: Setup, shapes: Shapes) -> tuple[int, int]:
    """Bytes of the weights that autocast casts: of linear maps (cached for the whole forward pass), and of experts.

    Where FSDP2 gathers in that dtype nothing is left to cast.
    """
    if not setup.precision.autocast or (setup.gathers and setup.gathered_bytes == setup.precision.compute):
        return 0, 0
    cast = {part: tensors for part, tensors in shapes.items() if part not in NOT_CAST}
    routed = count(cast.pop("experts", [])) // setup.layout.expert
    if "head" in cast and not cast["head"]:
        cast["head"] = shapes["embedding"]  # tied
    held = setup.precision.compute * routed if setup.casts_experts else 0
    return setup.precision.compute * sum(map(count, cast.values())), held


def exchange_buffers(setup: Setup, index: int) -> int:
    """N rows sent, c·H + 8·K bytes with their weights and indices, N received, and N results that come back, c·H each.

    Where ranks gather all tokens, N = X·T are received and have results, but T alone are sent and come back, summed.
    One layer at a time; the rows received, once for each expert that they are for, are counted with the dispatch rows.
    """
    if not setup.moves_tokens:
        return 0
    row, trips = setup.precision.compute * setup.config.hidden_size, setup.trips(index)
    beside = 8 * setup.config.layer(index).num_experts_per_tok
    if setup.layout.exchange == "all_gather":
        return round(trips * (2 * row + beside) + setup.tokens * 2 * row)
    return round(trips * (3 * row + beside))


def _ffn_backward(setup: Setup, index: int, max_violation: float) -> Parts:
    """What an FFN's backward pass has beside all that its block kept.

    Two gradients of its inner width, 2·c·R·F (T rows in a dense layer), or of experts those of what their down
    projection gives and takes, c·R·(H + F), if that is more; the gradient of its output, and the gradient that is made
    first, of the down projection (counted whole; sharded ones are counted as unsharded).
    """
    layer, compute = setup.config.layer(index), setup.precision.compute
    working = 2 * compute * setup.tokens * (setup.config.intermediate_size or 0)
    if layer.num_experts:
        width = layer.moe_intermediate_size
        working = compute * setup.expert_rows(index, max_violation) * (width + max(width, setup.config.hidden_size))
    working += activations.residual(setup)
    parts = {"gradients of activations": working, "exchange buffers": exchange_buffers(setup, index)}
    if not setup.gathers:
        shapes = layer_shapes(setup.config, index)
        part = "experts" if layer.num_experts else "dense FFN"
        split = setup.layout.expert if layer.num_experts else 1
        parts["gradients"] = setup.precision.parameter * count([shapes[part][-1]]) // split
    return parts


def _attention_backward(setup: Setup) -> Parts:
    """What attention's backward pass has beside what attention kept: by plain products, 2·c·T·A·S of its own."""
    pairs = setup.tokens * setup.config.num_attention_heads * setup.sequence_length
    mixing = 2 * setup.precision.compute * pairs if setup.keeps_attention_probabilities else 0
    return {"gradients of activations": mixing + activations.residual(setup)}


def moments(setup: Setup, max_violation: float = 0.0) -> Iterator[Moment]:
    """The moments of a step after the first that can be its peak, in order.

    The trainer frees the last step's gradients only between forward and backward pass, and with several micro-batches a
    step keeps them through all but the first, so gradients and activations are alive together. A step that looks ahead
    keeps no activations meanwhile, so that its peak is one of these too.
    """
    config, parameter = setup.config, setup.precision.parameter
    outer, *blocks = all_shapes(setup)
    fixed, layers = state(setup), range(config.num_hidden_layers)
    gradients = [parameter * rank_elements(setup, shapes) for shapes in blocks]
    outer_gradients = parameter * rank_elements(setup, outer)
    all_gradients = outer_gradients + sum(gradients)
    casts = [_casts(setup, shapes) for shapes in blocks]
    generator = {"adapter generator": outer.pop("adapter generator", [])}  # used by every layer, in both passes
    head_cast, _ = _casts(setup, outer)
    generator_cast, _ = _casts(setup, generator)
    logits = activations.logits(setup)
    stream = activations.residual(setup)

    def kept(number: int) -> Parts:
        """What the first so many blocks keep until the backward pass."""
        if setup.checkpointing:
            return {"kept inputs of blocks": sum(stream + activations.block_outputs(setup, i) for i in range(number))}
        return add(*(activations.block(setup, index, max_violation) for index in range(number)))

    def cast(number: int) -> Parts:
        """The cast weights that the first so many blocks need in the backward pass."""
        if setup.checkpointing:
            return {}
        return {"weights cast by autocast": sum(linear + routed for linear, routed in casts[:number])}

    def moment(name: str, *parts: Parts) -> Moment:
        return Moment(name, {part: size for part, size in add(fixed, *parts).items() if size})

    last = layers[-1]
    head_cast += generator_cast
    cached = head_cast + (sum(linear for linear, _ in casts) if setup.checkpointing else 0)
    whole = {"gradients": all_gradients}
    if setup.checkpointing:
        inner = activations.block(setup, last, max_violation)
        ffn_parts = ("dispatch rows", "expert activations", "adapters", "dense FFN")
        passing: Parts = {part: inner[part] for part in ffn_parts if part in inner}
        passing["exchange buffers"] = exchange_buffers(setup, last)
        passing["weights cast by autocast"] = cached - head_cast + casts[last][1]
        yield moment("forward pass of the last block", whole, kept(last), passing)
    end = {"logits and loss": logits + activations.cross_entropy(setup), "weights cast by autocast": cached}
    yield moment("end of the forward pass", whole, kept(len(layers)), cast(len(layers)), end)
    accumulated = all_gradients if setup.accumulate > 1 else 0
    again = setup.precision.compute * setup.tokens * config.vocab_size
    loss = {"logits and loss": logits + again, "weights cast by autocast": head_cast, "gradients": accumulated}
    yield moment("backward pass of the loss", kept(len(layers)), cast(len(layers)), loss)
    head_gradients = parameter * rank_elements(setup, {"head": outer["head"] or outer["embedding"]})
    # A layer's, and the sum of those of later layers, which are added to the accumulated ones once it is whole.
    generator_gradients = 2 * parameter * rank_elements(setup, generator)
    for index in reversed(layers):
        block = activations.block(setup, index, max_violation)
        others = (accumulated or head_gradients + sum(gradients[index + 1 :])) + generator_gradients
        common = cast(index + 1) | {"gradients": others}
        if setup.checkpointing:
            common["weights cast by autocast"] = sum(casts[index])
        common["weights cast by autocast"] = common.get("weights cast by autocast", 0) + generator_cast
        if setup.gathers:  # in the products' dtype, and in float32 on the way to the reduction
            elements = unsharded_elements(setup, blocks[index])
            common["unsharded gradients of a block"] = (4 + setup.precision.compute) * elements
        before = kept(index) if not setup.checkpointing else kept(index + 1)
        ffn = _ffn_backward(setup, index, max_violation)
        yield moment(f"backward pass of layer {index}", common, before, block, ffn)
        attention = {"attention": block["attention"]}, _attention_backward(setup)
        yield moment(f"backward pass of layer {index}'s attention", common, before, *attention)
    yield moment("optimizer step", whole)


def add(*all_parts: Parts) -> Parts:
    """Bytes summed part by part."""
    total: Parts = {}
    for parts in all_parts:
        for part, size in parts.items():
            total[part] = total.get(part, 0) + size
    return total


def peak(setup: Setup, max_violation: float = 0.0) -> Moment:
    """The moment at which most is alive."""
    return max(moments(setup, max_violation), key=attrgetter("total"))
