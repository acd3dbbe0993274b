"""What each method makes of a dense model, read back through load_decoder."""

import json

import pytest
import torch
from dense_sources import SOURCES, logits, tensors, write_dense

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.cli import main
from moebed.upcycling.clusters import balanced_kmeans
from moebed.upcycling.command import METHOD_LINES
from moebed.upcycling.methods import METHODS, Drop, Settings

GATE_UP, DOWN = "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"
MLP = "layers.1.mlp"


def upcycle(dense, out, method, *options):
    assert main(["upcycle", str(dense), "--out", str(out), "--method", method, *options]) == 0
    return out


def dense_matrices(path):
    found = tensors(path)
    return tuple(found[f"{MLP}.{name}_proj.weight"] for name in ("gate", "up", "down"))


def expert_matrices(path):
    found = tensors(path)
    gate, up = found[GATE_UP].chunk(2, dim=1)
    return gate, up, found[DOWN], found[f"{MLP}.router.weight"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("method", "options"), [("copy", []), ("split", ["--granularity", "3"])])
def test_the_first_logits_are_the_dense_model_s(tmp_path, source, method, options):
    dense = write_dense(tmp_path, source)
    out = upcycle(dense, tmp_path / "moe", method, "--num-experts", "4", *options)
    wanted, found = logits(load_decoder(dense)), logits(load_decoder(out))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert Checkpoint.open(out).family.model_type == ("moebed" if source == "qwen2" else "mixtral")


@pytest.mark.parametrize("method", ["noise", "drop", "cluster", "scratch"])
def test_other_methods_change_the_experts_and_nothing_else(tmp_path, method):
    dense = write_dense(tmp_path)
    out = upcycle(dense, tmp_path / "moe", method, "--num-experts", "4")
    before, after = tensors(dense), tensors(out)
    kept = [name for name in before if ".mlp." not in name]
    assert len(kept) == 2 * 6 + 3
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert (logits(load_decoder(dense)) - logits(load_decoder(out))).abs().max() > 1e-3
    assert not torch.equal(after[GATE_UP][0], after[GATE_UP][1])


@pytest.mark.parametrize("method", ["noise", "drop", "scratch"])
def test_what_is_drawn_for_a_matrix_is_drawn_for_no_other(method):
    """No two matrices, experts or layers have the same random numbers, or gate and up of an expert were one."""

    class Dense:
        def __init__(self, layer):
            self.layer = layer

        def matrix(self, name):
            return torch.linspace(-1, 1, 40 * 50).view((50, 40) if name == "down" else (40, 50))

    drawn = []
    for layer in range(2):
        made = METHODS[method](Settings(fraction=1.0), Dense(layer))
        for name in ("gate", "up", "down"):
            old = made.ffn.matrix(name) if method == "noise" else 0
            drawn += [(made.expert(name, expert) - old).flatten() for expert in range(2)]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlation.abs().max() < 0.1
    assert len(drawn) == 12


def test_shared_experts_gate_and_up_are_drawn_apart(tmp_path):
    out = upcycle(write_dense(tmp_path, "qwen2"), tmp_path / "moe", "copy", "--shared-experts", "1")
    made = {name: value for name, value in tensors(out).items() if ".shared_expert." in name and "down" not in name}
    drawn = torch.stack([value.float().flatten() for value in made.values()])
    assert (torch.corrcoef(drawn) - torch.eye(len(drawn))).abs().max() < 0.1
    assert len(drawn) == 4


def test_qwen2_with_a_shared_expert_is_a_qwen2_moe_with_equal_logits(tmp_path):
    import transformers

    dense = write_dense(tmp_path, "qwen2")
    out = upcycle(dense, tmp_path / "moe", "copy", "--num-experts", "4", "--shared-experts", "1")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = logits(load_decoder(dense))
    torch.testing.assert_close(model(ids).logits.detach(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_noise_changes_a_fraction_of_the_entries_by_its_deviation(tmp_path):
    dense = write_dense(tmp_path, hidden_size=64, intermediate_size=256)
    out = upcycle(dense, tmp_path / "moe", "noise", "--fraction", "0.25", "--noise-std", "0.05")
    for old, new in zip(dense_matrices(dense), expert_matrices(out), strict=False):
        change = new - old
        changed = change != 0
        assert abs(changed.float().mean().item() - 0.25) < 0.01
        assert abs(change[changed].std().item() - 0.05) < 0.002
        assert not torch.equal(change[0], change[1])


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_drop_draws_one_set_of_neurons_for_the_three_matrices(tmp_path, fraction):
    dense = write_dense(tmp_path, hidden_size=64, intermediate_size=256)
    out = upcycle(dense, tmp_path / "moe", "drop", "--fraction", str(fraction), "--num-experts", "3")
    old, new = dense_matrices(dense), expert_matrices(out)
    sets = []
    for expert in range(3):
        gate, up = ((new[m][expert] != old[m]).all(dim=1) for m in (0, 1))
        down = (new[2][expert] != old[2]).all(dim=0)
        assert torch.equal(gate, up)
        assert torch.equal(gate, down)
        assert gate.sum() == round(256 * fraction)
        assert torch.equal(new[0][expert][~gate], old[0][~gate])
        if fraction:
            dropped, drawn = old[2][:, down], new[2][expert][:, down]
            assert abs(drawn.std() / dropped.std() - 1) < 0.05
        sets.append(gate)
    if fraction == 0.5:
        assert not torch.equal(sets[0], sets[1])


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_drop_keeps_mean_and_deviation_of_what_it_drops(name):
    """Of the dropped neurons and of no others: those of high index are larger, and vary more."""

    class Growing:
        layer = 0

        def matrix(self, name):
            draws = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
            rows = torch.linspace(0, 1, 400).unsqueeze(1) ** 3 * (3 + draws)
            return rows.T if name == "down" else rows

    method = Drop(Settings(fraction=0.05), Growing())
    old, new = (of.T if name == "down" else of for of in (Growing().matrix(name), method.expert(name, 1)))
    dropped = method.dropped(1)
    assert old[dropped].std() < 0.8 * old.std()
    assert old[dropped].mean() < old.mean() - 0.15 * old.std()
    assert abs(new[dropped].std() / old[dropped].std() - 1) < 0.05
    assert abs(new[dropped].mean() - old[dropped].mean()) < 0.05 * old.std()


def test_split_scales_down_alone_and_repeats_the_router_s_rows(tmp_path):
    dense = write_dense(tmp_path)
    out = upcycle(dense, tmp_path / "moe", "split", "--num-experts", "3", "--granularity", "2")
    gate, up, down, router = expert_matrices(out)
    old = dense_matrices(dense)
    assert router.shape == (6, 32)
    for copy in range(3):
        pair = slice(2 * copy, 2 * copy + 2)
        assert torch.equal(gate[pair].flatten(0, 1), old[0])
        assert torch.equal(up[pair].flatten(0, 1), old[1])
        assert torch.equal(torch.cat([*down[pair]], dim=1), 2 * old[2])
        assert torch.equal(router[2 * copy], router[2 * copy + 1])
    assert not torch.equal(router[0], router[2])
    assert Checkpoint.open(out).config.num_experts_per_tok == 4


def test_cluster_deals_every_neuron_to_one_expert(tmp_path):
    dense = write_dense(tmp_path)
    out = upcycle(dense, tmp_path / "moe", "cluster", "--num-experts", "4", "--num-experts-per-tok", "2")
    gate, up, down, router = expert_matrices(out)
    old = dense_matrices(dense)
    together = torch.cat([gate.flatten(0, 1), up.flatten(0, 1), down.transpose(1, 2).flatten(0, 1) / 2], dim=1)
    wanted = torch.cat([old[0], old[1], old[2].T], dim=1)
    order = torch.cdist(wanted, together).argmin(dim=1)
    assert len(order.unique()) == 48
    torch.testing.assert_close(together[order], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(router, gate.mean(dim=1))


def test_cluster_with_every_expert_and_its_scale_is_the_dense_model(tmp_path):
    """Equal weights of all E groups are 1 / E each, which a scale of E undoes; the centroids are made equal for it."""
    dense = write_dense(tmp_path)
    options = ["--num-experts", "4", "--num-experts-per-tok", "4", "--output-scale", "4"]
    decoder = load_decoder(upcycle(dense, tmp_path / "moe", "cluster", *options))
    for block in decoder.blocks:
        torch.nn.init.zeros_(block.mlp.router.weight)
    wanted = logits(load_decoder(dense))
    torch.testing.assert_close(logits(decoder), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_balanced_kmeans_finds_groups_that_are_there():
    draws = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(6, 16, generator=draws)
    label = torch.arange(6).repeat_interleave(20)[torch.randperm(120, generator=draws)]
    groups = balanced_kmeans(centres[label] + 0.1 * torch.randn(120, 16, generator=draws), 6, draws)
    assert groups.shape == (6, 20)
    assert all(len(label[group].unique()) == 1 for group in groups)


def test_balanced_kmeans_deals_equally_where_groups_are_not_equal():
    draws = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.zeros(30, 4), torch.ones(10, 4)]) + 0.01 * torch.randn(40, 4, generator=draws)
    groups = balanced_kmeans(rows, 2, draws)
    assert sorted(groups.flatten().tolist()) == list(range(40))
    assert any(set(range(30, 40)) <= set(group.tolist()) for group in groups)


def test_the_seed_decides(tmp_path):
    dense = write_dense(tmp_path)
    made = [upcycle(dense, tmp_path / f"moe{i}", "noise", "--seed", seed) for i, seed in enumerate("334")]
    one, same, other = (tensors(path)[GATE_UP] for path in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(tensors(made[0])["layers.0.mlp.router.weight"], tensors(made[0])[f"{MLP}.router.weight"])


def test_layers_that_stay_dense(tmp_path):
    dense = write_dense(tmp_path)
    out = upcycle(dense, tmp_path / "moe", "copy", "--dense-layers", "0", "--num-experts", "4")
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config.num_experts == [0, 4]
    wanted = logits(load_decoder(dense))
    torch.testing.assert_close(logits(load_decoder(out)), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_the_config_says_how_it_was_made(tmp_path):
    out = upcycle(write_dense(tmp_path), tmp_path / "moe", "drop", "--fraction", "0.3", "--seed", "9")
    made = json.loads((out / "config.json").read_text())["moebed_upcycled"]
    assert made["method"] == "drop"
    assert (made["fraction"], made["seed"], made["dense"]) == (0.3, 9, "mistral")


def test_the_help_names_every_method():
    assert list(METHOD_LINES) == list(METHODS)
