"""The first loss that is said is that of the checkpoint that is written, for every scale."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from dense_sources import write_dense

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints.whole import write_checkpoint
from moebed.cli import main
from moebed.upcycling.scales import SCALES

IDS = torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(2))


def _loss(path):
    """Mean cross entropy of the ids by the model in memory."""
    decoder = load_decoder(path).eval()
    with torch.no_grad():
        logits = decoder(IDS).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).item()


def _upcycle(dense, out, method, *options):
    np.save(out.parent / "ids.npy", IDS.numpy())
    given = ["--input-ids", str(out.parent / "ids.npy"), "--method", method]
    assert main(["upcycle", str(dense), "--out", str(out), *given, *options]) == 0
    return json.loads((out / "config.json").read_text())["moebed_upcycled"]["first_loss"]


WAYS = {
    "random": ["--num-experts", "4"],
    "cluster with centroids": ["--num-experts", "4", "--by", "cluster", "--router", "centroid"],
    "a residual expert": ["--num-experts", "5", "--by", "inter"],
    "a dense layer": ["--num-experts", "4", "--dense-layers", "1"],
    "the noisy gate": ["--num-experts", "6", "--router", "noisy"],
}


def _of_each_way(number: int, scales: Sequence[str]) -> Sequence[str]:
    """All scales of the first way, and two of each other one."""
    return [scales[(number + at) % len(scales)] for at in (0, 2)] if number else scales


@pytest.mark.parametrize(
    ("way", "scales"),
    [
        *(pytest.param(way, _of_each_way(number, tuple(SCALES)), id=way) for number, way in enumerate(WAYS)),
        *(pytest.param(way, tuple(SCALES), id=f"{way}, all scales", marks=pytest.mark.slow) for way in [*WAYS][1:]),
    ],
)
def test_every_scale_has_the_loss_that_was_said(tmp_path, way, scales, capsys):
    dense = write_dense(tmp_path, "llama")
    said = _upcycle(dense, tmp_path / "first", "partition", *WAYS[way])
    assert list(said) == ["dense", *SCALES, "tokens"]
    assert said["tokens"] == 8 * 23
    assert said["dense"] == pytest.approx(_loss(dense), rel=1e-5)
    assert len({round(said[name], 5) for name in SCALES}) >= 4  # K is 2: published and sum are one with 4 experts
    for name in scales:
        again = _upcycle(dense, tmp_path / name, "partition", *WAYS[way], "--output-scale", name)
        assert again == said
        assert said[name] == pytest.approx(_loss(tmp_path / name), rel=1e-4), name
    line = f"dense {said['dense']:.4f}; published {said['published']:.4f}, sum {said['sum']:.4f}"
    assert line in capsys.readouterr().err


def test_a_number_is_one_scale_more(tmp_path):
    dense = write_dense(tmp_path)
    said = _upcycle(dense, tmp_path / "moe", "partition", "--num-experts", "4", "--output-scale", "1.5")
    assert said["1.5"] == pytest.approx(_loss(tmp_path / "moe"), rel=1e-4)


@pytest.mark.parametrize("method", ["copy", "split", "drop", "scratch"])
def test_other_methods_have_one_first_loss(tmp_path, method):
    dense = write_dense(tmp_path)
    said = _upcycle(dense, tmp_path / "moe", method, "--num-experts", "4")
    assert said["as made"] == pytest.approx(_loss(tmp_path / "moe"), rel=1e-4)
    assert (abs(said["as made"] - said["dense"]) < 1e-4) == (method in ("copy", "split"))


def test_calibration_gives_a_layer_the_deviation_of_the_dense_one(tmp_path):
    """Of the first layer, whose inputs are those of the dense model."""
    dense = write_dense(tmp_path)
    _upcycle(dense, tmp_path / "moe", "partition", "--num-experts", "4", "--output-scale", "calibrate")
    deviations = []
    for path in (dense, tmp_path / "moe"):
        decoder, seen = load_decoder(path).eval(), []
        decoder.blocks[0].mlp.register_forward_hook(lambda _, given, out, seen=seen: seen.append(out))
        with torch.no_grad():
            decoder(IDS)
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0].flatten(0, 1)
        deviations.append(out.std(dim=0))
    torch.testing.assert_close(deviations[1], deviations[0], rtol=1e-3, atol=1e-4)


def test_text_of_a_domain_is_read_by_the_checkpoint_s_own_tokenizer(tmp_path, capsys):
    from moebed.data.tokenizer import train_bpe

    dense = write_dense(tmp_path, vocab_size=280)
    train_bpe(["the cat sat on the mat"], 270).save(dense)
    paths = []
    for name in ("cats", "mats"):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text("\n\n".join(f"the {name} sat on {i} the mat" * 4 for i in range(30)))
    domains = [part for path in paths for part in ("--domain", f"{path.stem}={path}")]
    more = ["--sequence-length", "16", "--domain-tokens", "160", "--text-clusters", "domains", "--num-experts", "2"]
    options = ["--method", "partition", "--by", "inner", *domains, *more]
    assert main(["upcycle", str(dense), "--out", str(tmp_path / "moe"), *options]) == 0
    said = capsys.readouterr().err
    assert "domain cats: " in said
    assert "domain mats: " in said
    assert Checkpoint.open(tmp_path / "moe").config.num_experts == 2


def test_what_is_said_in_bfloat16_is_what_is_stored(tmp_path):
    decoder = load_decoder(write_dense(tmp_path, "llama"))
    dense = write_checkpoint(decoder, "llama", tmp_path / "narrow", torch.bfloat16)
    said = _upcycle(dense, tmp_path / "moe", "partition", "--num-experts", "4", "--output-scale", "mean")
    assert said["mean"] == pytest.approx(_loss(tmp_path / "moe"), rel=1e-4)
