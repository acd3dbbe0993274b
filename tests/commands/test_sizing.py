"""`moebed size`: the table, and experts made as wide as matches another model."""

import pytest
import yaml

from moebed.cli import main
from moebed.commands.size import match_width, overridden, read_settings, size_table
from moebed.errors import ConfigError
from moebed.model.flops import count_parameters, flops_per_token
from tests.conftest import tiny_config


def test_a_free_list_is_matched_by_width():
    """Of [4, 1] experts in place of [4, 4]: no width is nearer, and what remains is what the result says."""
    reference, config = tiny_config(), tiny_config(num_experts=[4, 1], num_experts_per_tok=1)
    found = match_width(config, reference, 128)
    wanted, total = count_parameters(reference)[0], count_parameters(found.config)[0]
    width = found.config.moe_intermediate_size
    assert width % 8 == 0
    assert found.config.num_experts == [4, 1]
    for other in (width - 8, width + 8):
        changed = tiny_config(num_experts=[4, 1], num_experts_per_tok=1, moe_intermediate_size=other)
        assert abs(count_parameters(changed)[0] - wanted) >= abs(total - wanted)
    assert found.parameters == pytest.approx(total / wanted - 1)
    assert found.flops == pytest.approx(flops_per_token(found.config, 128) / flops_per_token(reference, 128) - 1)


def test_granularity_of_one_expert_cut_in_two_is_exact_but_for_the_router():
    """8 experts of half the width: no width is nearer than the half, the router's rows being few."""
    found = match_width(tiny_config(num_experts=8, num_experts_per_tok=4), tiny_config(), 128)
    assert found.config.moe_intermediate_size == 24
    more = 2 * 4 * 32  # rows of two routers
    assert found.parameters == pytest.approx(more / count_parameters(tiny_config())[0])
    assert found.flops == pytest.approx(2 * more / flops_per_token(tiny_config(), 128))


@pytest.mark.parametrize("granularity", [8, 64])
def test_width_is_a_multiple(granularity):
    wide = tiny_config(moe_intermediate_size=1000)
    assert (
        match_width(tiny_config(num_experts=6), wide, 128, granularity).config.moe_intermediate_size % granularity == 0
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 0, "intermediate_size": 48}, "needs experts"),
        ({"moe_intermediate_size": [48, 24]}, "one number as their width"),
        ({"num_experts": 200}, "even with experts of width 8"),
    ],
)
def test_what_cannot_be_matched_is_one_line(changes, words):
    with pytest.raises(ConfigError, match=words):
        match_width(tiny_config(**changes), tiny_config(), 128)


def test_table_names_every_layer():
    config = tiny_config(num_experts=[0, 4], intermediate_size=96, num_shared_experts=1)
    header, dense, moe, whole = size_table(config, 64).splitlines()
    assert header.split() == ["layer", "experts", "chosen", "shared", "width"]
    assert dense.split() == ["0", "dense", "96"]
    assert moe.split() == ["1", "4", "2", "1", "48"]
    assert whole.startswith(f"{count_parameters(config)[0]:,} parameters, {count_parameters(config)[1]:,} active")


def _recipe(folder, name="one.yaml", **config):
    path = folder / name
    content = {"model": {"config": tiny_config(**config).to_dict()}, "data": {"sequence_length": 64}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_command(tmp_path, capsys):
    one, other = _recipe(tmp_path), _recipe(tmp_path, "other.yaml", num_experts=8)
    assert main(["size", str(one), "allocation=ascending", "num_experts=6"]) == 0
    settings = read_settings(one, ["allocation=ascending", "model.config.num_experts=6"])
    config, length = settings.config(), settings.sequence_length
    assert (config.num_experts, length) == ([3, 9], 64)
    assert capsys.readouterr().out.splitlines() == size_table(config, 64).splitlines()
    assert main(["size", str(one), "--match", str(other), "--granularity", "32"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"moe_intermediate_size 96 matches {other}: total")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.yaml"], "recipe no.yaml cannot be read"),
        (["RECIPE", "num_expert=4"], "did you mean 'num_experts'"),
        (["RECIPE", "ascending"], "'ascending' changes nothing; write KEY=VALUE"),
        (
            ["RECIPE", "--match", "RECIPE", "--granularity", "0"],
            "--granularity is '0'; give a whole number of at least 1",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, words):
    recipe = str(_recipe(tmp_path))
    assert main(["size", *(recipe if word == "RECIPE" else word for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_overrides_reach_into_nested_data():
    content = {"a": {"b": 1, "c": 2}, "d": 3}
    assert overridden(content, {"a.b": 5, "e.f": 6, "d": 7}) == {"a": {"b": 5, "c": 2}, "d": 7, "e": {"f": 6}}
    assert content == {"a": {"b": 1, "c": 2}, "d": 3}
