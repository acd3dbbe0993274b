"""What ``precision: auto`` becomes on machines that are not here."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision

from moebed.machine import precision
from moebed.machine.precision import choose_precision, computed_in
from moebed.training.trainer import AutoTrainer, PrecisionOfRun


@pytest.fixture
def machine(monkeypatch):
    """Pretends a machine: GFLOP/s of a core in float32 and bfloat16, capabilities of its GPUs, or MPS."""

    def pretend(cpu=(100.0, 1.0), gpus=(), mps=False):
        monkeypatch.setattr(precision, "measured_rates", lambda: cpu)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: gpus[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "a GPU")

    return pretend


@pytest.mark.parametrize(
    ("here", "wanted", "words"),
    [
        pytest.param({"cpu": (118.0, 2.0)}, "32-true", "bf16 at 2 GFLOP/s, float32 at 118", id="no bf16"),
        pytest.param({"cpu": (70.0, 140.0)}, "bf16-mixed", "bf16 at 140", id="AVX512-BF16, fast as AMD's"),
        pytest.param({"cpu": (190.0, 105.0)}, "32-true", "bf16 at 105", id="AVX512-BF16, slow as Intel's"),
        pytest.param({"cpu": (190.0, 920.0)}, "bf16-mixed", "bf16 at 920", id="AMX"),
        pytest.param({"cpu": (100.0, 105.0)}, "32-true", "bf16 at 105", id="no difference"),
        pytest.param({"gpus": [(7, 5)]}, "32-true", "7.5, has no bf16; 16-mixed", id="CUDA 7.5"),
        pytest.param({"gpus": [(8, 0)]}, "bf16-mixed", "capability 8.0", id="CUDA 8.0"),
        pytest.param({"gpus": [(9, 0), (9, 0)]}, "bf16-mixed", "capability 9.0", id="CUDA 9.0"),
        pytest.param({"gpus": [(9, 0), (7, 5)]}, "32-true", "capability 7.5", id="CUDA 9.0 beside 7.5"),
        pytest.param({"mps": True, "cpu": (100.0, 500.0)}, "32-true", "MPS", id="MPS"),
    ],
)
def test_auto_is_what_the_machine_is_good_at(machine, here, wanted, words):
    machine(**here)
    choice = choose_precision()
    assert choice.precision == wanted
    assert str(choice).startswith(f"precision auto: {wanted} here (")
    assert words in str(choice)
    assert "\n" not in str(choice)


def test_what_losses_are_computed_in_is_one_line():
    assert computed_in("bf16-mixed").startswith("weights in float32, products in bfloat16")
    assert computed_in("bf16-true").startswith("weights and products in bfloat16")
    assert computed_in("32-true") == "float32 (32-true)"
    assert computed_in("64-true") == "64-true"


def test_what_a_recipe_asks_for_decides_which_device_is_looked_at(machine):
    machine(cpu=(100.0, 500.0), gpus=[(7, 5)])
    assert choose_precision("cpu").precision == "bf16-mixed"
    assert choose_precision("gpu").precision == choose_precision("cuda").precision == "32-true"
    machine(cpu=(100.0, 1.0))  # a cluster's run is planned where there is no GPU
    assert choose_precision("gpu").precision == "bf16-mixed"
    assert "assumed" in choose_precision("gpu").reason
    assert choose_precision("tpu").precision == "32-true"


def test_the_measurement_is_short_and_leaves_the_threads(monkeypatch):
    threads, products = torch.get_num_threads(), []

    def product(a, b):
        products.append((a.dtype, torch.get_num_threads()))

    monkeypatch.setattr(torch, "mm", product)
    clock = iter(0.004 * tick for tick in range(10_000))
    monkeypatch.setattr(precision.time, "thread_time", lambda: next(clock))
    precision.measured_rates.cache_clear()
    try:
        rates = precision.measured_rates()
    finally:
        precision.measured_rates.cache_clear()
    assert rates == pytest.approx((2e-9 * precision.SIDE**3 / 0.004,) * 2)
    assert torch.get_num_threads() == threads
    assert {count for _, count in products} == {1}
    assert len(products) == 2 * 8  # one of each to warm up, then 25 ms
    assert [dtype for dtype, _ in products[:2]] == [torch.float32, torch.bfloat16]


def test_one_slow_moment_decides_nothing(monkeypatch):
    """The first product in bf16 takes a second, as where something else had the core; the others a millisecond."""
    now, calls = [0.0], []

    def product(a, b):
        calls.append(a.dtype)
        now[0] += 1.0 if calls.count(torch.bfloat16) == 2 and a.dtype == torch.bfloat16 else 0.001

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(precision.time, "thread_time", lambda: now[0])
    precision.measured_rates.cache_clear()
    try:
        float32, bfloat16 = precision.measured_rates()
    finally:
        precision.measured_rates.cache_clear()
    assert bfloat16 == pytest.approx(float32)


def test_this_machine_is_measured():
    precision.measured_rates.cache_clear()
    assert all(rate > 0.05 for rate in precision.measured_rates())


def test_a_trainer_made_in_python_knows_auto(machine):
    machine(cpu=(100.0, 500.0))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    assert AutoTrainer(accelerator="cpu", **quiet).precision == "bf16-mixed"
    assert AutoTrainer(accelerator="cpu", precision="32-true", **quiet).precision == "32-true"
    assert AutoTrainer(accelerator="cpu", precision=None, **quiet).precision == "32-true"


@pytest.mark.parametrize(("own", "first"), [("32-true", "bf16-mixed"), ("bf16-mixed", "32-true")])
def test_a_rank_follows_the_first(own, first, monkeypatch):
    trainer = Trainer(accelerator="cpu", precision=own, logger=False, enable_progress_bar=False)
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda mine: first)
    PrecisionOfRun().setup(trainer, SimpleNamespace(), "fit")
    assert trainer.precision == first
    assert isinstance(trainer.precision_plugin, MixedPrecision) == (first == "bf16-mixed")
    checkpoint = {}
    PrecisionOfRun().on_save_checkpoint(trainer, SimpleNamespace(), checkpoint)
    assert checkpoint == {"precision": first}
