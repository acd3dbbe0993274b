"""HyperMoE as probes, checkpoints and exports see it: live, written, streamed."""

import pytest
import torch

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.checkpoints.whole import load_decoder, write_checkpoint
from moebed.cli import main
from moebed.errors import ConfigError
from moebed.exporting.export import plan_export
from moebed.model.decoder import Decoder
from moebed.views.live import walk
from tests.conftest import tiny_config
from tests.exporting.exported_runs import write_run
from tests.model.routers.test_router_state import NEEDS, TEXT, _seen

SMALL = {"adapter_size": 8, "expert_embedding_size": 6, "layer_embedding_size": 3, "generator_size": 10}
KINDS = {"unchosen": 2, "constant": 2, "free": 1}


def decoder_of(adapters: str, **changes) -> Decoder:
    """A model whose adapters matter."""
    hyper = {**SMALL, "adapters": adapters}
    decoder = Decoder(
        tiny_config(hyper_experts=hyper, num_experts_per_tok=KINDS[adapters], num_shared_experts=1, **changes)
    )
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "hyper_experts" in name or "adapter_generator" in name:
                parameter.normal_(0.0, 0.5)
    return decoder.eval()


@pytest.mark.parametrize("adapters", KINDS)
def test_live_written_and_streamed_are_the_same_model(adapters, tmp_path):
    decoder = decoder_of(adapters)
    folder = write_checkpoint(decoder, "moebed", tmp_path / "model", dtype=torch.float32)
    back = load_decoder(folder)
    assert back.config == decoder.config
    for key, value in decoder.stored().items():
        assert torch.equal(value, back.stored()[key]), key
    live = _seen(walk(decoder, TEXT, NEEDS))
    for budget in ("1GiB", "170kB"):
        model = PretrainedMoE(str(folder), text=TEXT, memory_budget=budget)
        streamed = _seen(model.views(TEXT, NEEDS))
        model.close()
        assert streamed.keys() == live.keys()
        for key, value in live.items():
            torch.testing.assert_close(streamed[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("adapters", KINDS)
def test_a_walk_goes_the_model_s_own_way(adapters):
    """Adapters are no experts, which are shown as ever, but part of the layer's output, run or not."""
    decoder = decoder_of(adapters)
    with torch.no_grad():
        wanted = decoder(TEXT.input_ids[:1, : int(TEXT.token_mask[0].sum())]).logits[0]
        views = list(walk(decoder, TEXT, NEEDS))
        assert [expert.label for expert in views[0].experts()] == ["0", "1", "2", "3", "SE"]
        predicted = wanted[:-1].logsumexp(-1) - wanted[:-1].gather(1, TEXT.input_ids[0, 1 : len(wanted), None])[:, 0]
        torch.testing.assert_close(views[-1].loss[: len(predicted)], predicted, rtol=1e-4, atol=1e-4)
        view = views[0]
        moe = decoder.layers[0].mlp
        torch.testing.assert_close(view.moe_output, moe.combine(view.moe_input, view.routing))
        without = moe.combine(view.moe_input, view.routing) - moe.hyper_experts(view.moe_input, view.routing)
        assert (view.moe_output - without).norm() > 0.01 * without.norm()


def test_streamed_in_bfloat16(tmp_path):
    decoder = decoder_of("unchosen")
    folder = write_checkpoint(decoder, "moebed", tmp_path / "model", dtype=torch.float32)
    losses = []
    for dtype in (None, "bfloat16"):
        model = PretrainedMoE(str(folder), text=TEXT, dtype=dtype)
        losses.append(list(model.views(TEXT, NEEDS))[-1].loss)
        model.close()
    told = ~losses[0].isnan()
    assert (losses[0] - losses[1])[told].abs().mean() < 0.02 * losses[0][told].mean()


@pytest.mark.parametrize("adapters", KINDS)
def test_export_writes_moebed_s_own_layout_and_no_other(adapters, tmp_path, capsys):
    changes = {"num_experts_per_tok": KINDS[adapters], "hyper_experts": {**SMALL, "adapters": adapters}}
    checkpoint, decoder = write_run(tmp_path, **changes)
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "mixtral"), "--family", "mixtral"]) == 2
    said = capsys.readouterr().err.strip()
    assert "hyper_experts is" in said
    assert "mixtral checkpoint cannot express" in said
    assert "\n" not in said
    assert not (tmp_path / "mixtral").exists()
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "own")]) == 0
    assert "hyper_experts" in capsys.readouterr().err
    ids = torch.arange(20).view(1, 20)
    torch.testing.assert_close(load_decoder(tmp_path / "own")(ids).logits, decoder(ids).logits)
    assert f"| adapters beside the experts | {adapters}" in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")


def test_a_shared_expert_in_its_place_is_exported_as_one(tmp_path):
    changes = {"hyper_experts": {"adapters": "shared_equal_flops"}, "shared_expert_gate": True, "attention_bias": True}
    checkpoint, _ = write_run(tmp_path, **changes)
    assert plan_export(Checkpoint.open(checkpoint)).family.model_type == "qwen2_moe"
    with pytest.raises(ConfigError):
        plan_export(Checkpoint.open(checkpoint), "mixtral")
