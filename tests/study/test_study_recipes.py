"""The studies of recipes/studies: every arm is built on the meta device and counted, and arms are what they claim."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moebed.commands.size import overridden
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder, MoE
from moebed.model.flops import count_parameters, flops_per_token
from moebed.model.routers import cautions, untaught
from moebed.study.recipe import study_content
from moebed.upcycling.methods import METHODS, Settings

EXPERIMENTS = ("routing", "allocation", "scheme", "measurement", "granularity")
FOLDER = Path(__file__).parents[2] / "recipes" / "studies"
NAMES = [f"{name}_{size}" for name in EXPERIMENTS for size in ("small", "gpu", "paper")]
NAMES += ["allocation_shapes_small", "related_small", "locality_small"]
NAMES += ["planted_small", "balance_planted_small", "null_planted_small"]
PLANTED = ("allocation_shapes", "scheme", "granularity", "measurement", "coupling", "pool")
NAMES += [f"{name}_planted" for name in PLANTED]
STUDIES = {name: FOLDER / f"{name}.yaml" for name in NAMES}


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study and its base recipe."""
    study = study_content(STUDIES[name])
    return study, yaml.safe_load((STUDIES[name].parent / study["base"]).read_text())


def _config(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> ModelConfig:
    """The base recipe's model under dotted overrides, later ones first."""
    changes = {key: value for one in overrides for key, value in one.items() if key.startswith("model.config.")}
    return ModelConfig.from_dict(overridden(base, changes)["model"]["config"])


def _dense(study: Mapping[str, Any], base: Mapping[str, Any], arm: Mapping[str, Any]) -> ModelConfig:
    """The dense model that an arm of several steps starts from."""
    return _config(base, study.get("settings", {}), arm["steps"][0]["fit"])


@cache
def _arms(name: str) -> dict[str, ModelConfig]:
    """What each arm of a study ends in."""
    study, base = _read(name)
    settings, found = study.get("settings", {}), {}
    for arm, content in study["arms"].items():
        if "steps" not in content:
            found[arm] = _config(base, settings, content)
            continue
        _, upcycle, last = (next(iter(step.values())) for step in content["steps"])
        options = {key: value for key, value in upcycle.items() if key != "method"}
        width = _dense(study, base, content).intermediate_size
        experts, chosen, width = METHODS[upcycle["method"]].sizes(Settings(**options), width)
        sizes = {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
        found[arm] = _config(base, settings, {f"model.config.{key}": value for key, value in sizes.items()}, last)
    return found


@cache
def _built(name: str) -> dict[str, Decoder]:
    """Each arm's model, without memory for its weights."""
    with torch.device("meta"):
        return {arm: Decoder(config) for arm, config in _arms(name).items()}


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_has_the_parameters_that_its_config_counts(name):
    for arm, config in _arms(name).items():
        built = sum(parameter.numel() for parameter in _built(name)[arm].parameters())
        assert built == count_parameters(config)[0], arm


@pytest.mark.parametrize("name", [f"{study}_paper" for study in ("allocation", "scheme", "granularity")])
def test_every_arm_s_flops_follow_from_the_shapes_of_its_matrices(name):
    """Two for each weight that a token passes, of experts K in E, and attention's two products with half a sequence."""
    length = 2048
    for arm, config in _arms(name).items():
        decoder, matrices = _built(name)[arm], 0
        for part, parameter in decoder.named_parameters():
            block = decoder.blocks[int(part.split(".")[1])] if part.startswith("layers.") else None
            share = 1.0
            if block is not None and isinstance(block.mlp, MoE) and ".experts." in part:
                share = block.mlp.router.num_experts_per_tok / block.mlp.router.num_experts
            if parameter.ndim > 1 and not part.startswith("embed_tokens"):
                matrices += share * parameter.numel()
        attention = 4 * length / 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        assert flops_per_token(config, length) == pytest.approx(2 * matrices + attention, rel=1e-9), arm


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_matched_as_their_study_says(name):
    study, base = _read(name)
    arms = _arms(name)
    baseline, tolerance = arms[study["baseline"]], study.get("tolerance", 0.02)
    length = base["data"]["sequence_length"]
    for arm, config in arms.items():
        if "total_parameters" in study.get("match", ()):
            assert count_parameters(config)[0] / count_parameters(baseline)[0] == pytest.approx(1, abs=tolerance), arm
        if "active_flops" in study.get("match", ()):
            ratio = flops_per_token(config, length) / flops_per_token(baseline, length)
            assert ratio == pytest.approx(1, abs=tolerance), arm


def test_each_control_of_hyper_moe_is_matched_with_it_as_the_study_says():
    arms = _arms("related_small")
    parameters = {arm: count_parameters(config)[0] for arm, config in arms.items()}
    flops = {arm: flops_per_token(config, 256) for arm, config in arms.items()}
    for arm in ("constant", "free", "shared_flops"):
        assert flops[arm] == pytest.approx(flops["hyper"], rel=1e-3), arm
    assert parameters["constant"] == parameters["hyper"]
    assert parameters["shared_parameters"] == pytest.approx(parameters["hyper"], rel=1e-3)
    assert parameters["top1"] < min(parameters["free"], parameters["shared_flops"])
    assert max(parameters["free"], parameters["shared_flops"]) < 0.9 * parameters["hyper"]
    assert flops["top1"] < flops["hyper"] < flops["shared_parameters"]
    assert all(config.num_experts_per_tok == 1 and not config.norm_topk_prob for config in arms.values())


def test_allocations_are_equal_to_the_last_parameter_where_no_layer_is_dense():
    for name in ("allocation_shapes_small", "allocation_paper"):
        arms = _arms(name)
        shapes = [arms[arm] for arm in ("uniform", "ascending", "ascending_small_last", "descending")]
        assert len({count_parameters(config) for config in shapes}) == 1
        assert len({str(config.num_experts) for config in shapes}) == 4


def test_one_dense_layer_at_each_index_in_turn():
    arms = _arms("allocation_small")
    layers = set(range(arms["uniform"].num_hidden_layers))
    for index in layers:
        assert set(arms[f"dense_at_{index}"].moe_layers) == layers - {index}
    assert arms["uniform"].moe_layers == sorted(layers)


def test_six_models_of_table_7():
    """3.6 B parameters; no dense layer, or one at index 1, 6, 12, 18, 24 of 24 layers (2406.18219v3)."""
    arms = _arms("allocation_paper")
    assert count_parameters(arms["uniform"])[0] == pytest.approx(3.6e9, rel=0.01)
    assert arms["uniform"].moe_layers == list(range(24))
    for index in (1, 6, 12, 18, 24):
        (config,) = [value for arm, value in arms.items() if re.fullmatch(rf"dense_{index}(st|th)", arm)]
        assert set(range(24)) - set(config.moe_layers) == {index - 1}
        assert config.layer(3) == arms["uniform"].layer(3)


@pytest.mark.parametrize(
    ("name", "arm", "total", "active"),
    [
        ("routing_paper", "softmax_topk", 732e6, None),  # 2501.13074, section 4
        ("granularity_paper", "experts_16", 2.0e9, 0.3e9),  # 2401.06066, section 4.1: of one decimal
        ("granularity_paper", "experts_64_shared", 2.0e9, 0.3e9),
    ],
)
def test_published_sizes(name, arm, total, active):
    found = count_parameters(_arms(name)[arm])
    assert found[0] == pytest.approx(total, rel=0.01)
    if active is not None:
        assert found[1] == pytest.approx(active, abs=0.05e9)


def test_the_dense_model_of_drop_upcycling_is_152_million():
    study, base = _read("scheme_paper")
    dense = _dense(study, base, study["arms"]["drop_50"])
    assert dense.moe_layers == []
    assert count_parameters(dense)[0] == pytest.approx(152e6, rel=0.005)


def test_arms_of_locality_differ_in_router_loss_and_rows_alone():
    """Is it the router or the loss, and is it the text on the ranks?"""
    study, _ = _read("locality_small")
    arms = _arms("locality_small")
    found = {
        (c.router, c.locality_loss_coef, study["arms"][name].get("data.rows_by_domain", True), c.norm_topk_prob)
        for name, c in arms.items()
    }
    assert found >= {
        ("softmax_topk", 0.0, True, False),
        ("hash", 0.0, True, False),
        ("grap", 0.0, True, False),
        ("grap", 0.0, True, True),
        ("grap", 0.01, True, False),
        ("softmax_topk", 0.01, True, False),
        ("softmax_topk", 0.01, False, False),
    }
    assert len(found) == len(arms)
    assert {(c.num_experts_per_tok, c.expert_ranks, c.ranks_per_node) for c in arms.values()} == {(1, 4, 2)}


@pytest.mark.parametrize("name", ["routing_small", "routing_paper"])
def test_autonomy_is_as_wide_as_its_paper_s_formula(name):
    """d_wide = (3·H·F − d_low·H) / (d_low + 2H), to a multiple of 8 (2501.13074, section 3.2)."""
    arms = _arms(name)
    hidden, width = arms["softmax_topk"].hidden_size, arms["softmax_topk"].moe_intermediate_size
    found = [config for config in arms.values() if config.router == "autonomy"]
    assert found
    for config in found:
        low = config.router_options.d_low
        wide = (3 * hidden * width - low * hidden) / (low + 2 * hidden)
        assert abs(config.moe_intermediate_size - wide) <= 8
        assert config.norm_topk_prob is False


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_study_command_accepts_it(name, tmp_path):
    """Every key, every arm and every step, as `moebed study` checks them before anything starts."""
    from moebed.study.recipe import read_recipe
    from moebed.study.runs import plan_study

    plan = plan_study(read_recipe(STUDIES[name]), tmp_path)
    study, _ = _read(name)
    assert set(plan.arms) == set(study["arms"])
    assert len(plan.final) == len(study["arms"]) * len(study["seeds"])
    said = [f"arm {arm!r}: {said}" for arm, config in _arms(name).items() for said in cautions(config)]
    assert [note for note in plan.notes if "at one learning rate" not in note] == said
    base = plan.arms[study["baseline"]].config
    for key in ("hidden_size", "moe_intermediate_size"):  # arms of another width are said to be so, and no others
        other = [arm for arm, found in plan.arms.items() if getattr(found.config, key) != getattr(base, key)]
        noted = [note for note in plan.notes if f"another {key} than" in note]
        assert [note.partition(": another")[0] for note in noted] == ([", ".join(other)] if other else [])
    assert list(tmp_path.iterdir()) == []
    for arm, config in _arms(name).items():
        assert plan.arms[arm].config == config


@pytest.mark.parametrize("path", [*FOLDER.glob("*.yaml"), *FOLDER.parent.glob("*.yaml")], ids=lambda path: path.stem)
def test_no_recipe_has_a_router_that_the_loss_teaches_nothing(path):
    """One expert a token, its weight divided by itself."""
    recipe = yaml.safe_load(path.read_text())
    if path.parent == FOLDER:
        recipe = study_content(path)
        base = yaml.safe_load((path.parent / recipe["base"]).read_text())
        steps = [arm["steps"][-1]["fit"] if "steps" in arm else arm for arm in recipe["arms"].values()]
        configs = [_config(base, recipe.get("settings", {}), arm) for arm in steps] if path.stem not in STUDIES else []
        configs += list(_arms(path.stem).values()) if path.stem in STUDIES else []
        assert configs
    else:
        configs = [ModelConfig.from_dict(recipe["model"]["config"])] if "config" in recipe.get("model", {}) else []
    assert [untaught(config) for config in configs if untaught(config)] == []
