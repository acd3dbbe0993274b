"""expert_lens: planted words, the sum of all that is added to a logit, K = 1, and what the loss becomes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from probe_cases import make_text
from scipy.stats import spearmanr

from moebed.views.attribution import most_raised
from moebed.views.beside import Rows
from moebed.views.intervention_words import ZERO
from moebed.views.interventions import alone, assigned_weights, drop_top
from moebed.views.layer import ExpertKind, HeadView, Need
from moebed.views.live import LiveModel, intervene, walk
from probes.expert_lens import LISTS, ExpertLens
from probes.figures.drawing import to_rgb
from probes.running.driver import run_probes

WORD = 7
NEEDS = frozenset({*ExpertLens.needs, Need.LOGITS})


def run(decoder, text):
    return run_probes(walk(decoder, text, ExpertLens.needs), [ExpertLens()])["expert_lens"]


@pytest.fixture
def texts():
    return make_text([30, 29, 28, 30, 30, 27], width=30)


def test_a_planted_word_leads_and_one_expert_is_all(make_decoder, texts):
    """Expert 2 of layer 1 writes the head's row of a word, whatever its input; each token has one expert."""
    decoder = make_decoder(num_experts_per_tok=1)
    with torch.no_grad():
        decoder.lm_head.weight /= decoder.lm_head.weight.norm(dim=1, keepdim=True)
        experts = decoder.layers[1].mlp.experts
        experts.gate_up_proj[2, 8:] = experts.gate_up_proj[2, :8]  # silu(z)·z is hardly ever below 0
        experts.down_proj[2] = decoder.lm_head.weight[WORD].unsqueeze(1)
    texts = replace(texts, input_ids=texts.input_ids % 6, says=lambda one: f"${one}\n\x1b")
    result = run(decoder, texts)
    assert result.arrays["lens_ids/1"][2, 0] == WORD
    shown = [of.get_text() for of in result.figures["words"]().findobj(Text)]
    assert any("$7⏎\\x1b  " in line for line in shown)
    assert not any("#" in line for line in shown)  # most of them are not in the text
    assert len(set(result.arrays["text_ids"].tolist()) - set(texts.token_ids.tolist())) > 5
    assert WORD not in result.arrays["lens_ids/1"][[0, 1, 3], 0]
    assert result.scalars["lens_overlap"] > result.scalars["lens_overlap_other"]
    for key in ("top1_cos_output", "top1_cos_sizes", "top1_cos_residual"):
        assert result.scalars[key] == pytest.approx(1, abs=1e-5)
    assert "cause_rho" not in result.headlines  # without its one expert a token has none
    for build in result.figures.values():
        to_rgb(build())


CASES = {
    "plain": {},
    "shared, dense, multipliers": {"num_experts": [0, 4, 6], "num_shared_experts": 1, "residual_multiplier": 0.5,
                                   "embedding_multiplier": 3.0, "logits_multiplier": 0.25},
    "norms after": {"post_norms": True},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_that_is_added_makes_the_logit_and_costs_what_it_costs(case, make_decoder, texts):
    """Embedding, attention and every expert by itself: summed up they are the logit of the token that follows."""
    decoder = make_decoder(**case)
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    model = LiveModel(decoder)
    hidden = model.embed(texts.token_ids)
    known, experts, cosines, total = texts.targets >= 0, {}, {}, 0.0
    for view in walk(decoder, texts, NEEDS):
        if isinstance(view, HeadView):
            break
        row = view.attribution.following.of_token
        head = view.attribution.following.rows[row]

        def directly(part, head=head):
            return (part * head).sum(dim=1)

        total = total + directly(view.residual - hidden) + (directly(hidden) if view.index == 0 else 0.0)
        if not view.num_experts:
            (output,) = view.weights.combine([Rows(view.moe_input, None)])
            added = view.attribution.toward(output, row) / view.attribution.held(output)
        else:
            parts = {expert.label: expert for expert in view.experts()}
            output, weight = view.moe_output, assigned_weights(view.routing)
            added, mine = 0.0, torch.zeros_like(weight)
            for expert in parts.values():
                is_routed = expert.kind is ExpertKind.ROUTED
                written = expert.output * weight[:, expert.index, None] if is_routed else expert.output
                one = view.attribution.toward(written, row) / view.attribution.held(output)
                added = added + one
                if is_routed:
                    mine[:, expert.index] = one
            experts[view.index] = mine, weight
            routed = torch.stack([of.output for of in parts.values() if of.kind is ExpertKind.ROUTED], dim=1)
            routed = routed * weight.unsqueeze(2)
            first = routed[torch.arange(len(weight)), weight.argmax(dim=1)]
            beside = output - routed.sum(dim=1)
            cosines[view.index] = {
                "top1_cos_output": torch.cosine_similarity(first, routed.sum(dim=1)).mean(),
                "top1_cos_residual": torch.cosine_similarity(view.leave(first + beside), view.leave(output)).mean(),
            }
        total = total + added
        hidden = view.leave(output)
    logits = view.logits.gather(1, texts.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose((total / view.rms)[known], logits[known], rtol=1e-4, atol=1e-4)
    result = run(decoder, texts)
    for layer, (mine, weight) in experts.items():
        mine = mine / view.rms[:, None] * known[:, None]
        by_text = torch.zeros(len(texts.domain), mine.shape[1]).index_add_(0, texts.sequence, mine)
        np.testing.assert_allclose(result.arrays[f"dla_target/{layer}"], by_text, rtol=1e-4, atol=1e-4)
        first = mine.gather(1, weight.argmax(dim=1, keepdim=True)).squeeze(1)
        (rise,) = intervene(decoder, texts, [alone(drop_top(1, ZERO, [layer]))]).values()
        rho = spearmanr(first[known], rise[known]).statistic
        assert result.arrays[f"cause_rho/{layer}"] == pytest.approx(rho, abs=2e-3)
        for key, value in cosines[layer].items():
            assert float(result.arrays[f"{key}/{layer}"]) == pytest.approx(float(value), abs=1e-5)
    assert result.headlines["cause_rho"].value > result.scalars["cause_rho_shuffled"]
    low, high = result.headlines["dla_specific"].interval
    assert low < result.headlines["dla_specific"].value < high


def test_words_over_several_bands_are_those_of_one():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 1, 1, 0])
    means = torch.stack([logits[group == one].mean(dim=0) for one in (0, 1)])
    whole = (logits - means[group]).topk(6)
    for size in (3, 11, 40):
        found = most_raised(logits.split(size, dim=1), group, 6)
        assert torch.equal(found.ids, whole.indices)
        torch.testing.assert_close(found.gain, whole.values)


def test_layers_and_texts_without_anything_to_read(make_decoder, text):
    assert "no layer" in run(make_decoder(num_experts=0), text).notes[0]
    alone_in_domain = run(make_decoder(), make_text([12, 9], width=12))  # there is no other half
    assert np.isnan(alone_in_domain.arrays["lens_overlap/0"]).all()
    assert "lens_overlap" not in alone_in_domain.headlines
    assert alone_in_domain.headlines["dla_specific"].interval is None
    ragged = run(make_decoder(num_experts=[0, 1, 6], num_experts_per_tok=[0, 1, 3]), text)
    assert ragged.headlines["lens_overlap"].no_interval == LISTS
    for build in ragged.figures.values():
        to_rgb(build())
