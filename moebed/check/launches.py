"""Step ``kernels_launches``: what a launch of the Triton kernels asks of device, compiler and host.

R = T·K rows of T tokens with K experts each, H hidden.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moebed.check.contract import Found, NotRun, Place, Row, Verdict
from moebed.check.kernels import (
    NAMES,
    SMALL,
    TOLERANCES,
    Case,
    Size,
    call,
    judge,
    make_case,
    on_copies,
    require_interpreter,
)
from triton_kernels.mlp import expert_mlp

PAST_32_BITS = Size(150_000, 8, 8, 2048, 8)  # R·H = 2.4e9
PAST_32_BITS_BYTES = 60 << 30


def rows(place: Place) -> Sequence[Row]:
    """Rows of the step.

    Raises:
        NotRun: Triton cannot interpret here.
    """
    on = place.device
    require_interpreter(on)
    return [
        Row("no wait for the device", no_waits, gpus=1),
        Row("indices of any integer type", functools.partial(integer_types, on)),
        Row("an index outside asserts", outside, gpus=1),
        Row("R·H past 2^31", past_32_bits, gpus=1),
        Row("memory kept for the backward pass", kept_memory, gpus=1),
        Row("autocast", functools.partial(autocast, on)),
        Row("compiled in one graph", one_graph, gpus=1),
        Row("on a device that is not the current one", other_device, gpus=2),
        Row("a training step with these kernels", functools.partial(training_step, on)),
    ]


def integer_types(device: str) -> Found:
    """The choices are read as they are."""
    case = make_case(device, SMALL[device]._replace(top_k=2), torch.bfloat16)
    wanted = expert_mlp(*case[:3], case.topk_index, case.weight)
    types = (torch.int8, torch.uint8, torch.int16, torch.int32)
    off = [str(t) for t in types if not torch.equal(expert_mlp(*case[:3], case.topk_index.to(t), case.weight), wanted)]
    if off:
        return Found(f"{', '.join(off)} give another output than int64", verdict=Verdict.WRONG)
    return Found("int8, uint8, int16 and int32 give the bits of int64")


def autocast(device: str) -> Found:
    """float32 arguments."""
    case = make_case(device, SMALL[device], torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = expert_mlp(*case[:3], case.topk_index, case.weight)
    return Found(f"gives {out.dtype}", verdict=Verdict.WORKS if out.dtype == torch.bfloat16 else Verdict.WRONG)


@contextmanager
def waits(found: list[str]) -> Iterator[None]:
    """Notes where the host waits for the device while the block lasts: ``file:line``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "called a synchronizing" in str(each.message):  # not what the mode says of itself
            found.append("/".join(each.filename.replace("\\", "/").split("/")[-2:]) + f":{each.lineno}")


def no_waits() -> Found:
    """The sizes of all tensors follow from T, K and E alone, so no launch has to ask."""
    case, found = make_case("cuda", SMALL["cuda"], torch.bfloat16), list[str]()
    call(case)
    with waits(found):
        call(case)
    if found:
        return Found(f"waits {len(found)} times: {', '.join(found)}", {"waits": found}, Verdict.SLOW)
    return Found("forward and backward wait for nothing")


def past_32_bits() -> Found:
    """The last token's rows lie past what 32 bits address, forward and in the gradient of x."""
    size, free = PAST_32_BITS, torch.cuda.mem_get_info()[0]
    if free < PAST_32_BITS_BYTES:
        raise NotRun(f"needs {PAST_32_BITS_BYTES >> 30} GiB of free device memory; {free >> 30} are")
    index = torch.arange(size.experts, device="cuda").repeat(size.tokens, 1)
    case, tail = make_case("cuda", size, torch.bfloat16, index), slice(size.tokens - 64, size.tokens)
    few = case._replace(x=case.x.detach()[tail], weight=case.weight.detach()[tail], topk_index=index[tail])
    off = {}
    for name, ours, theirs in zip(("output", "x"), _output_and_dx(case), _output_and_dx(few), strict=True):
        off[name] = ((ours[-64:].float() - theirs.float()).norm() / theirs.float().norm()).item()
    return judge(off, TOLERANCES["cuda"][torch.bfloat16])


def _output_and_dx(case: Case) -> tuple[Tensor, Tensor]:
    x = case.x.detach().requires_grad_()
    out = expert_mlp(x, case.gate_up.detach(), case.down.detach(), case.topk_index, case.weight.detach())
    (gradient,) = torch.autograd.grad(out, x, out.detach())
    return out.detach(), gradient


_OUTSIDE = (
    "import torch; from triton_kernels import expert_mlp; d = dict(device='cuda', dtype=torch.bfloat16);"
    "expert_mlp(torch.ones(64, 64, **d), torch.ones(4, 128, 64, **d), torch.ones(4, 64, 64, **d),"
    " torch.full((64, 2), 4, device='cuda'), torch.ones(64, 2, device='cuda')); torch.cuda.synchronize()"
)


def outside() -> Found:
    """A device-side assertion ends a process's CUDA context, so it is looked at from outside."""
    done = subprocess.run([sys.executable, "-c", _OUTSIDE], capture_output=True, timeout=120)
    said = done.stderr.decode(errors="replace").lower()
    if done.returncode == 0:
        return Found("an index outside the experts is no error", verdict=Verdict.WRONG)
    if "illegal memory access" in said or "assert" not in said:
        return Found(f"it ends with {said.strip().splitlines()[-1][:200]}", {"stderr": said[-2000:]}, Verdict.WRONG)
    return Found("a device-side assertion, and nothing is read elsewhere")


def kept_memory() -> Found:
    """Beside the output, the pre-activations alone outlive the forward pass."""
    size = Size(4096, 16, 4, 512, 768)
    case = make_case("cuda", size, torch.bfloat16)
    expert_mlp(*case[:3], case.topk_index, case.weight)  # compiled, and its caches filled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = expert_mlp(*case[:3], case.topk_index, case.weight)
    held = torch.cuda.memory_allocated() - before - out.numel() * 2
    pre = size.tokens * size.top_k * 2 * size.width * 2
    figures = {"held": held, "pre_activations": pre}
    verdict = Verdict.WORKS if pre <= held < 1.05 * pre else Verdict.WRONG
    return Found(f"{held / pre:.3f} of the pre-activations", figures, verdict)


def one_graph() -> Found:
    """torch.compile, fullgraph."""
    case = make_case("cuda", Size(300, 8, 2, 256, 128), torch.bfloat16)
    compiled: Any = torch.compile(expert_mlp, fullgraph=True)
    wanted = call(case)
    off = [n for n, a, b in zip(NAMES, call(case, function=compiled), wanted, strict=True) if not torch.equal(a, b)]
    if off:
        return Found(f"compiled, {', '.join(off)} have other bits", verdict=Verdict.WRONG)
    return Found("the bits of the eager call")


def other_device() -> Found:
    """Tensors on cuda:1 while cuda:0 is current."""
    case = make_case("cuda", Size(300, 8, 2, 256, 136), torch.bfloat16)
    there = on_copies(case, lambda t: t.to("cuda:1"))
    there = there._replace(topk_index=case.topk_index.to("cuda:1"))
    off = [
        name
        for name, a, b in zip(NAMES[:1], call(there)[:1], call(case)[:1], strict=True)
        if not torch.equal(a.cpu(), b.cpu())
    ]
    return Found("another output" if off else "the same bits", verdict=Verdict.WRONG if off else Verdict.WORKS)


def training_step(device: str) -> Found:
    """Loss and all gradients of a small model, in float32, beside the loop over experts."""
    from moebed.model.config import ModelConfig
    from moebed.model.decoder import Decoder
    from moebed.model.losses import token_losses

    found = {}
    for backend in ("loop", "triton"):
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=24, experts_backend=backend,
        )  # fmt: skip
        decoder = Decoder(config).to(device)
        ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
        loss = token_losses(decoder(ids[:, :-1]).logits, ids[:, 1:].contiguous()).mean()
        loss.backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        found[backend] = {"loss": loss.detach(), **gradients}
    if found["loop"].keys() != found["triton"].keys():
        return Found("not the same parameters have gradients", verdict=Verdict.WRONG)
    off = {}
    for name, wanted in found["loop"].items():
        off[name] = ((found["triton"][name] - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()
    return judge(off, 1e-4)
