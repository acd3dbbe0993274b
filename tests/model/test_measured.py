"""What ``auto`` takes on a GPU: the file that ``moebed check`` leaves, and the choice by it, without a GPU."""

import json
import math
import warnings

import pytest
import torch

from moebed.model import experts as backends
from moebed.model import measured
from moebed.model.experts import Experts
from moebed.model.routing import Routing
from tests.conftest import tiny_config

DEVICE = "NVIDIA H200"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Writes what was found of DEVICE where ``auto`` looks."""
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)

    def write(least_work, **changes):
        measured._of_kind.cache_clear()
        path = measured.path_of(DEVICE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**json.loads(measured.content(DEVICE, least_work)), **changes}), encoding="utf-8")

    measured._of_kind.cache_clear()
    yield write
    measured._of_kind.cache_clear()


def test_least_work_by_type(kept):
    device = torch.device("cuda")
    assert measured.least_work(device, torch.bfloat16) == math.inf
    kept({"bfloat16": 5e8, "float16": None})
    assert measured.least_work(device, torch.bfloat16) == 5e8
    assert measured.least_work(device, torch.float16) == math.inf
    assert measured.least_work(device, torch.float32) == math.inf


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch": "2.0.0"}, "was measured with torch 2.0.0"),
        ({"source": "another"}, "was measured with source another"),
        ({"device": DEVICE, "torch": ["2"]}, "was measured with torch"),
    ],
)
def test_another_version_or_a_broken_file_serves_no_one(kept, changes, words):
    kept({"bfloat16": 0.0}, **changes)
    with pytest.warns(UserWarning, match=words):
        assert measured.least_work(torch.device("cuda"), torch.bfloat16) == math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert measured.least_work(torch.device("cuda"), torch.bfloat16) == math.inf


def _choice(monkeypatch, tokens, width=24, gated=False):
    """Whether these experts on this many tokens go to the kernels."""
    config = tiny_config(moe_intermediate_size=width)
    experts = Experts(config, config.layer(0))
    index = torch.zeros(tokens, 2, dtype=torch.int64)
    x, weight = torch.zeros(tokens, config.hidden_size), torch.ones(tokens, 2)
    experts.no_kernel = "they have a gate of their own" if gated else None
    from triton_kernels.mlp import checks

    for name in ("has_triton", "runs_on_cpu"):
        monkeypatch.setattr(checks, name, lambda: True)
    monkeypatch.setattr(checks, "why_not_interpreted", lambda: None)
    routing = Routing(topk_index=index, topk_weight=weight, router_probs=weight, router_logits=weight)
    return backends._takes_triton(experts, x, routing)


def test_the_kernels_serve_from_the_measured_size_on(kept, monkeypatch):
    width = tiny_config().hidden_size
    assert not _choice(monkeypatch, 100)
    kept({"float32": 100 * 2 * width * 24})
    assert not _choice(monkeypatch, 99)
    assert _choice(monkeypatch, 100)
    assert not _choice(monkeypatch, 100, gated=True)
    assert not _choice(monkeypatch, 1000, width=20)  # no multiple of 8: the reference would serve
