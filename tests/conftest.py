"""Shared pieces of the tests."""

import gc
import io
import os
from pathlib import Path

# Several test processes share few cores: OpenMP threads of one would spin against those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs the network; without this, what asks for a missing repository waits for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from moebed.model import native
from moebed.model.config import ModelConfig
from moebed.model.native import compiled
from probes.figures import drawing

# Beside the checkout, where it is there. A test that reads it carries ``@pytest.mark.shared("what/it/reads")``.
SHARED = Path(__file__).resolve().parents[2] / "shared"
ORACLES = SHARED / "oracles"


def tiny_config(**changes) -> ModelConfig:
    """A Mixtral small enough for any test."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**sizes, **changes})


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a file of ``../shared`` that is not there."""
    for mark in item.iter_markers("shared"):
        missing = [name for name in mark.args if not (SHARED / name).exists()]
        if missing:
            pytest.skip(f"needs ../shared/{missing[0]}, which is not here")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what was imported and collected out of each garbage collection, which would walk through it many times."""
    gc.collect()
    gc.freeze()


def blank_png(fig) -> bytes:
    """A white PNG as large as the figure is."""
    buffer = io.BytesIO()
    Image.new("RGB", fig.canvas.get_width_height(), "white").save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


# As they are outside of tests; see ``_blank``.
DRAWN = ((drawing, "to_png", drawing.to_png), (ConstrainedLayoutEngine, "execute", ConstrainedLayoutEngine.execute))


@pytest.fixture(scope="session", autouse=True)
def _blank():
    """What commands write has figures that are built and not drawn, which takes several times as long as a small run.

    Tests of drawing call ``to_rgb``, which leaves out to find room for all labels, half of the work; or they carry
    ``@pytest.mark.drawn``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "to_png", blank_png)
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, fig: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _drawn_module(request, _blank):
    yield from _drawn_where_marked(request.node)


@pytest.fixture(autouse=True)
def _drawn_test(request, _blank):
    yield from _drawn_where_marked(request.node)


def _drawn_where_marked(node):
    with pytest.MonkeyPatch.context() as patch:
        for where, name, drawn in DRAWN if node.get_closest_marker("drawn") else ():
            patch.setattr(where, name, drawn)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _can_run(name):
    best = native.processor()
    return best is not None and list(compiled.FLAGS).index(name) <= list(compiled.FLAGS).index(best)


@pytest.fixture(params=compiled.FLAGS)
def each_set(request, monkeypatch):
    """Every instruction set that the machine and its compiler have, one after another; compiling takes seconds."""
    if not _can_run(request.param):
        pytest.skip(f"this machine has no {compiled.NAMES[request.param]}")
    if not compiled.is_there(request.param) and not compiled.compiler_takes(request.param):
        pytest.skip(f"no compiler for {compiled.NAMES[request.param]}")
    compiled.library(request.param)
    monkeypatch.setattr(native, "instruction_set", lambda: request.param)
