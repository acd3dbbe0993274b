"""The driver and the walk: padding, repetition, ragged models, restored state, timing, imports."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from probe_cases import all_needs, make_text, probe

from moebed.errors import ConfigError
from moebed.views.layer import Need
from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.registry import BY_NAME_ONLY, DEFAULT_PROBES, PROBES, resolve_probes
from probes.report.units import unit_of
from probes.running.driver import Timing, needs_of, run_probes

RAGGED = {"num_experts": [4, 0, 6, 1], "num_experts_per_tok": [2, 0, 6, 1], "num_hidden_layers": 4}
ONE_EXPERT = {"num_experts": 1, "num_experts_per_tok": 1}


def assert_same(one, two, exact=True):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].arrays.keys() == two[name].arrays.keys()
        for key, value in one[name].arrays.items():
            other = two[name].arrays[key]
            assert value.dtype == other.dtype
            if exact or value.dtype.kind != "f":
                np.testing.assert_array_equal(value, other, err_msg=f"{name} {key}")
            else:
                np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")


def test_two_walks_give_identical_numbers(make_decoder, text):
    decoder = make_decoder()
    runs = [probe(walk(decoder, text, all_needs()), *PROBES) for _ in range(2)]
    assert_same(*runs)


def test_padding_never_counts(make_decoder):
    decoder = make_decoder(num_shared_experts=1)
    runs = [probe(walk(decoder, make_text([10, 6, 9], width), all_needs()), *PROBES) for width in (10, 23)]
    assert_same(*runs, exact=False)


@pytest.mark.parametrize(
    ("changes", "draw"),
    [
        pytest.param(RAGGED, to_rgb, id="ragged, with room for labels", marks=(pytest.mark.drawn, pytest.mark.slow)),
        pytest.param(RAGGED, None, id="ragged, built"),
        pytest.param(ONE_EXPERT, to_rgb, id="one expert", marks=pytest.mark.slow),
        pytest.param(ONE_EXPERT, None, id="one expert, built"),
        pytest.param({"num_experts": 0}, to_rgb, id="dense"),
    ],
)
def test_every_probe_describes_and_draws_every_model(make_decoder, text, changes, draw):
    results = probe(walk(make_decoder(**changes, num_shared_experts=1), text, all_needs()), *PROBES)
    for name, result in results.items():
        assert result.notes or result.headlines, name
        assert all(np.isfinite(value) for value in result.scalars.values()), name
        assert [key for key in {*result.scalars, *result.headlines} if not unit_of(f"{name}/{key}")] == []
        for array in result.arrays.values():
            assert array.dtype.kind in "iU" or array.dtype == np.float32, name
        for build in result.figures.values():
            figure = build()
            assert draw is None or draw(figure).std() > 0
            title = figure._suptitle.get_window_extent()
            assert title.x0 >= 0, figure.get_suptitle()
            assert title.x1 <= figure.bbox.x1, figure.get_suptitle()
        again = PROBES[name].describe(result.arrays)
        assert again.scalars == result.scalars
        assert again.figures.keys() == result.figures.keys()


@pytest.mark.filterwarnings("error:.*legend")
@pytest.mark.parametrize("lengths", [[6], [6, 5]])
def test_what_a_short_text_cannot_show_is_said_in_its_panel(make_decoder, lengths):
    """No empty axes, and no line in a legend that was not drawn."""
    for name, result in probe(walk(make_decoder(), make_text(lengths, 8), all_needs()), *PROBES).items():
        for picture, build in result.figures.items():
            for ax in filter(lambda ax: ax.get_visible(), build().axes):
                lines = [line for line in ax.lines if np.isfinite(np.asarray(line.get_ydata(), float)).any()]
                where = (name, picture, ax.get_title())
                assert lines or ax.images or ax.collections or ax.patches or ax.texts, where
                drawn = [line for line in ax.lines if len(line.get_ydata()) and line.get_label()[0] != "_"]
                assert all(line in lines for line in drawn), where


def test_a_diverged_model_is_drawn_all_the_same(make_decoder, text):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.layers[1].mlp.experts.down_proj.fill_(float("nan"))
    for result in probe(walk(decoder, text, all_needs()), *PROBES).values():
        for build in result.figures.values():
            assert to_rgb(build()).std() > 0


def test_no_expert_is_run_unless_a_probe_asks(make_decoder, text, monkeypatch):
    decoder = make_decoder()
    monkeypatch.setattr("moebed.views.layer.LayerView.experts", lambda *a: pytest.fail("experts were run"))
    probe(walk(decoder, text, frozenset({Need.ROUTING, Need.WEIGHTS})), "balance", "matrix_similarity")


def test_the_driver_leaves_model_modes_gradients_and_randomness_alone(make_decoder, text):
    decoder = make_decoder().train()
    decoder.layers[1].eval()
    modes = [module.training for module in decoder.modules()]
    before, state = {k: v.clone() for k, v in decoder.state_dict().items()}, torch.get_rng_state()
    probe(walk(decoder, text, all_needs()), *PROBES)
    assert [module.training for module in decoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in decoder.parameters())


def test_modes_are_restored_when_a_probe_fails(make_decoder, text, monkeypatch):
    decoder = make_decoder().train()
    monkeypatch.setattr(PROBES["balance"], "update", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe(walk(decoder, text, all_needs()), "balance")
    assert decoder.training


def test_timing_names_every_probe(make_decoder, text):
    probes, timing = [PROBES[name]() for name in ("balance", "norm_vs_score")], Timing()
    run_probes(walk(make_decoder(), text, needs_of(probes)), probes, timing)
    assert timing.probe.keys() == {"balance", "norm_vs_score"}
    assert timing.forward > 0
    assert timing.total == pytest.approx(timing.forward + sum(timing.probe.values()))


def test_resolving_names():
    assert resolve_probes(None) == DEFAULT_PROBES
    assert resolve_probes(["all"]) == tuple(name for name in PROBES if name not in BY_NAME_ONLY)
    assert set(resolve_probes(["all", *BY_NAME_ONLY])) == set(PROBES)
    assert resolve_probes(["chosen_vs_rest"]) == ("expert_outputs", "chosen_vs_rest")
    assert resolve_probes(["balance", "balance"]) == ("balance",)
    with pytest.raises(ConfigError, match="unknown probe 'balanse'; did you mean 'balance'"):
        resolve_probes(["balanse"])


def test_importing_probes_is_cheap():
    code = "import sys, probes; print(sorted({'torch', 'matplotlib', 'lightning', 'scipy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("expert", [-1, 0, 3])
def test_ablation_is_the_loss_of_a_model_that_never_chooses_the_expert(make_decoder, text, expert):
    decoder = make_decoder().eval()
    view = next(v for v in walk(decoder, text, frozenset({Need.ROUTING})) if v.index == 1)
    found = view.ablate(expert)
    router = decoder.layers[1].mlp.router
    if expert >= 0:
        mask = torch.zeros(router.num_experts).index_fill(0, torch.tensor(expert), -torch.inf)
        choose = router.choose
        router.choose = lambda logits: choose(logits + mask)
    logits = decoder(text.input_ids).logits[text.token_mask]
    targets = text.targets
    wanted = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    assert torch.equal(found.isnan(), targets < 0)
    torch.testing.assert_close(found[targets >= 0], wanted[targets >= 0].detach(), rtol=1e-4, atol=1e-5)


def test_recomputed_activations_are_not_counted_twice(make_decoder, text):
    """Probes of a model in training mode that recomputes its activations are those of one that does not."""
    plain = make_decoder()
    recomputing = make_decoder()
    recomputing.activation_checkpointing = True
    recomputing.train()
    recomputing(text.input_ids).logits.sum().backward()
    names = ("balance", "routing", "domain_share", "repeats", "coactivation")
    one, other = (probe(walk(decoder, text, all_needs()), *names) for decoder in (plain, recomputing))
    for name in names:
        for key, value in one[name].arrays.items():
            np.testing.assert_array_equal(other[name].arrays[key], value, err_msg=f"{name} {key}")
    load = other["balance"].arrays["load/0"]
    assert load.sum() == pytest.approx(1)
