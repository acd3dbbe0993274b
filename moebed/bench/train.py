"""``moebed bench train``: tokens per second of a training step, beside the peers, as ratios of one run.

Every contestant takes the same step on the same batches in the same precision: forward, cross entropy, backward, fused
AdamW, zero gradients. Rounds alternate between contestants, so that a slow moment of the machine falls on all of them,
and only ratios within a round are compared, eager against eager and compiled against compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebed.machine.allocator import keep_freed_memory
from moebed.machine.progress import say
from moebed.model import native
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.losses import token_losses
from moebed.model.routers import RouterSteps
from moebed.training.optim import OptimizerConfig, build_optimizer


@dataclass(frozen=True)
class Size:
    """A model and the batch it is trained on."""

    model: ModelConfig
    batch_size: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.sequence_length


def mixtral(hidden: int, width: int, layers: int, experts: int, top_k: int, vocab: int) -> ModelConfig:
    """A Mixtral with heads of 32 and no balancing loss."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        router_aux_loss_coef=0.0,
    )


SIZES = {
    "A": Size(mixtral(256, 512, 4, 8, 2, 4096), 8, 256),
    "F": Size(mixtral(256, 128, 4, 32, 4, 4096), 8, 256),
    "B": Size(mixtral(512, 1024, 6, 16, 2, 8192), 4, 512),
}


def dense_of_equal_flops(config: ModelConfig) -> ModelConfig:
    """The dense model whose FFN is as wide as the experts that one token passes."""
    layer = config.layer(0)
    width = layer.num_experts_per_tok * layer.moe_intermediate_size + layer.shared_intermediate_size
    return dataclasses.replace(config, num_experts=0, intermediate_size=width)


TRANSFORMERS_EXPERTS = ("grouped_mm", "eager")
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}  # Lightning's names; the type of products
NOTES = [
    "'native' is experts_backend native, where it can be compiled; the others take what auto stands for",
    "transformers' batched_mm copies an expert's weights for every token and is left out",
    "transformers' eager experts loop over counts that differ in every step; compiled, they are left out",
    "'matrix products alone' is the most that a step with PyTorch's own products can reach here",
]

Step = Callable[..., float]  # takes one item of a feed
Feed = Callable[[int], Iterator[tuple[Any, ...]]]  # what the steps take, endlessly, by seed


def _precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """What a forward pass runs in: autocast, or nothing in float32."""
    mixed = PRECISIONS[precision] != torch.float32
    return torch.autocast(device.type, dtype=PRECISIONS[precision]) if mixed else contextlib.nullcontext()


def _training_step(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], device: torch.device, precision: str
) -> Step:
    optimizer = build_optimizer(model, OptimizerConfig())

    def step(input_ids: Tensor, labels: Tensor) -> float:
        with _precision(precision, device):
            value = loss(input_ids, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def own_step(config: ModelConfig, device: torch.device, compile: bool, precision: str) -> Step:
    """A step of our decoder."""
    decoder = Decoder(config).to(device)

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        return token_losses(decoder(input_ids).logits, labels).mean()

    forward = torch.compile(loss, fullgraph=True, dynamic=False) if compile else loss
    routers, count = RouterSteps(decoder.routers), itertools.count()

    def begun(input_ids: Tensor, labels: Tensor) -> Tensor:
        routers.begin(next(count))
        return forward(input_ids, labels)

    return _training_step(decoder, begun, device, precision)


def transformers_step(
    config: ModelConfig, device: torch.device, experts_implementation: str, compile: bool, precision: str
) -> Step:
    """A step of transformers' MixtralForCausalLM of the same sizes, with its own cross entropy."""
    from transformers import MixtralConfig, MixtralForCausalLM

    layer = config.layer(0)
    hf_config = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=layer.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.num_experts_per_tok,
        use_cache=False,
    )
    hf_config._experts_implementation = experts_implementation
    model: Any = MixtralForCausalLM(hf_config)
    model.to(device).train()

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=input_ids, labels=labels, shift_labels=labels).loss

    # Where a graph breaks, it may: what compiles is compiled.
    forward = torch.compile(loss, dynamic=False) if compile else loss
    return _training_step(model, forward, device, precision)


def products_step(config: ModelConfig, tokens: int, device: torch.device, precision: str) -> Step:
    """The matrix products of a step and nothing else: projections, head and evenly loaded experts, times three.

    No way of training can be faster with these products; attention's own are left out.
    """
    assert config.head_dim is not None
    hidden, layer = config.hidden_size, config.layer(0)
    width = layer.moe_intermediate_size
    rows = tokens * layer.num_experts_per_tok // layer.num_experts
    shapes = {
        (tokens, hidden, config.num_attention_heads * config.head_dim): 4 * config.num_hidden_layers,
        (rows, hidden, 2 * width): layer.num_experts * config.num_hidden_layers,
        (rows, width, hidden): layer.num_experts * config.num_hidden_layers,
        (tokens, hidden, config.vocab_size): 1,
    }
    return bare_products(shapes, device, PRECISIONS[precision], backward=True)


def bare_products(
    shapes: dict[tuple[int, int, int], int], device: torch.device, dtype: torch.dtype, backward: bool
) -> Step:
    """Products by (rows, in, out) and how often each occurs in a step; with backward, their gradients' as well."""
    work = []
    for (m, k, n), count in shapes.items():
        x, weight, grad = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (m, n)))
        work.append((x, weight, grad, count))

    def step(*item: Any) -> float:
        for x, weight, grad, count in work:
            for _ in range(count):
                torch.mm(x, weight.t())
                if backward:
                    torch.mm(grad, weight)
                    torch.mm(grad.t(), x)
        return 0.0

    return step


def batches(size: Size, device: torch.device, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens with the skew of text (a Zipf law), so that experts are loaded unevenly."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, size.model.vocab_size + 1)
    while True:
        ids = torch.multinomial(weights, size.tokens + size.batch_size, replacement=True, generator=generator)
        ids = ids.view(size.batch_size, -1).to(device)
        yield ids[:, :-1], ids[:, 1:].contiguous()


@dataclass
class Measured:
    """Seconds a step of every contestant, one list entry a round."""

    tokens: int
    seconds: dict[str, list[float]]

    def ratios(self, name: str, base: str) -> list[float]:
        """Speed of name over speed of base, round by round."""
        return [b / a for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]

    def tokens_per_second(self, name: str) -> float:
        """Median over rounds."""
        return self.tokens / statistics.median(self.seconds[name])


def measure(
    contestants: dict[str, Step],
    size: Size,
    device: torch.device,
    rounds: int,
    steps: int,
    progress: Callable = say,
    feed: Feed | None = None,
) -> Measured:
    """Time all contestants in alternation, after a warm-up of each; without a feed they take batches of tokens."""
    feed = feed or (lambda seed: batches(size, device, seed))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    data = list(itertools.islice(feed(0), WARM_UP))
    for name, step in contestants.items():
        begin = time.perf_counter()
        for item in data:
            step(*item)
        _synchronize(device)
        progress(f"warm-up of {name}: {time.perf_counter() - begin:.1f} s")
    for index in range(rounds):
        data = list(itertools.islice(feed(index + 1), steps))
        for name, step in contestants.items():
            _synchronize(device)
            begin = time.perf_counter()
            for item in data:
                step(*item)
            _synchronize(device)
            seconds[name].append((time.perf_counter() - begin) / steps)
        progress(f"round {index + 1} of {rounds}")
    return Measured(size.tokens, seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


PRODUCTS_ALONE = "matrix products alone"
WARM_UP = 3  # steps


def contestants_of(size: Size, device: torch.device, compile: bool, precision: str) -> dict[str, Step]:
    """Ours and the peers, by the name that the table shows; its last word says whether it is compiled."""
    models = {"moebed": size.model, "moebed dense": dense_of_equal_flops(size.model)}
    if device.type == "cpu" and native.load() is None:
        models["moebed native"] = dataclasses.replace(size.model, experts_backend="native")
    steps: dict[str, Step] = {}
    for compiled in (False, True) if compile else (False,):
        how = "compiled" if compiled else "eager"
        for implementation in TRANSFORMERS_EXPERTS:
            if compiled and implementation == "eager":
                continue
            name = f"transformers with {implementation} experts, {how}"
            steps[name] = transformers_step(size.model, device, implementation, compiled, precision)
        for name, model in models.items():
            steps[f"{name}, {how}"] = own_step(model, device, compiled, precision)
    steps[PRODUCTS_ALONE] = products_step(size.model, size.tokens, device, precision)
    return steps


def run(
    size_name: str,
    rounds: int,
    steps: int,
    compile: bool,
    device: str = "cpu",
    precision: str = "bf16-mixed",
) -> dict[str, Any]:
    """Measure one size; plain data for a table and for JSON."""
    size, target = SIZES[size_name], torch.device(device)
    torch.manual_seed(0)
    keep_freed_memory()  # the peers profit as well
    found = measure(contestants_of(size, target, compile, precision), size, target, rounds, steps)
    best = best_transformers(found)
    rows = []
    for name in found.seconds:
        row: dict[str, Any] = {"name": name, "tokens_per_second": found.tokens_per_second(name)}
        bases = {"best_transformers": best.get(_how(name)), "dense": _dense_peer(name), "products": PRODUCTS_ALONE}
        for label, base in bases.items():
            if base in found.seconds and base != name:
                ratios = sorted(found.ratios(name, base))
                row[f"over_{label}"] = [ratios[0], statistics.median(ratios), ratios[-1]]
        rows.append(row)
    sizes = (
        f"hidden {size.model.hidden_size}, {size.model.num_hidden_layers} layers, {size.model.num_experts} experts of "
        f"{size.model.moe_intermediate_size}, top-{size.model.num_experts_per_tok}, vocabulary "
        f"{size.model.vocab_size}, batch {size.batch_size} x {size.sequence_length}"
    )
    return {
        "size": size_name,
        "sizes": sizes,
        "precision": precision,
        "best_transformers": best,
        "rounds": rounds,
        "steps": steps,
        "notes": NOTES,
        "rows": rows,
    }


def best_transformers(found: Measured) -> dict[str, str]:
    """The fastest of transformers' contestants among those compiled, and among those that are not."""
    best: dict[str, str] = {}
    for name in found.seconds:
        if name.startswith("transformers"):
            best[_how(name)] = min(
                best.get(_how(name), name), name, key=lambda one: statistics.median(found.seconds[one])
            )
    return best


def _how(name: str) -> str:
    """Whether a contestant is compiled, by its name."""
    return "compiled" if name.endswith("compiled") else "eager"


def _dense_peer(name: str) -> str:
    """Our dense model, eager or compiled as the contestant is."""
    return f"moebed dense, {_how(name)}" if name.startswith("moebed") else ""
