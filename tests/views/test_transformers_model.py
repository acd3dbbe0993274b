"""Any MoE of transformers, live: the model's own logits, and outputs that sum to what its blocks gave out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import COMMON, MODELS, make
from torch import nn

import moebed
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.errors import ConfigError, UserError
from moebed.views.layer import ExpertKind, HeadView, Need, ProbeText
from moebed.views.transformers_model import TransformersModel
from probes.registry import make_probes
from probes.running.choosing import probes_for
from probes.running.driver import needs_of, run_probes

NEEDS = frozenset({Need.ROUTING, Need.OUTPUTS, Need.LOGITS})
SIGMOID = {"deepseek_v3", "glm4_moe", "minimax_m2", "dots1", "lfm2_moe", "nemotron_h"}
WEIGHTS = {"deepseek_v3": 2.5, "dots1": 2.5, "nemotron_h": 2.5, "glm4_moe": 1.5, "phimoe": 2.0, "mixtral": 1.0}
SHARED = {"qwen2_moe", "qwen3_next", "deepseek_v2", "deepseek_v2 groups", "deepseek_v3", "ernie4_5_moe", "glm4_moe",
          "dots1", "hunyuan_v1_moe", "nemotron_h"}  # fmt: skip


def padded() -> ProbeText:
    """Three sequences of 12, 7 and 12 tokens."""
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    return ProbeText(ids * mask, mask, torch.zeros(3, dtype=torch.int64))


def listen_to_blocks(model: nn.Module) -> dict[int, torch.Tensor]:
    """What the module around each layer's experts gives out (B, S, H)."""
    found: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "experts"):
            layer = next(int(part) for part in name.split(".") if part.isdecimal())
            module.register_forward_hook(
                lambda _, __, out, layer=layer: found.update({layer: out[0] if isinstance(out, tuple) else out})
            )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_itself_that_is_seen(name):
    model, text = make(name), padded()
    mask, before = text.token_mask, model.config._experts_implementation
    with torch.no_grad():
        want = model(input_ids=text.input_ids, attention_mask=mask.long(), use_cache=False).logits[mask]
    blocks, seen = listen_to_blocks(model), TransformersModel(model)
    model.train()
    *layers, head = seen.views(text, NEEDS)
    assert model.config._experts_implementation == before
    assert all(module.training for module in model.modules())
    assert isinstance(head, HeadView)
    assert (head.logits - want).abs().max() <= 1e-5 * want.abs().max()
    routed = [view for view in layers if view.num_experts]
    assert len(layers) == model.config.num_hidden_layers
    assert [view.index for view in routed] == sorted(blocks)
    for view in routed:
        assert view.routing.topk_index.shape == (31, view.num_experts_per_tok)
        assert (view.routing.topk_weight.diff(dim=1) <= 0).all()
        assert (view.routing.router_probs.sum(dim=1) - 1).abs().max() < 1e-5
        chosen = view.routing.topk_weight / view.routing.router_probs.gather(1, view.routing.topk_index)
        if name != "phimoe":  # whose weights follow no distribution
            assert (chosen.amax(dim=1) / chosen.amin(dim=1) - 1).abs().max() < 1e-4
        experts = list(view.experts())
        assert (experts[-1].kind is ExpertKind.SHARED) == (name in SHARED)
        block = blocks[view.index][mask]
        assert (view.moe_output - block).abs().max() <= 1e-5 * block.abs().max()
        rows = {one: view.expert_matrix(one, 1).float() for one in ("up", "gate", "down") if name != "nemotron_h"}
        if rows and name != "gpt_oss":  # which has biases, and a rule of its own for gate and up
            inside = nn.functional.linear(view.moe_input, rows["gate"])
            activated = view.weights.experts.act_fn(inside) * (view.moe_input @ rows["up"].T)
            assert (activated @ rows["down"].T - experts[1].output).abs().max() <= 1e-5 * block.abs().max()
    if name in WEIGHTS:
        assert (routed[-1].routing.topk_weight.sum(dim=1) - WEIGHTS[name]).abs().max() < 0.1 * (name == "phimoe") + 1e-4
    assert any("sigmoid" in note for note in seen.notes if "neither" not in note) == (name in SIGMOID)
    lacking = {"gpt_oss": {Need.ACTIVATIONS}, "nemotron_h": {Need.WEIGHTS}}.get(name, set())
    assert set(Need) - seen.offers == lacking | {Need.ATTRIBUTION}


def test_the_matrices_of_gpt_oss_lie_as_those_of_others():
    """Columns of gate and up alternate there, and rows are inputs."""
    model = make("gpt_oss")
    view = next(TransformersModel(model).views(None, frozenset({Need.WEIGHTS})))
    stored = dict(model.named_parameters())
    both, down = (stored[f"model.layers.0.mlp.experts.{key}_proj"].detach() for key in ("gate_up", "down"))
    assert torch.equal(view.expert_matrix("gate", 2), both[2, :, 0::2].T)
    assert torch.equal(view.expert_matrix("up", 2), both[2, :, 1::2].T)
    assert torch.equal(view.expert_matrix("down", 2), down[2].T)
    assert view.expert_shape("down") == (32, 32)
    assert torch.equal(view.gate, stored["model.layers.0.mlp.router.weight"])


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_headlines_are_those_of_the_streamed_checkpoint(name, tmp_path):
    model, text = make(name), padded()
    model.save_pretrained(tmp_path)
    names = probes_for(["all"], with_text=True)
    needs = needs_of(make_probes(names))
    streamed = PretrainedMoE(str(tmp_path), text=text)
    results = [run_probes(one.views(text, needs), make_probes(names)) for one in (streamed, TransformersModel(model))]
    for probe, found in results[0].items():
        assert found.headlines.keys() == results[1][probe].headlines.keys()
        for key, headline in found.headlines.items():
            live = results[1][probe].headlines[key]
            assert live.value == pytest.approx(headline.value, rel=1e-4, abs=1e-5), key
            assert (live.interval is None) == (headline.interval is None)
            assert live.interval is None or live.interval == pytest.approx(headline.interval, rel=1e-3, abs=1e-4), key
    assert sum(len(found.headlines) for found in results[0].values()) > 40


def test_the_command_finds_the_same_both_ways(tmp_path, capsys):
    make("mixtral").save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", padded().input_ids[[0, 2]].numpy())
    asked = ["probe", str(tmp_path / "model"), "--input-ids", str(tmp_path / "ids.npy"), "--probes", "norm_origin"]
    through = ["--through", "transformers"]
    found = []
    for out, options in (("streamed", []), ("live", through)):
        assert main([*asked, "--out", str(tmp_path / out), *options]) == 0
        assert (tmp_path / out / "report.html").exists()
        found.append(json.loads((tmp_path / out / "summary.json").read_text(encoding="utf-8"))["probes"])
    for key, headline in found[0]["norm_origin"]["headlines"].items():
        assert found[1]["norm_origin"]["headlines"][key]["value"] == pytest.approx(headline["value"], rel=1e-4)
    capsys.readouterr()
    for options, said in (
        (["--layers", "0"], "--layers does nothing with --through transformers"),
        (["--num-experts", "4"], "--num-experts is for traces"),
    ):
        assert main([*asked, "--out", str(tmp_path / "x"), *through, *options]) == 2
        assert said in capsys.readouterr().err
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(weights)
    tensors.pop("model.norm.weight")
    save_file(tensors, weights, {"format": "pt"})
    assert main([*asked, "--out", str(tmp_path / "x"), *through]) == 2
    assert "transformers finds no model.norm.weight" in capsys.readouterr().err


def test_from_python_and_what_is_left_out_is_said():
    found = moebed.probe(make("nemotron_h"), padded().input_ids[[0, 2]])
    assert "norm_vs_score" in found
    assert any("has no matrices of experts: left out" in note for note in found.notes)
    assert "note: " in repr(found)
    with pytest.raises(ConfigError, match=r"matrix_similarity cannot run: .* has no matrices of experts"):
        moebed.probe(make("nemotron_h"), probes=["matrix_similarity"])
    weights = moebed.probe(make("mixtral"), probes=["gate_similarity", "matrix_similarity", "router_coupling"])
    assert all(one.scalars for one in weights.values())
    with pytest.raises(UserError, match="no tokenizer"):
        moebed.probe(make("mixtral"), "text")


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("llama", "^LlamaForCausalLM has no experts that go through transformers' experts interface$"),
        ("llama4_text", "Llama4TextExperts computes by itself"),
        ("jetmoe", "JetMoeParallelExperts computes by itself"),
        ("longcat_flash", "LongcatFlashExperts computes by itself"),
    ],
)
def test_classes_beside_the_interface_are_refused_by_name(family, named):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in COMMON.items() if hasattr(AutoConfig.for_model(family), key)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with pytest.raises(ConfigError, match=named):
        TransformersModel(model)
