"""Pairs are matched at their optimum, and their cosines are those of the neurons."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from probes.measures import matching
from probes.measures.matching import match_pairs


def neurons(kind: str, size: int, width: int, strength: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, size, width, generator=generator)
    noise = (1 - strength**2) ** 0.5 * b
    order = torch.randperm(size, generator=generator)
    if kind == "correlated":
        b = strength * a + noise
    elif kind == "permuted":
        b = (strength * a + noise)[order]
    elif kind == "tied":
        a[size // 2 :] = a[: size - size // 2].clone()
        b = (strength * a + 0 * noise)[order]
    elif kind == "few values":
        a, b = a.sign(), b.sign()
    elif kind == "hubs":
        b[:: max(1, size // 3)] = a.mean(dim=0)
        b += 0.5 * a.mean(dim=0) * width**0.5
    elif kind == "constant":
        a, b = torch.ones_like(a), torch.ones_like(b)
    elif kind == "leaning":  # more or less of one direction
        lean = torch.rand(2, size, 1, generator=generator)
        common = torch.randn(width, generator=generator)
        a, b = strength * b + a + lean[0] * common, b + lean[1] * common
    elif kind == "clusters":  # unequal numbers in each
        centre = torch.randn(4, width, generator=generator)
        a, b = (m + centre[torch.randint(4, (size,), generator=generator)] for m in (a, b))
    elif kind == "dead":
        a[: size // 3], b[size // 2 :] = 0, 0
    return a, b


def similarity_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_pairs(dtype, threads):
    torch.set_num_threads(threads)  # the fixture restores it
    experts = [m.to(dtype) for m in (*neurons("permuted", 300, 40, 0.5, 1), *neurons("random", 300, 40, 0, 2))]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    before = torch.backends.mkldnn.matmul.fp32_precision
    found = list(match_pairs(experts.__getitem__, pairs, 4))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.get_num_threads() == threads
    assert [(m.first, m.second) for m in found] == pairs
    for match in found:
        a, b = experts[match.first].double(), experts[match.second].double()
        similarity = similarity_of(a, b).numpy()
        best = linear_sum_assignment(similarity, maximize=True)[1]
        rows = np.arange(300)
        assert similarity[rows, match.permutation].sum() == pytest.approx(similarity[rows, best].sum(), abs=1e-5)
        for cosine, other in ((match.cosine_before, b), (match.cosine_after, b[match.permutation])):
            assert cosine == pytest.approx(float((a * other).sum() / a.norm() / b.norm()), abs=1e-6)


def test_float32_is_not_rounded():
    """Neurons that differ by less than bfloat16 can say are told apart."""
    base = torch.randn(1, 64)
    a = base + 1e-3 * torch.randn(300, 64)
    order = torch.randperm(300)
    (match,) = match_pairs([a, a[order]].__getitem__, [(0, 1)], 2)
    assert np.array_equal(match.permutation, order.argsort().numpy())


def test_dead_and_diverged_experts():
    experts = [torch.randn(5, 3), torch.zeros(5, 3), torch.full((5, 3), torch.nan)]
    dead, diverged, _ = match_pairs(experts.__getitem__, [(0, 1), (0, 2), (1, 2)], 3)
    assert (dead.cosine_before, dead.cosine_after) == (0, 0)
    assert dead.permutation.tolist() == diverged.permutation.tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(diverged.cosine_after)


def test_memory_decides_how_many_pairs_are_under_work(monkeypatch):
    assert matching._plan(1408, 2048, 2)[0] == 2
    monkeypatch.setattr(matching, "_MEMORY_BUDGET", 3 << 30)
    assert matching._plan(14336, 4096, 2)[0] == 1
    assert matching._plan(60000, 4096, 2)[0] == 1
    assert matching._plan(1408, 2048, 2, 60 << 20)[0] == 1
    assert matching._plan(1408, 2048, 2, 1 << 30)[0] == 2


def test_stopping_early_leaves_nothing_behind():
    before = torch.backends.mkldnn.matmul.fp32_precision
    experts = torch.randn(6, 20, 8)
    found = match_pairs(experts.__getitem__, [(i, j) for i in range(6) for j in range(i)], 6)
    next(found)
    assert torch.backends.mkldnn.matmul.fp32_precision not in (before, "tf32")
    found.close()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
