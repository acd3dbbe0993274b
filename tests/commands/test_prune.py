"""moebed prune: the experts that are left, the layout that they are written in, the loss before and after."""

import json

import numpy as np
import pytest
import torch

from moebed.checkpoints import reading_bar, write_checkpoint
from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.machine.progress import Progress
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.views.interventions import keep
from moebed.views.layer import ProbeText
from moebed.views.live import intervene
from probes.measures.expert_scores import best, best_over_layers, calibration_texts

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "initializer_range": 0.2, "experts_backend": "loop",
}  # fmt: skip


def made(folder, family="mixtral", change=lambda decoder: None, **settings):
    torch.manual_seed(3)
    decoder = Decoder(ModelConfig(**SIZES | settings)).eval()
    with torch.no_grad():
        change(decoder)
    write_checkpoint(decoder, family, folder / "model", torch.float32)
    ids = torch.randint(40, (8, 24), generator=torch.Generator().manual_seed(1))
    np.save(folder / "ids.npy", ids.numpy())
    return decoder, ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(8, dtype=torch.long))


def prune(folder, *options, out="out"):
    asked = ["prune", str(folder / "model"), "--out", str(folder / out), "--input-ids", str(folder / "ids.npy")]
    return main([*asked, *options])


@pytest.mark.parametrize("score", ["frequency", "ean", "reap", "weighted", "easy_ep"])
def test_experts_without_tokens_go_at_no_loss(score, tmp_path):
    def unused(decoder):
        for block in decoder.layers:
            weight = block.mlp.router.weight
            weight[4:] = 0
            weight[0], weight[1] = weight[0] * 50, -weight[0] * 50  # one of the two is always first
            weight[2], weight[3] = weight[0] / 2, -weight[0] / 4

    made(tmp_path, change=unused, num_experts_per_tok=1)
    assert prune(tmp_path, "--keep", "2", "--by", score) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text(encoding="utf-8"))
    assert found["kept"] == {str(layer): [0, 1] for layer in range(3)}
    assert found["change"] == pytest.approx(0, abs=1e-6)
    assert found["texts"] == 4


@pytest.mark.parametrize("case", ["mixtral", "deepseek", "sigmoid", "ragged", "ernie4_5_moe", "emo"])
def test_a_pruned_model_is_the_model_that_keeps_those_experts(case, tmp_path, capsys):
    """By an intervention on the whole one: another way to the same loss."""
    settings = {
        "mixtral": {},
        "ragged": {},
        "deepseek": {"num_experts": [0, 6, 6], "num_shared_experts": 1, "norm_topk_prob": False,
                     "intermediate_size": 48},
        "sigmoid": {"router": "sigmoid_topk"},
        "ernie4_5_moe": {"router": "softmax_bias_topk", "rope_interleave": True},  # its bias is stored as (1, E)
        "emo": {"num_shared_experts": 1, "norm_topk_prob": False},  # its gate has a row more
    }[case]  # fmt: skip
    family = {"sigmoid": "moebed", "ragged": "mixtral"}.get(case, case)

    def biased(decoder):
        if case in ("sigmoid", "ernie4_5_moe"):
            for block in decoder.layers:
                block.mlp.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, 6))
        if case == "ragged":
            decoder.layers[1].mlp.experts.down_proj[0] *= 6  # the others of this layer fall behind

    decoder, text = made(tmp_path, family, biased, **settings)
    assert prune(tmp_path, "--keep", "1/3", *(["--ragged"] if case == "ragged" else [])) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text(encoding="utf-8"))
    kept = {int(layer): experts for layer, experts in found["kept"].items()}
    pruned = Checkpoint.open(tmp_path / "out")
    assert pruned.family.model_type == {"ragged": "moebed"}.get(case, family)
    assert [pruned.config.layer(n).num_experts for n in kept] == list(map(len, kept.values()))
    assert sum(map(len, kept.values())) == 2 * len(kept)
    one = keep(kept)
    rise = intervene(decoder, text, [one])[one.name]
    apart = torch.from_numpy(~calibration_texts(text.domain.numpy()))[text.sequence]
    assert found["change"] == pytest.approx(float(rise[apart & ~rise.isnan()].mean()), abs=1e-5)
    assert found["change"] != 0
    assert f"{found['loss_after']:.4f} after" in capsys.readouterr().err
    assert np.isfinite(found["loss_after"])


def test_fewer_experts_than_a_token_has(tmp_path):
    made(tmp_path)
    assert prune(tmp_path, "--keep", "1", "--by", "random") == 0
    config = Checkpoint.open(tmp_path / "out").config
    assert (config.num_experts, config.num_experts_per_tok) == (1, 1)
    PretrainedMoE(str(tmp_path / "out")).close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "7"], "layer 0 has 6 experts"),
        (["--keep", "half"], "write a share such as 1/2"),
        (["--keep", "0"], "write a share such as 1/2"),
        (["--keep", "1/2", "--by", "rep"], "did you mean 'reap'"),
    ],
)
def test_what_cannot_be_kept_is_one_line(options, said, tmp_path, capsys):
    made(tmp_path)
    assert prune(tmp_path, *options) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_pruned_is_one_line(tmp_path, capsys):
    made(tmp_path, "moebed", router="hash")
    assert prune(tmp_path, "--keep", "1/2") == 2
    assert "router hash cannot be pruned" in capsys.readouterr().err
    np.save(tmp_path / "ids.npy", np.arange(12))
    assert prune(tmp_path, "--keep", "1/2") == 2
    assert "give several texts" in capsys.readouterr().err
    assert main(["prune", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--keep", "1/2"]) == 2
    assert "needs text" in capsys.readouterr().err


def test_the_best_of_one_layer_and_of_all():
    assert best(np.array([1.0, 3, 2, 3]), 2) == (1, 3)
    scores = {0: np.array([1.0, 1, 1, 1]), 2: np.array([8.0, 0, 0, 0])}
    assert best_over_layers(scores, 0.5) == {0: (0, 1, 2), 2: (0,)}
    assert best_over_layers(scores, 0.01) == {0: (0,), 2: (0,)}
    assert calibration_texts(np.array([0, 1, 0, 1, 0])).tolist() == [False, False, True, True, False]


def test_each_walk_over_the_checkpoint_says_how_far_it_is(tmp_path, monkeypatch):
    walks = []

    class Told(Progress):
        def update(self, done, total=None):
            super().update(done, total)
            walks.append((self._description, done / self.total))

    monkeypatch.setattr(reading_bar, "Progress", Told)
    made(tmp_path)
    assert prune(tmp_path, "--keep", "1/2") == 0
    assert [name for name, done in walks if done == 1] == ["scoring experts", "loss after"]
    assert len([done for name, done in walks if name == "loss after" and 0 < done < 1]) >= 3  # layers
