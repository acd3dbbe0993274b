"""The benchmark's own logic: pairing, ratios, and a run at a size that takes a second."""

import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moebed.bench import experts, kernels, probe, train, weights
from moebed.bench.command import CHOICES
from moebed.cli import main
from moebed.model import native
from moebed.model.flops import count_parameters, flops_per_token
from tests.conftest import tiny_config

TINY = train.Size(tiny_config(vocab_size=64, router_aux_loss_coef=0.0), 2, 16)


@pytest.fixture(autouse=True)
def nothing_is_compiled_in_a_fast_test(monkeypatch, request):
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(native, "load", lambda: "nothing is compiled in a fast test")


def test_ratios_are_within_a_round():
    found = train.Measured(100, {"a": [1.0, 2.0], "b": [2.0, 2.0]})
    assert found.ratios("a", "b") == [2.0, 1.0]
    assert found.tokens_per_second("a") == pytest.approx(100 / 1.5)


def test_dense_model_has_equal_active_flops():
    moe = tiny_config(num_shared_experts=1)
    dense = train.dense_of_equal_flops(moe)
    router = 2 * moe.num_experts * moe.hidden_size * moe.num_hidden_layers
    assert flops_per_token(moe, 64) - flops_per_token(dense, 64) == router
    assert count_parameters(dense)[0] == count_parameters(dense)[1]


def test_each_of_ours_is_held_to_the_dense_model_run_as_it_is():
    names = ("moebed, eager", "moebed native, compiled", "transformers with eager experts, compiled")
    assert [train._dense_peer(name) for name in names] == ["moebed dense, eager", "moebed dense, compiled", ""]


def test_each_is_held_to_the_best_peer_compiled_as_it_is():
    seconds = {"a, eager": 1.0, "transformers with a experts, eager": 3.0, "transformers with b experts, eager": 2.0}
    seconds |= {"transformers with a experts, compiled": 5.0, "a, compiled": 4.0}
    best = train.best_transformers(train.Measured(1, {name: [value] for name, value in seconds.items()}))
    assert best == {
        "eager": "transformers with b experts, eager",
        "compiled": "transformers with a experts, compiled",
    }


@pytest.mark.parametrize("precision", train.PRECISIONS)
def test_every_contestant_computes_in_the_precision(precision):
    """The types of all matrix products, the peers' and those of the products alone included."""
    expected = train.PRECISIONS[precision]

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    batch = next(train.batches(TINY, torch.device("cpu")))
    for name, step in train.contestants_of(TINY, torch.device("cpu"), compile=False, precision=precision).items():
        seen: list[torch.dtype] = []
        with Products():
            step(*batch)
        assert seen.count(expected) > len(seen) / 2, name  # routers stay in float32


@pytest.mark.slow
def test_the_compiled_backend_trains_as_pytorch_s_own_does():
    """Equal losses in float32; in bf16 as near to them as PyTorch's own bf16, within twice its worst step."""
    if (reason := native.load()) is not None:
        pytest.skip(reason)
    config = tiny_config(vocab_size=64, router_aux_loss_coef=0.0, moe_intermediate_size=64)
    batch, losses = next(train.batches(train.Size(config, 2, 16), torch.device("cpu"))), {}
    for backend in ("native", "grouped_mm"):
        for precision in ("32-true", "bf16-mixed"):
            torch.manual_seed(0)
            own = dataclasses.replace(config, experts_backend=backend)
            step = train.own_step(own, torch.device("cpu"), False, precision)
            losses[backend, precision] = torch.tensor([step(*batch) for _ in range(20)])
    exact = losses["grouped_mm", "32-true"]
    torch.testing.assert_close(losses["native", "32-true"], exact, rtol=1e-5, atol=0)
    native_off, their_off = ((losses[b, "bf16-mixed"] / exact - 1).abs().max() for b in ("native", "grouped_mm"))
    assert 0 < native_off < 2 * their_off < 0.1
    assert exact[-1] < 0.9 * exact[0]


def test_every_contestant_trains_on_the_loss_of_next_tokens():
    """An untrained model's is near ln(vocabulary), and it falls when the same batch comes again."""
    torch.manual_seed(0)
    ids, labels = next(train.batches(TINY, torch.device("cpu")))
    for name, step in train.contestants_of(TINY, torch.device("cpu"), False, "32-true").items():
        if name == train.PRODUCTS_ALONE:
            continue
        losses = [step(ids, labels) for _ in range(30)]
        assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), rel=0.35), name
        assert losses[-1] < 0.9 * losses[0], name


def test_bench_prints_and_keeps_its_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train.SIZES, "T", TINY)
    monkeypatch.setitem(CHOICES["train"], "--size", ("T",))
    assert (
        main(
            [
                "bench",
                "train",
                "--size",
                "T",
                "--rounds",
                "2",
                "--steps",
                "1",
                "--precision",
                "32-true",
                "--json",
                str(tmp_path / "f.json"),
            ]
        )
        == 0
    )
    kept = json.loads((tmp_path / "f.json").read_text())
    names = {row["name"] for row in kept["results"][0]["rows"]}
    assert {"moebed, eager", "moebed dense, eager"} <= names
    assert {f"transformers with {peer} experts, eager" for peer in ("grouped_mm", "eager")} <= names
    assert kept["machine"]["versions"]["torch"].startswith("2.")
    out = capsys.readouterr().out
    assert "moebed, eager" in out
    assert "T, 32-true" in out
    assert "over own dense" in out
    assert "[least, most]" in out


@pytest.mark.parametrize("what", ["train", "routers"])
@pytest.mark.parametrize(("bfloat16", "chosen"), [(300.0, "bf16-mixed"), (1.0, "32-true")])
def test_auto_takes_what_fits_the_machine_and_says_so(what, bfloat16, chosen, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train.SIZES, "T", TINY)
    monkeypatch.setitem(CHOICES[what], "--size", ("T",))
    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: (100.0, bfloat16))
    file = tmp_path / "f.json"
    options = ["--size", "T", "--rounds", "1", "--steps", "1", "--json", str(file)]
    assert main(["bench", what, *options, *(["--router", "softmax_topk"] if what == "routers" else [])]) == 0
    assert json.loads(file.read_text())["results"][0]["precision"] == chosen
    assert f"precision auto: {chosen} here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "Z"], "--size Z: choose among A, F, B"),
        (["--json", "no/such/folder/f.json"], "no/such/folder"),
        (["--rounds", "0"], "--rounds is '0'; give a whole number of at least 1"),
        (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
        (["--precision", "16"], "--precision 16: choose among auto, 32-true, bf16-mixed"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("a CUDA device is available")
    assert main(["bench", "train", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_an_option_may_be_is_what_the_parts_know():
    """The command has names of its own, as they are refused before PyTorch is loaded."""
    for what in ("train", "routers"):
        assert CHOICES[what] == {"--size": tuple(train.SIZES), "--precision": ("auto", *train.PRECISIONS)}
    assert CHOICES["probe"] == {"--only": probe.KINDS, "--size": tuple(weights.SIZES)}
    shapes = {"--shape": (*train.SIZES, *experts.MODELS)}
    static = {"--arch": (*kernels.ARCHS, "all"), "--dtype": (*kernels.DTYPES, "all")}
    assert CHOICES["kernels"] == shapes | static
    assert CHOICES["experts"] == shapes | {"--dtype": tuple(experts.TOLERANCES)}
