"""EMO, for which transformers has no class, against a reference of plain loops; its gate's last row; refusals."""

import json
from dataclasses import replace

import pytest
import torch
from emo_reference import logits, tiny_emo
from safetensors.torch import load_file, save_file

from moebed.checkpoints import Checkpoint, load_decoder, write_checkpoint
from moebed.checkpoints.families import FAMILIES
from moebed.checkpoints.families.choice import choose_family
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.training.module import MoEModule
from moebed.views.layer import HeadView, Need, ProbeText

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
MIXED = {
    "num_experts_per_layer": [0, 9, 5],
    "num_shared_experts_per_layer": [0, 1, 0],
    "dense_intermediate_size": 20,
    "attention_bias": True,
    "num_key_value_heads": 2,
}
CASES = {
    "as published": {},
    "layers that differ": MIXED,
    "none shared": {"num_shared_experts": 0, "norm_topk_prob": True, "rope_theta": 30.0, "rms_norm_eps": 0.1},
}


def written(folder, **changes):
    """A checkpoint on disk, and the reference's logits (2, 9, V) of it."""
    settings, weights = tiny_emo(**changes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(weights, folder / "model.safetensors")
    return torch.stack([logits(settings, weights, ids) for ids in IDS])


def streamed(folder):
    """Logits of a checkpoint whose text goes through it a layer at a time."""
    text = ProbeText(IDS, torch.ones_like(IDS, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))
    model = PretrainedMoE(str(folder), text=text)
    *_, last = model.views(text, frozenset({Need.ROUTING, Need.LOGITS}))
    model.close()
    assert isinstance(last, HeadView)
    return last.logits.view(*IDS.shape, -1)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_plain_loops_compute_read_whole_streamed_and_written_anew(case, tmp_path):
    wanted = written(tmp_path / "theirs", **CASES[case])
    decoder = load_decoder(tmp_path / "theirs").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder(IDS).logits, wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(streamed(tmp_path / "theirs"), wanted, rtol=2e-5, atol=2e-5)
    write_checkpoint(decoder, "emo", tmp_path / "ours", torch.float32)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    for name, weights in theirs.items():
        layer = name.split(".")[2] if ".gate.weight" in name else None
        used = len(weights) if layer is None else decoder.config.layer(int(layer)).num_experts
        assert torch.equal(weights[:used], ours[name][:used]), name
        assert not ours[name][used:].any(), name
    config = FAMILIES["emo"].read_config(json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8")))
    assert config.to_dict() == decoder.config.to_dict()


def test_the_gate_s_last_row_is_of_no_consequence(tmp_path):
    wanted = written(tmp_path / "one")
    settings, weights = tiny_emo()
    for name in weights:
        if name.endswith("gate.weight"):
            weights[name][-1] += 100.0
    torch.testing.assert_close(logits(settings, weights, IDS[0]), wanted[0])
    checkpoint = Checkpoint.open(tmp_path / "one")
    assert (checkpoint.config.num_experts, checkpoint.config.num_experts_per_tok) == ([8] * 3, [3] * 3)
    part = checkpoint.keys.parameter("layers.1.mlp.router.weight")[0].part
    assert (part.shape, part.rows) == ((9, 24), 8)
    assert checkpoint.keys.shared(1, "down").name == "model.layers.1.mlp.experts.8.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"always_active_experts": [0]}, "always_active_experts"),
        ({"always_active_experts_per_layer": [[0], [1], [2]]}, "always_active_experts_per_layer"),
        ({"dense_mlp_bias": True}, "dense_mlp_bias"),
        ({"ghost_extend_eval": True}, "ghost_extend_eval"),
        ({"num_shared_experts": 2}, "num_shared_experts is 2"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"num_shared_experts_per_layer": [1, 1, 0]}, "num_shared_experts_per_layer"),
        ({"num_experts_per_layer": [9, 9]}, "num_experts_per_layer is .9, 9.; it must be a number for each of num_"),
        ({"num_experts_per_layer": [5, 5, 5]}, "num_experts is 9, which num_experts_per_layer has"),
        ({"num_experts_per_layer": [9, 0, 9]}, "dense_intermediate_size is missing"),
        ({"num_experts_per_layer": [9, 1, 9]}, "num_shared_experts is 1 of num_experts 1"),
        ({"num_experts_per_tok": 1}, "leaves none to choose"),
        ({"shared_expert_intermediate_size": 12}, "shared_expert_intermediate_size"),
        ({"model_type": "emo_shared"}, "emo_shared"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, word, tmp_path):
    settings, weights = tiny_emo()
    (tmp_path / "config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=word) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_trained_with_pools_is_written_as_emo(tmp_path):
    """Pools are of training: without them its router is EMO's in evaluation, and with them training goes on."""
    written(tmp_path)
    config = replace(Checkpoint.open(tmp_path).config, router_aux_loss_scope="global")
    pooled = replace(config, router="document_pool", router_options={"most_pool": 5})
    assert MoEModule(pooled, init_from=str(tmp_path)).initial_checkpoint().family.model_type == "emo"
    other = replace(config, router="sigmoid_topk", router_options={})
    with pytest.raises(ConfigError, match=r"has router 'softmax_topk' but .* has 'sigmoid_topk'"):
        MoEModule(other, init_from=str(tmp_path)).initial_checkpoint()
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 3,
             "num_shared_experts": 1, "moe_intermediate_size": 12, "norm_topk_prob": False}  # fmt: skip
    config = ModelConfig(**sizes, router="document_pool", router_options={"least_pool": 4})
    settings = FAMILIES["emo"].write_config(config)
    assert (settings["num_experts"], settings["num_experts_per_tok"], settings["num_shared_experts"]) == (9, 4, 1)
    assert FAMILIES["emo"].read_config(settings).router == "softmax_topk"
    assert choose_family(ModelConfig(**sizes | {"num_shared_experts": 0}, qk_norm="full", router="document_pool")
                         ).family.model_type == "olmoe"  # fmt: skip
    for changes, word in (
        ({"num_shared_experts": 2}, "num_shared_experts is 2"),
        ({"router": "sigmoid_topk"}, "router is 'sigmoid_topk'"),
        ({"router_options": {"router_bias": True}}, "router_options"),
        ({"shared_expert_gate": True}, "shared_expert_gate"),
        ({"shared_expert_intermediate_size": 20}, "shared_expert_intermediate_size is 20"),
    ):
        with pytest.raises(ConfigError, match=word):
            FAMILIES["emo"].write_config(ModelConfig(**{**sizes, **changes}))


def test_it_is_exported_in_its_own_layout(tmp_path, capsys):
    wanted = written(tmp_path / "emo")
    assert main(["export", str(tmp_path / "emo"), "--family", "emo", "--out", str(tmp_path / "again")]) == 0
    torch.testing.assert_close(load_decoder(tmp_path / "again").eval()(IDS).logits, wanted, rtol=2e-5, atol=2e-5)
    assert "transformers has no class for emo" in capsys.readouterr().err
