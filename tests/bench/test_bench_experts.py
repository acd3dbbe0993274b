"""``moebed bench experts`` and ``moebed bench kernels``: their own logic, and runs at a size that takes a second."""

import dataclasses
import json
import sys

import pytest
import torch

from moebed.bench import experts, kernels, peers, tables, train
from moebed.bench.command import CHOICES
from moebed.cli import main
from moebed.model import native
from moebed.model.native.compiled import NAMES
from tests.conftest import tiny_config

CPU = torch.device("cpu")
TINY = train.Size(tiny_config(vocab_size=64, router_aux_loss_coef=0.0), 2, 16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, request):
    monkeypatch.setitem(train.SIZES, "T", TINY)
    for what in ("kernels", "experts"):
        monkeypatch.setitem(CHOICES[what], "--shape", (*CHOICES[what]["--shape"], "T"))
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(native, "load", lambda: "nothing is compiled in a fast test")


def tiny_case() -> experts.Case:
    return experts.case("T", None, CPU)


def test_contestants_agree_with_the_reference_in_output_and_gradients():
    for dtype in experts.TOLERANCES:
        found, off, left_out = experts.contestants(tiny_case(), dtype, CPU, gpu_only=False)
        assert {"moebed loop", "moebed grouped_mm", "transformers eager", "transformers batched_mm"} <= set(off)
        assert off["moebed loop"] < experts.TOLERANCES[dtype]
        assert all(value < experts.TOLERANCES[dtype] for value in off.values())
        assert peers.DENSE in found
        assert peers.DENSE not in off
        assert set(found) & set(left_out) == set()
        assert set(found) | set(left_out) == set(
            peers.makers(TINY.model, 32, *experts.weights(TINY.model, CPU, torch.float32))
        )


@pytest.mark.slow
def test_the_compiled_backend_is_a_contestant_where_it_computes(monkeypatch, capsys):
    if (reason := native.load()) is not None:
        pytest.skip(reason)
    config = tiny_config(vocab_size=64, router_aux_loss_coef=0.0, moe_intermediate_size=64)
    monkeypatch.setitem(train.SIZES, "T", train.Size(config, 2, 16))
    for dtype in ("float32", "bfloat16", "autocast"):
        found = experts.run(tiny_case(), dtype, CPU, rounds=1, steps=1)
        row = next(row for row in found["rows"] if row["name"] == "moebed native")
        assert row["difference"] < experts.TOLERANCES[dtype]
        assert found["instruction_set"] == native.instruction_set()
        tables.experts(found)
        assert f"moebed native ran on {NAMES[native.instruction_set()]}" in capsys.readouterr().out
    monkeypatch.setitem(train.SIZES, "T", train.Size(dataclasses.replace(config, moe_intermediate_size=40), 2, 16))
    _, _, left_out = experts.contestants(tiny_case(), "float32", CPU, gpu_only=False)
    assert "multiples of 16" in left_out["moebed native"]


def test_what_differs_gets_no_ratio(monkeypatch):
    """A backend that is fast and wrong is named, and no speed-up is printed for it."""

    def wrong(module, x, routing):
        return x * module.gate_up_proj.sum() * module.down_proj.sum() * routing.topk_weight.sum()

    monkeypatch.setitem(peers.BACKENDS, "wrong", wrong)
    found = experts.run(tiny_case(), "float32", CPU, rounds=2, steps=1)
    row = next(row for row in found["rows"] if row["name"] == "moebed wrong")
    assert row["agrees"] is False
    assert not [name for name in row if "_over_" in name or "share" in name]
    right = next(row for row in found["rows"] if row["name"] == "moebed grouped_mm")
    assert {"forward_over_best_transformers", "both_over_best_transformers", "both_over_dense"} <= set(right)


def test_a_missing_gradient_is_a_difference():
    one = torch.ones(3)
    assert experts.difference({"output": one}, {"output": one}) == 0
    assert experts.difference({"output": one}, {"output": one, "down": one}) == float("inf")
    assert experts.difference({"output": one * float("nan")}, {"output": one}) == float("inf")
    assert experts.difference({"output": one * 1.5}, {"output": one}) == pytest.approx(0.5)


def test_routing_is_uneven_and_the_same_in_every_type():
    case = tiny_case()
    single = next(experts.feed(case, CPU, torch.float32)(3))
    again = next(experts.feed(case, CPU, torch.float32)(3))
    other = next(experts.feed(case, CPU, torch.float32)(4))
    assert torch.equal(single[0], again[0])
    assert torch.equal(single[1].topk_index, again[1].topk_index)
    assert not torch.equal(single[0], other[0])
    assert single[0].shape == single[2].shape == (TINY.tokens, TINY.model.hidden_size)
    assert single[1].topk_index.flatten().bincount().unique().numel() > 1


def test_peak_memory_counts_what_is_held_at_once():
    def step():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return (b + 1).sum()

    assert experts.peak_bytes(step, CPU) == pytest.approx(2 * 4 * (1 << 20), rel=0.01)


def test_a_copy_of_weights_for_every_row_is_refused(monkeypatch):
    monkeypatch.setattr(peers, "LARGEST_COPY", 1000)
    _, _, left_out = experts.contestants(tiny_case(), "float32", CPU, gpu_only=False)
    assert "copies weights for every row" in left_out["transformers batched_mm"]


def test_paper_models_have_their_sizes():
    case = experts.case("mixtral", 64, CPU)
    assert (case.shape.hidden, case.shape.width, case.shape.experts, case.shape.top_k) == (4096, 14336, 8, 2)
    assert case.shape.rows == 128
    assert experts.case("olmoe", None, CPU).tokens == experts.CPU_TOKENS


def test_adapters_of_absent_peers_hold_the_same_function(monkeypatch):
    """These peers are seldom installed: stand-ins with their layouts of weights show the mapping."""
    case = tiny_case()
    gate_up, down = experts.weights(case.config, CPU, torch.float32)
    item = next(experts.feed(case, CPU, torch.float32)(0))
    reference = experts.both(peers.own(case.config, "loop", gate_up, down), "float32", CPU, *item)
    _install_stand_ins(monkeypatch)
    for make in (peers.scattermoe, peers.megablocks, peers.liger):
        peer = make(case.config, gate_up, down)
        assert experts.difference(experts.both(peer, "float32", CPU, *item), reference) < 1e-5, make


def _install_stand_ins(monkeypatch):
    import types

    from torch import nn

    class Matrix(nn.Module):
        pass

    def experts_of(x, weights, index, function):
        out = torch.zeros_like(x)
        for k in range(index.shape[1]):
            out = out + weights[:, k, None] * torch.stack(
                [function(row, e) for row, e in zip(x, index[:, k], strict=True)]
            )
        return out

    class GLUMLP(nn.Module):  # fused matrix (E, 2F, H): up, then gate
        def __init__(self, input_size, hidden_size, num_experts, top_k):
            super().__init__()
            self.experts, self.output_experts = Matrix(), Matrix()

        def forward(self, x, expert_p, expert_idxs):
            def one(row, e):
                up, gate = (self.experts.weight[e] @ row).chunk(2)
                return self.output_experts.weight[e] @ (nn.functional.silu(gate) * up)

            return experts_of(x, expert_p, expert_idxs, one)

    class ParallelDroplessMLP(nn.Module):  # w1, v1, w2 (E·F, H)
        def __init__(self, args):
            super().__init__()
            self.mlp, self.args = Matrix(), args

        def forward(self, x, scores, expert_weights, top_experts):
            width = self.args.ffn_hidden_size
            act = self.args.activation_fn

            def one(row, e):
                w1, v1, w2 = (m[e * width : (e + 1) * width] for m in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
                return (act(w1 @ row) * (v1 @ row)) @ w2

            return experts_of(x.squeeze(1), expert_weights, top_experts, one).unsqueeze(1)

    class LigerFusedMoEFunction:  # gate, then up, as ours; indices in 32 bits
        @staticmethod
        def apply(x, gate_up, down, index, weights):
            assert index.dtype == torch.int32

            def one(row, e):
                gate, up = (gate_up[e] @ row).chunk(2)
                return down[e] @ (nn.functional.silu(gate) * up)

            return experts_of(x, weights, index, one)

    modules = {
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerFusedMoEFunction": LigerFusedMoEFunction},
        "scattermoe": {},
        "scattermoe.mlp": {"GLUMLP": GLUMLP},
        "megablocks": {},
        "megablocks.layers": {},
        "megablocks.layers.arguments": {"Arguments": types.SimpleNamespace},
        "megablocks.layers.dmoe": {"ParallelDroplessMLP": ParallelDroplessMLP},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def test_experts_prints_and_keeps_its_figures(tmp_path, capsys):
    file = tmp_path / "f.json"
    arguments = ["--shape", "T", "--rounds", "2", "--steps", "1", "--dtype", "bfloat16", "--json", str(file)]
    assert main(["bench", "experts", *arguments]) == 0
    kept = json.loads(file.read_text())["results"][0]
    rows = {row["name"]: row for row in kept["rows"]}
    assert rows["moebed grouped_mm"]["peak_bytes"] > 0
    assert rows["moebed grouped_mm"]["agrees"]
    assert "ScatterMoE" in kept["left_out"] or "ScatterMoE" in rows
    out = capsys.readouterr().out
    for words in ("moebed loop", "transformers grouped_mm", peers.DENSE, train.PRODUCTS_ALONE, "left out", "peak MB"):
        assert words in out


def test_static_kernels_print_and_keep_their_gates(tmp_path, capsys):
    pytest.importorskip("triton")
    file = tmp_path / "k.json"
    assert main(["bench", "kernels", "--static", "--first", "--only", "combine", "--json", str(file)]) == 0
    kept = json.loads(file.read_text())["results"]
    assert {row["arch"] for row in kept["rows"]} == {"sm_90"}
    assert all("combine" in row["kernel"] for row in kept["rows"])
    assert {row["design"] for row in kept["roofline"]} >= {"ours", "Liger", "ScatterMoE", "ideal"}
    out = capsys.readouterr().out
    for words in ("combine", "gates hold", "ours", "DeepSeekMoE-16B", "E·(step − 1)/2R"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experts", "--shape", "Z"], "--shape Z: choose among A, F, B"),
        (["experts", "--dtype", "int8"], "--dtype int8: choose among float32, bfloat16, autocast"),
        (["experts", "--rounds", "0"], "--rounds is '0'; give a whole number of at least 1"),
        (["experts", "--tokens", "-1"], "--tokens is '-1'; give a whole number of at least 1"),
        (["experts", "--device", "cuda"], "no CUDA device"),
        (["kernels"], "--static needs none"),
        (["kernels", "--static", "--arch", "sm_70"], "--arch sm_70: choose among sm_80"),
        (["kernels", "--static", "--only", "no such kernel"], "no kernel that ships matches --only 'no such kernel'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys):
    if words in ("no CUDA device", "--static needs none") and torch.cuda.is_available():
        pytest.skip("a CUDA device is available")
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_static_without_triton_is_one_line(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["bench", "kernels", "--static"]) == 2
    assert "needs Triton" in capsys.readouterr().err


def test_kernels_names_what_the_gates_know():
    pytest.importorskip("triton")
    from triton_kernels.gates.compile import TARGETS
    from triton_kernels.spec import DTYPES

    assert tuple(TARGETS) == kernels.ARCHS
    assert kernels.DTYPES == DTYPES


@pytest.mark.gpu
def test_kernels_are_timed_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    file = tmp_path / "k.json"
    arguments = ["--shape", "olmoe", "--tokens", "1024", "--rounds", "2", "--steps", "1", "--json", str(file)]
    assert main(["bench", "kernels", *arguments]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["results"][0]["rows"]}
    assert rows["moebed triton"]["agrees"]
    assert "both_over_best_transformers" in rows["moebed triton"] or "transformers grouped_mm" not in rows
