"""``moebed upcycle --method partition``: what becomes of the FFN, read back from the folder that it writes."""

import json

import numpy as np
import pytest
import torch
from dense_sources import logits, tensors, write_dense
from test_upcycle_methods import dense_matrices, expert_matrices, upcycle

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.cli import main
from moebed.upcycling.clusters import balanced_kmeans
from moebed.upcycling.contract import Settings, TextFacts, generator
from moebed.upcycling.neurons import random_groups
from moebed.upcycling.partition import Partition
from moebed.upcycling.scales import calibrated, output_scale

MLP = "layers.1.mlp"


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path)


@pytest.fixture
def ids(tmp_path):
    """Token ids to take importance from, as an option."""
    np.save(tmp_path / "ids.npy", torch.randint(64, (12, 30), generator=torch.Generator().manual_seed(2)).numpy())
    return ["--input-ids", str(tmp_path / "ids.npy")]


def partition(dense, out, *options):
    return upcycle(dense, out, "partition", *options)


def places(dense, out, scale):
    """Of each expert's neurons which dense one it is, found by all three matrices: (E, F)."""
    gate, up, down, _ = expert_matrices(out)
    old = dense_matrices(dense)
    made = torch.cat([gate, up, down.transpose(1, 2) / scale], dim=2)
    wanted = torch.cat([old[0], old[1], old[2].T], dim=1)
    found = torch.cdist(made.flatten(0, 1), wanted, compute_mode="donot_use_mm_for_euclid_dist")
    assert found.min(dim=1).values.max() < 1e-4
    return found.argmin(dim=1).view(len(gate), -1)


@pytest.mark.parametrize("by", ["random", "contiguous", "cluster"])
def test_1_8_1_every_neuron_is_in_one_expert(tmp_path, dense, by):
    out = partition(dense, tmp_path / "moe", "--by", by, "--num-experts", "4")
    found = places(dense, out, scale=2)
    assert sorted(found.flatten().tolist()) == list(range(48))
    assert Checkpoint.open(out).family.model_type == "mixtral"
    assert (found == torch.arange(48).view(4, 12)).all() == (by == "contiguous")


@pytest.mark.parametrize(
    "options",
    [
        ["--by", "random"],
        ["--by", "contiguous"],
        ["--by", "cluster", "--rows", "down"],
        ["--by", "inter", "--residual-experts", "2", "--num-experts", "4", "--sharing", "false"],
        ["--by", "inter", "--residual-experts", "0", "--sharing", "false"],
    ],
)
def test_1_8_1_every_expert_with_equal_weights_and_scale_e_is_the_dense_ffn(tmp_path, dense, ids, options):
    """K = E and a zero gate: each of E weights is 1 / E; with the published scale, E / K = 1, that is what remains."""
    number = options[options.index("--num-experts") + 1] if "--num-experts" in options else "6"
    more = [*options, "--num-experts", number, "--num-experts-per-tok", number]
    text = ids if "inter" in options else []
    exact = load_decoder(partition(dense, tmp_path / "exact", *more, *text, "--output-scale", "mean"))
    quiet = load_decoder(partition(dense, tmp_path / "quiet", *more, *text))
    for decoder in (exact, quiet):
        for block in decoder.blocks:
            torch.nn.init.zeros_(block.mlp.router.weight)
    was, x = load_decoder(dense), torch.randn(50, 32)
    wanted = logits(was)
    torch.testing.assert_close(logits(exact), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    with torch.no_grad():
        for block, full, part in zip(was.blocks, exact.blocks, quiet.blocks, strict=True):
            out = block.mlp(x)
            torch.testing.assert_close(full.mlp(x)[0], out, rtol=1e-4, atol=1e-4)
            shared = part.mlp.shared_output(x) if part.mlp.shared_expert is not None else 0
            torch.testing.assert_close(part.mlp(x)[0] - shared, (out - shared) / int(number), rtol=1e-3, atol=1e-4)


class Rows:
    """An FFN whose three matrices have the same rows."""

    layer = 0

    def __init__(self, rows):
        self.rows = rows

    def matrix(self, name):
        return self.rows.T if name == "down" else self.rows


def _prototypes(spread):
    """Rows that are 5 unit prototypes, of cosine .8, times lengths from 1 to ``spread``, 12 of each."""
    draws = torch.Generator().manual_seed(1)
    prototypes = torch.nn.functional.normalize(torch.eye(5, 16) + 2 * torch.eye(16)[5], dim=1)
    label = torch.arange(5).repeat_interleave(12)[torch.randperm(60, generator=draws)]
    lengths = spread ** torch.rand(60, 1, generator=draws)
    return prototypes[label] * lengths, label


@pytest.mark.parametrize("rows", ["gate", "up", "down"])
def test_1_8_2_normalised_rows_recover_prototypes_and_others_do_not(rows):
    neurons, label = _prototypes(spread=10)
    settings = {"num_experts": 5, "by": "cluster", "rows": rows}
    found = Partition(Settings(**settings), Rows(neurons))
    assert found.groups.shape == (5, 12)
    assert all(len(label[group].unique()) == 1 for group in found.groups)
    as_stored = Partition(Settings(**settings, normalise=False), Rows(neurons))
    assert not all(len(label[group].unique()) == 1 for group in as_stored.groups)
    unit = found.rows()

    def spread(groups):
        return sum(float((unit[group] - unit[group].mean(dim=0)).square().sum()) for group in groups)

    draws = torch.Generator().manual_seed(2)
    assert spread(found.groups) <= min(spread(random_groups(60, 5, draws)) for _ in range(50))


def test_the_rows_that_are_compared_are_those_of_the_matrix_that_is_named(tmp_path):
    class Different(Rows):
        def matrix(self, name):
            if name == "up":
                return self.rows
            draws = torch.Generator().manual_seed(7)
            return torch.randn((16, 60) if name == "down" else (60, 16), generator=draws)

    neurons, label = _prototypes(spread=1)
    for rows, recovered in (("up", True), ("gate", False), ("down", False)):
        groups = Partition(Settings(num_experts=5, by="cluster", rows=rows), Different(neurons)).groups
        assert all(len(label[group].unique()) == 1 for group in groups) == recovered


def test_cluster_is_what_it_was(tmp_path):
    """Bit for bit: one greedy k-means on gate rows as they are, centroids as the router, E / K on down."""
    dense = write_dense(tmp_path, hidden_size=64, intermediate_size=96)
    out = upcycle(dense, tmp_path / "moe", "cluster", "--num-experts", "6", "--seed", "3")
    gate, up, down, router = expert_matrices(out)
    old = dense_matrices(dense)
    groups = balanced_kmeans(old[0], 6, generator(3, 1, "cluster"))
    for expert, neurons in enumerate(groups):
        assert torch.equal(gate[expert], old[0][neurons])
        assert torch.equal(up[expert], old[1][neurons])
        assert torch.equal(down[expert], old[2][:, neurons] * 3)
        assert torch.equal(router[expert], old[0][neurons].mean(dim=0))
    made = json.loads((out / "config.json").read_text())["moebed_upcycled"]
    assert made == {
        "method": "cluster",
        "dense": "mistral",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "granularity": 2,
        "fraction": 0.5,
        "noise_std": 0.02,
        "init_std": 0.02,
        "output_scale": None,
        "seed": 3,
    }


def test_partition_says_all_that_it_reads(tmp_path, dense):
    out = partition(dense, tmp_path / "moe", "--by", "cluster", "--rows", "gate", "--starts", "3", "--num-experts", "4")
    made = json.loads((out / "config.json").read_text())["moebed_upcycled"]
    assert (made["by"], made["rows"], made["normalise"], made["starts"]) == ("cluster", "gate", True, 3)
    assert "residual_experts" not in made


@pytest.mark.parametrize(
    ("scale", "factor"), [("published", 4.0), ("sum", 2.0), ("norm", 4.0), ("mean", 8.0), ("1.5", 1.5)]
)
def test_the_scale_is_on_down(tmp_path, dense, scale, factor):
    out = partition(dense, tmp_path / "moe", "--by", "contiguous", "--output-scale", scale)
    down = expert_matrices(out)[2]
    torch.testing.assert_close(torch.cat([*down], dim=1), dense_matrices(dense)[2] * factor)


def test_scales_are_those_of_the_table():
    """2 of 8, 4 of 16, 2 of 16."""
    for name, wanted in {"published": (4, 4, 8), "sum": (2, 4, 2), "norm": (4, 8, 5.657), "mean": (8, 16, 16)}.items():
        found = [output_scale(name, *sizes) for sizes in ((8, 2), (16, 4), (16, 2))]
        assert found == pytest.approx(wanted, rel=1e-3)
    assert output_scale(None, 8, 2) == 4
    assert output_scale(3.5, 8, 2) == 3.5
    assert output_scale("calibrate", 8, 2) is None


def test_scales_do_what_they_are_for():
    """Random routing of random parts, K of E at weight 1 / K: mean, norm and least squares of the table."""
    draws = torch.Generator().manual_seed(0)
    experts, chosen = 16, 4
    parts = torch.randn(4000, experts, 24, generator=draws) + 0.5  # of some mean, to see it kept
    routed = torch.rand(4000, experts, generator=draws).topk(chosen, dim=1).indices
    routed = parts.gather(1, routed.unsqueeze(2).expand(-1, -1, 24)).mean(dim=1)
    dense = parts.sum(dim=1)
    mean = output_scale("mean", experts, chosen)
    assert (mean * routed).mean().item() == pytest.approx(dense.mean().item(), rel=0.02)
    centred, parts_of = dense - dense.mean(), routed - routed.mean()
    norm = output_scale("norm", experts, chosen)
    assert (norm * parts_of).norm().item() == pytest.approx(centred.norm().item(), rel=0.02)
    best = (centred * parts_of).sum() / parts_of.square().sum()
    assert best.item() == pytest.approx(output_scale("sum", experts, chosen), rel=0.03)


def test_calibration_gives_every_channel_the_deviation_that_is_wanted():
    draws = torch.Generator().manual_seed(0)
    wanted, found = torch.randn(500, 6, generator=draws) * torch.arange(1, 7), torch.randn(500, 6, generator=draws)
    factor = calibrated(wanted, found)
    torch.testing.assert_close((found * factor).std(dim=0), wanted.std(dim=0))
    found[:, 2] = 1.0  # nothing to scale
    assert calibrated(wanted, found)[2] == 1


def test_routers(tmp_path, dense, ids):
    """Random as that of copy; centroids of unit rows; of hidden states; the noisy gate's two layers."""
    at_random = expert_matrices(partition(dense, tmp_path / "random", "--num-experts", "4"))[3]
    assert torch.equal(at_random, expert_matrices(upcycle(dense, tmp_path / "copy", "copy", "--num-experts", "4"))[3])
    out = partition(dense, tmp_path / "centroid", "--num-experts", "4", "--router", "centroid")
    up = torch.nn.functional.normalize(dense_matrices(dense)[1], dim=1)
    wanted = torch.stack([up[group].mean(dim=0) for group in places(dense, out, scale=2)])
    torch.testing.assert_close(expert_matrices(out)[3], wanted)
    out = partition(dense, tmp_path / "noisy", "--num-experts", "4", "--router", "noisy")
    decoder = load_decoder(out)
    assert Checkpoint.open(out).config.router == "noisy_topk"
    for router in decoder.routers:
        assert router.noise_proj.abs().sum() == 0
        assert 0.01 < router.input_proj.std() < 0.03
        assert 0.01 < router.output_proj.std() < 0.04
    assert not torch.equal(decoder.routers[0].input_proj, decoder.routers[1].input_proj)


def test_inner_experts_are_the_most_important_neurons_of_their_texts(tmp_path, dense, ids):
    options = ["--by", "inner", "--num-experts", "4", "--expert-width", "10", *ids]
    out = partition(dense, tmp_path / "moe", *options, "--router", "hidden_centroid")
    facts = _facts(dense, tmp_path, "tokens", 4)
    found = places(dense, out, scale=2)
    for expert in range(4):
        wanted = facts[1].importance[expert].argsort(descending=True)[:10]
        assert sorted(found[expert].tolist()) == sorted(wanted.tolist())
    torch.testing.assert_close(expert_matrices(out)[3], facts[1].centroids)


def _facts(dense, folder, clusters, experts):
    from moebed.upcycling.importance import importance_of
    from moebed.upcycling.text import TextWalk
    from moebed.views.layer import ProbeText

    found = torch.from_numpy(np.load(folder / "ids.npy"))
    text = ProbeText(found, torch.ones_like(found, dtype=torch.bool), torch.zeros(len(found), dtype=torch.int64))
    return importance_of(TextWalk(Checkpoint.open(dense), text), (0, 1), experts, clusters == "domains", seed=0)


def test_inter_has_its_residual_experts_as_shared_ones(tmp_path, dense, ids, capsys):
    """Weight 1 and no gate, their exact part of the dense FFN, whatever the scale of the routed ones."""
    options = ["--by", "inter", "--num-experts", "4", "--residual-experts", "2", *ids, "--output-scale", "3"]
    out = partition(dense, tmp_path / "moe", *options)
    assert "2 residual experts are one shared FFN with weight 1" in capsys.readouterr().err
    config = Checkpoint.open(out).config
    assert (config.num_shared_experts, config.shared_expert_gate, config.moe_intermediate_size) == (2, False, 8)
    found, old = tensors(out), dense_matrices(dense)
    up = found[f"{MLP}.shared_expert.up_proj.weight"]
    residual = torch.cdist(up, old[1]).argmin(dim=1)
    assert torch.equal(up, old[1][residual])
    assert torch.equal(found[f"{MLP}.shared_expert.gate_proj.weight"], old[0][residual])
    assert torch.equal(found[f"{MLP}.shared_expert.down_proj.weight"], old[2][:, residual])
    routed = places(dense, out, scale=3)
    assert not set(residual.tolist()) & set(routed.flatten().tolist())


def test_one_residual_expert_is_llama_moe_s_without_a_word(tmp_path, dense, ids, capsys):
    partition(dense, tmp_path / "moe", "--by", "inter", "--num-experts", "5", *ids)
    assert "residual experts" not in capsys.readouterr().err


def test_layers_that_stay_dense(tmp_path, dense, ids):
    out = partition(dense, tmp_path / "moe", "--by", "inner", "--num-experts", "4", "--dense-layers", "0", *ids)
    assert Checkpoint.open(out).config.num_experts == [0, 4]
    assert torch.equal(tensors(out)["layers.0.mlp.up_proj.weight"], tensors(dense)["layers.0.mlp.up_proj.weight"])


def test_the_seed_decides(tmp_path, dense):
    made = [partition(dense, tmp_path / f"{i}", "--num-experts", "4", "--seed", seed) for i, seed in enumerate("334")]
    one, same, other = (expert_matrices(path)[0] for path in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


WRONG = {
    "no such rule": (["--by", "chance"], "by is 'chance'; choose one of random, contiguous, cluster, inner, inter"),
    "no such scale": (["--output-scale", "unit"], "output-scale is 'unit'; give a number, or one of published,"),
    "a scale of nothing": (["--output-scale", "0"], "output-scale is 0.0; it must be a positive number"),
    "groups not dividing": (["--num-experts", "7"], "num-experts is 7, which does not divide"),
    "rows of no cluster": (["--rows", "gate"], "--rows does nothing with by random and router random"),
    "starts of no cluster": (["--starts", "2", "--router", "centroid"], "--starts does nothing with by random"),
    "residual of no inter": (["--by", "inner", "--residual-experts", "1"], "--residual-experts does nothing"),
    "neither true nor false": (
        ["--by", "cluster", "--normalise", "perhaps"],
        "--normalise is 'perhaps'; give true or false",
    ),
    "centroids of down": (["--by", "cluster", "--rows", "down", "--router", "centroid"], "router centroid: columns"),
    "an expert without text": (["--router", "hidden_centroid"], "no text belongs to an expert"),
    "no text": (["--by", "inner", "--num-experts", "4"], "needs text: by inner takes the importance of neurons"),
    "no text to calibrate": (["--output-scale", "calibrate"], "needs text: output-scale calibrate is found on it"),
    "residual twice": (["--by", "inter", "--shared-experts", "1"], "shared-experts is 1, but by inter makes 1"),
    "too wide": (["--by", "inner", "--expert-width", "49"], "expert-width is 49, but the dense FFN has 48 neurons"),
    "not all dealt out": (["--by", "inter", "--sharing", "false"], "8 routed and 1 residual experts of 5 neurons"),
    "layout": (["--router", "noisy", "--family", "mixtral"], "router is 'noisy_topk'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line_and_leave_nothing(tmp_path, dense, ids, capsys, name):
    options, said = WRONG[name]
    options = options if name.startswith("no text") else [*options, *ids]
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main(["upcycle", str(dense), "--out", str(tmp_path / "moe"), "--method", "partition", *options]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("moebed: error: ")
    assert said in error.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_text_cannot_tell_is_one_line(tmp_path, dense, ids, capsys):
    command = ["upcycle", str(dense), "--out", str(tmp_path / "moe"), "--method", "partition", "--by", "inner", *ids]
    assert main([*command, "--num-experts", "4", "--text-clusters", "domains"]) == 2
    assert "the text has 1 domains but 4 experts are to be told apart by them" in capsys.readouterr().err
    no_text = [*command[: -len(ids)], "--num-experts", "4", "--by", "random", "--memory-budget", "1KiB"]
    assert main(no_text) == 2
    assert "--memory-budget does nothing without text" in capsys.readouterr().err
    assert main([*command, "--num-experts", "4", "--memory-budget", "1MB"]) == 2
    assert "more than memory-budget 1 MB; give less text, or a larger budget" in capsys.readouterr().err
    np.save(tmp_path / "few.npy", np.array([[1, 2, 3]]))
    command[command.index("--input-ids") + 1] = str(tmp_path / "few.npy")
    assert main([*command, "--num-experts", "8"]) == 2
    assert "give more text, or fewer experts" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_facts_of_a_layer_are_asked_for_by_name():
    assert TextFacts() == (None, None, "", None)
    assert Partition.asks_text(Settings(by="inter"))
    assert not Partition.asks_text(Settings())
