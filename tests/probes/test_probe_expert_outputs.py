"""expert_outputs and chosen_vs_rest: angles that can be told by hand, traps, subsets of tokens, oracles."""

import math

import numpy as np
import pytest
import torch
from oracle_models import load_decoder
from output_cases import dense_view, output_view, plain_text
from probe_cases import all_needs, probe

from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.chosen_vs_rest import ChosenVsRest
from probes.expert_outputs import ExpertOutputs
from probes.figures.drawing import to_rgb
from probes.measures.output_pairs import angular_similarity, chosen_means, pair_cosines, taken_tokens, to_square
from probes.running.driver import run_probes
from tests import oracle_shares
from tests.conftest import ORACLES


def run(*views):
    return run_probes(views, [ExpertOutputs(), ChosenVsRest()])


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def test_angles_by_hand():
    """At 0, 60 and 180 degrees: similarities 2/3, 0 and 1/3, whatever the lengths of the vectors."""
    outputs = at(0, 60, 180).unsqueeze(1).repeat(1, 2, 1) * torch.tensor([1e-6, 3.0, 1e4]).view(3, 1, 1)
    arrays = run(output_view(outputs, [[0], [1]]))["expert_outputs"].arrays
    want = np.array([[1, 2 / 3, 0], [2 / 3, 1, 1 / 3], [0, 1 / 3, 1]])
    np.testing.assert_allclose(arrays["output_angular_mean/0"], want, atol=2e-4)
    np.testing.assert_allclose(arrays["output_cos/0"], np.cos(np.pi * (1 - want))[None].repeat(2, 0), atol=1e-6)


def test_the_mean_is_over_angles_not_over_cosines():
    outputs = torch.stack([at(0, 0), at(0, 90)])
    arrays = run(output_view(outputs, [[0], [1]]))["expert_outputs"].arrays
    assert arrays["output_angular_mean/0"][0, 1] == pytest.approx(0.75, abs=1e-6)


def test_zero_outputs_have_cosine_zero_and_copies_exactly_one():
    torch.manual_seed(0)
    one = torch.randn(40, 7)
    one[3] = 0
    arrays = run(output_view(torch.stack([one, one.clone(), torch.zeros_like(one)]), [[0]] * 40))[
        "expert_outputs"
    ].arrays
    cosine = arrays["output_cos/0"]
    assert np.isfinite(cosine).all()
    assert (np.delete(cosine[:, 0, 1], 3) == 1).all()
    assert cosine[3, 0, 1] == 0
    assert (cosine[:, 0, 2] == 0).all()
    assert arrays["output_angular_mean/0"][0, 1] == pytest.approx((39 + 0.5) / 40, abs=1e-7)


def test_shared_expert_and_reference_are_rows_with_labels():
    outputs = at(0, 90).unsqueeze(1).repeat(1, 3, 1)
    others = {"SE": at(90).repeat(3, 1), "F": at(0).repeat(3, 1)}
    result = run(output_view(outputs, [[0]] * 3, others=others))["expert_outputs"]
    assert result.arrays["others/0"].tolist() == ["SE", "F"]
    want = np.array([[1, 0.5, 0.5, 1], [0.5, 1, 1, 0.5], [0.5, 1, 1, 0.5], [1, 0.5, 0.5, 1]])
    np.testing.assert_allclose(result.arrays["output_angular_mean/0"], want, atol=1e-6)
    values = {key: headline.value for key, headline in result.headlines.items()}
    assert values == pytest.approx({"mean_angular": 0.5, "shared_angular": 0.75, "reference_angular": 0.75}, abs=1e-6)


def test_a_reference_without_a_shared_expert():
    result = run(output_view(at(0, 90).unsqueeze(1), [[0]], others={"F": at(0)}))["expert_outputs"]
    assert result.arrays["others/0"].tolist() == ["F"]
    assert "shared_angular" not in result.headlines


def test_a_shared_expert_that_comes_without_a_name(make_decoder, text):
    arrays = probe(walk(make_decoder(num_shared_experts=1), text, all_needs()), "expert_outputs")[
        "expert_outputs"
    ].arrays
    assert arrays["others/0"].tolist() == ["SE"]
    assert arrays["output_angular_mean/0"].shape == (5, 5)


def test_chosen_others_and_mixed_by_hand():
    """Experts 0 and 2 chosen, equal; 1 and 3 at right angles to both and to each other."""
    outputs = torch.eye(4)[[0, 1, 0, 3]].unsqueeze(1)  # (4, 1, 4)
    results = run(output_view(outputs, [[2, 0]]))
    arrays = results["chosen_vs_rest"].arrays
    assert arrays["cos_chosen_pairs/0"] == pytest.approx(1)
    assert arrays["cos_other_pairs/0"] == pytest.approx(0)
    assert arrays["cos_chosen_other/0"] == pytest.approx(0)
    assert results["chosen_vs_rest"].headlines["difference"].value == pytest.approx(1)


@pytest.mark.parametrize(("experts", "count"), [(2, 1), (5, 1), (5, 2), (6, 4), (6, 5), (6, 6), (9, 3)])
def test_chosen_means_is_the_sum_over_pairs(experts, count):
    generator = torch.Generator().manual_seed(experts)
    pairs = torch.rand(11, math.comb(experts + 1, 2), generator=generator)  # one more row than routed experts
    chosen = torch.rand(11, experts, generator=generator).topk(count).indices
    square = to_square(pairs, experts + 1)
    found = chosen_means(pairs, chosen, experts)
    for kind, how_many in (("chosen", 2), ("mixed", 1), ("other", 0)):
        want = [
            [
                square[t, i, j].item()
                for i in range(experts)
                for j in range(i)
                if (i in chosen[t]) + (j in chosen[t]) == how_many
            ]
            for t in range(11)
        ]
        if want[0]:
            np.testing.assert_allclose(getattr(found, kind), np.mean(want, axis=1), rtol=1e-5)
        else:
            assert getattr(found, kind) is None


def test_pairs_of_many_blocks(monkeypatch):
    monkeypatch.setattr("probes.measures.output_pairs._BLOCK_ELEMENTS", 50)
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(13, 4, generator=generator) for _ in range(3)]
    parts, cosines = zip(*pair_cosines(outputs), strict=True)
    assert [(part.start, part.stop) for part in parts] == [(0, 4), (4, 8), (8, 12), (12, 13)]
    want = torch.nn.functional.cosine_similarity(outputs[2], outputs[1])
    torch.testing.assert_close(torch.cat(cosines)[:, 2], want)
    assert angular_similarity(torch.tensor([1.0000001, -1.0000001])).tolist() == [1.0, 0.0]


def test_tokens_taken_are_spread_and_bounded():
    assert taken_tokens(100, 4, 10, limit=10**9).tolist() == list(range(100))
    assert taken_tokens(100, 4, 10, limit=4 * 4 * 10 * 5).tolist() == [0, 20, 40, 60, 80]
    assert taken_tokens(100, 4, 10, limit=1).tolist() == [0]


def test_a_long_text_is_compared_in_part(monkeypatch):
    monkeypatch.setattr(ExpertOutputs, "output_bytes", 4 * (4 + 2) * 3 * 10)  # 10 tokens of E + 2 experts
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 100, 3, generator=generator)
    view = output_view(outputs, [[0, 1]] * 50 + [[2, 3]] * 50, text=plain_text([60, 40]))
    results = run(view)
    arrays = results["expert_outputs"].arrays
    assert arrays["tokens_taken/0"].tolist() == list(range(0, 100, 10))
    assert arrays["unit/0"].tolist() == [0] * 6 + [1] * 4
    assert results["expert_outputs"].notes == [
        "layer 0: 10 of 100 tokens, evenly spread, are compared, to bound memory"
    ]
    part = run(output_view(outputs[:, ::10], [[0, 1]] * 5 + [[2, 3]] * 5))
    key = "output_angular_mean/0"
    np.testing.assert_allclose(arrays[key], part["expert_outputs"].arrays[key], rtol=1e-6)
    for key in ("cos_chosen_pairs/0", "cos_other_pairs/0", "cos_chosen_other/0"):
        assert results["chosen_vs_rest"].arrays[key] == pytest.approx(part["chosen_vs_rest"].arrays[key], rel=1e-6)


@pytest.mark.parametrize(("tokens", "stored"), [(64, True), (65, False)])
def test_cosines_of_each_token_only_for_short_texts(tokens, stored):
    arrays = run(output_view(torch.randn(3, tokens, 2), [[0]] * tokens))["expert_outputs"].arrays
    assert [key in arrays for key in ("output_cos/0", "chosen/0", "token_ids")] == [stored] * 3


def test_pictures_of_each_token():
    words = ("The", " $x", "\n", "a-very-long-token")
    short = output_view(torch.randn(3, 4, 2), [[0, 2]] * 4, text=plain_text([4], words))
    result = run(short)["expert_outputs"]
    fig = result.figures["tokens"]()
    assert [ax.get_title() for ax in fig.axes[:4]] == ["The\n0 2", "\\$x\n0 2", "↵\n0 2", "a-very-long…\n0 2"]
    to_rgb(fig)
    assert "tokens" not in run(output_view(torch.randn(3, 13, 2), [[0]] * 13))["expert_outputs"].figures


def test_ragged_layers_and_layers_with_one_expert():
    views = [
        dense_view(0),
        output_view(torch.randn(5, 20, 3), [[0, 1]] * 20, 1),
        output_view(torch.randn(1, 20, 3), [[0]] * 20, 2),
        output_view(torch.randn(3, 20, 3), [[2, 1, 0]] * 20, 3),
    ]
    results = run(*views)
    arrays = results["expert_outputs"].arrays
    assert arrays["output_angular_mean/2"].tolist() == [[1]]
    assert "output_angular_mean/0" not in arrays
    rest = results["chosen_vs_rest"]
    assert {key for key in rest.arrays if key.startswith("cos_")} == {
        "cos_chosen_pairs/1",
        "cos_other_pairs/1",
        "cos_chosen_other/1",
        "cos_chosen_pairs/3",
    }
    assert "mean_angular/layer_02" not in results["expert_outputs"].scalars
    for result in results.values():
        for build in result.figures.values():
            to_rgb(build())
        again = type(ChosenVsRest() if result is rest else ExpertOutputs()).describe(result.arrays)
        assert again.scalars == result.scalars


def test_one_expert_everywhere_has_no_pairs():
    results = run(output_view(torch.randn(1, 4, 3), [[0]] * 4))
    assert "no pairs" in results["expert_outputs"].notes[0]
    assert not results["chosen_vs_rest"].figures


def test_a_difference_that_is_there_has_an_interval_above_zero_and_one_that_is_not_has_not():
    """Chosen experts share a direction; the texts are the units."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 400, 16, generator=generator)
    chosen = torch.rand(400, 4, generator=generator).topk(2).indices
    text = plain_text([40] * 10)
    blind = run(output_view(outputs, chosen.tolist(), text=text))["chosen_vs_rest"].headlines["difference"]
    assert blind.interval[0] < 0 < blind.interval[1]
    mask = torch.zeros(400, 4).scatter_(1, chosen, 1.0)
    alike = outputs + mask.T.unsqueeze(2) * torch.randn(1, 400, 16, generator=generator)
    result = run(output_view(alike, chosen.tolist(), text=text))["chosen_vs_rest"]
    assert result.headlines["difference"].interval[0] > 0.2
    assert "more alike" in result.headlines["difference"].sentence
    assert result.arrays["difference_without/0"].shape == (10,)
    few = run(output_view(alike, chosen.tolist(), text=plain_text([200, 200])))["chosen_vs_rest"]
    assert few.arrays["difference_without/0"].shape == (2,)
    one = run(output_view(alike, chosen.tolist(), text=plain_text([400])))["chosen_vs_rest"]
    assert one.headlines["difference"].interval is None
    assert one.headlines["difference"].sentence.startswith("Of chosen experts the outputs at a token have cosine 0.")
    assert one.notes[0].startswith("one text: ")


@pytest.mark.shared("oracles")
@pytest.mark.parametrize("family", ["mixtral", "deepseekmoe", "grok-1"])
def test_oracles(family, monkeypatch):
    decoder = load_decoder(family)
    for length in ("short", "long"):
        wanted = np.load(ORACLES / family / f"expected_dynamic_{length}.npz")
        ids = torch.from_numpy(wanted["input_ids"]).unsqueeze(0)
        text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))

        def arrays_of(*names, text=text):
            results = probe(walk(decoder.eval(), text, all_needs()), *names)
            return {key: value for result in results.values() for key, value in result.arrays.items()}

        arrays = arrays_of("expert_outputs", "activations", "norm_vs_score")
        keys = [key for key in wanted.files if key.startswith(("output_", "act_"))]
        assert len(keys) == 6 * len(decoder.config.moe_layers)
        for key in keys:
            assert arrays[key].shape == wanted[key].shape
            if key.startswith(oracle_shares.KEY):
                continue
            atol = 1e-4 * np.abs(wanted[key]).max()
            np.testing.assert_allclose(arrays[key], wanted[key], rtol=1e-4, atol=atol, err_msg=key)
        oracle_shares.assert_shares(wanted, lambda: arrays_of("activations"), monkeypatch)
