"""keep_k: scores by hand, planted experts, texts kept apart, and what it says."""

import numpy as np
import pytest
import torch
from probe_cases import make_text

from moebed.errors import ConfigError
from moebed.views.layer import LayerView, ProbeText
from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.keep_k import ONE_TEXT, KeepK, area, curves
from probes.measures.expert_scores import SCORES, calibration_texts
from probes.running.driver import run_probes


def run(decoder, text, one_of="2,4"):
    probe = KeepK()
    probe.options = probe.Options(one_of)
    return run_probes(walk(decoder, text, KeepK.needs), [probe])["keep_k"]


def text_of(domains, texts=4, length=20):
    """Domains whose words are their own, without padding."""
    ids = torch.cat(
        [
            torch.randint(8 * d, 8 * d + 8, (texts, length), generator=torch.Generator().manual_seed(d))
            for d in range(domains)
        ]
    )
    domain = torch.arange(domains).repeat_interleave(texts)
    return ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), domain, tuple(f"d{d}" for d in range(domains)))


def test_scores_by_hand(make_decoder):
    """Against sums over the calibration tokens of what each expert makes of them."""
    decoder, text = make_decoder().eval().requires_grad_(False), make_text([9, 7, 8, 6], width=9)
    arrays = run(decoder, text).arrays
    taken = torch.from_numpy(calibration_texts(text.domain.numpy()))[text.sequence]
    for view in walk(decoder, text, KeepK.needs):
        if not isinstance(view, LayerView):
            continue
        outputs = torch.stack([expert.output for expert in view.experts()], dim=1)  # (T, E, H)
        routing, n = view.routing, view.index
        wanted = {name: np.zeros(4) for name in SCORES}
        for token in torch.where(taken)[0]:
            routed = torch.zeros(16)
            for expert, weight in zip(routing.topk_index[token], routing.topk_weight[token], strict=True):
                routed += weight * outputs[token, expert]
            h = view.residual[token]
            turned = max(0.0, float(1 - torch.nn.functional.cosine_similarity(h, h + routed, dim=0)))
            for expert, weight in zip(routing.topk_index[token].tolist(), routing.topk_weight[token], strict=True):
                norm = float(outputs[token, expert].norm())
                wanted["frequency"][expert] += 1
                wanted["ean"][expert] += norm
                wanted["weighted"][expert] += float(weight) * norm
                wanted["easy_ep"][expert] += float(weight) * norm * turned
            wanted["probability"] += routing.router_probs[token].numpy() / int(taken.sum())
        wanted["reap"] = wanted["weighted"] / np.maximum(wanted["frequency"], 1)
        for name, score in wanted.items():
            np.testing.assert_allclose(arrays[f"score/{n}/{name}"], score, rtol=1e-4, atol=1e-6, err_msg=name)
            kept = arrays[f"kept/{n}/{name}"]
            assert kept.sum(axis=1).tolist() == [2, 1]
            assert kept[0][np.argmax(score)]


def test_an_expert_that_one_domain_alone_uses(make_decoder):
    """Without it that domain is hurt, and the other is not: whatever the score, as all are from both."""
    decoder, text = make_decoder(num_experts_per_tok=1).eval(), text_of(2)
    with torch.no_grad():
        decoder.embed_tokens.weight[:8, 0], decoder.embed_tokens.weight[8:16, 0] = 4.0, -4.0
        for block in decoder.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.router.weight.zero_()
            block.mlp.router.weight[0, 0], block.mlp.router.weight[3, 0] = 1.0, -1.0
            block.mlp.experts.down_proj *= 3
            block.mlp.experts.down_proj[:, 0] = 0  # the direction that the router reads stays
            block.mlp.experts.down_proj[1:3] = 0
    arrays = run(decoder, text).arrays
    for layer in range(3):
        assert np.flatnonzero(arrays[f"kept/{layer}/frequency"][0]).tolist() == [0, 3]
        assert np.flatnonzero(arrays[f"kept/{layer}/domain_0"][1]).tolist() == [0]
        assert np.flatnonzero(arrays[f"kept/{layer}/domain_1"][1]).tolist() == [3]
    rise = arrays["keep_loss/domain_0"] - arrays["loss"]  # (D, B)
    np.testing.assert_allclose(rise[:, :4], 0, atol=1e-4)
    assert (np.abs(rise[1, 4:]) > 1e-2).all()
    both = arrays["keep_loss/frequency"][0] - arrays["loss"]
    np.testing.assert_allclose(both, 0, atol=1e-4)
    own, other = (curves(arrays)[key][1].mean for key in ("domain", "other_domain"))
    assert abs(own) < 1e-4 < 1e-3 < abs(other)


def test_of_two_equal_experts_one_is_enough(make_decoder):
    decoder, text = make_decoder(num_experts=2, num_experts_per_tok=1).eval(), text_of(1, texts=6)
    with torch.no_grad():
        for block in decoder.layers:
            for matrix in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                matrix[1] = matrix[0]
    arrays = run(decoder, text, "2").arrays
    for name in ("frequency", "reap", "random_0"):
        np.testing.assert_allclose(arrays[f"keep_loss/{name}"][0], arrays["loss"], atol=1e-4)


def test_it_judges_on_texts_that_chose_nothing(make_decoder):
    """What the texts apart say does not enter the scores, and what the others lose does not enter the curves."""
    decoder, text = make_decoder().eval(), text_of(1, texts=6)
    arrays = dict(run(decoder, text).arrays)
    other = text.input_ids.clone()
    other[::2] = other[::2].flip(1)  # those that are kept apart
    again = run(decoder, ProbeText(other, text.token_mask, text.domain, text.domains)).arrays
    for key in arrays:
        if key.startswith(("score/", "kept/")):
            np.testing.assert_allclose(arrays[key], again[key], rtol=1e-5, atol=1e-6)
    apart = arrays["calibration"] == 0
    drawn = np.mean([arrays[f"keep_loss/random_{draw}"][0] for draw in range(5)], axis=0) - arrays["loss"]
    assert curves(arrays)["random"][0].mean == pytest.approx(
        drawn[apart].sum() / arrays["tokens"][apart].sum(), rel=1e-4
    )
    before = curves(arrays)["reap"][0].mean
    arrays["keep_loss/reap"] = arrays["keep_loss/reap"] + 100 * arrays["calibration"]
    assert curves(arrays)["reap"][0].mean == before
    assert area(arrays, "reap").mean == pytest.approx(
        np.mean([r.mean - s.mean for r, s in zip(curves(arrays)["random"], curves(arrays)["reap"], strict=True)]),
        abs=1e-6,
    )


def test_shares_that_leave_the_same_are_one(make_decoder):
    arrays = run(make_decoder(), text_of(1), "2,4,8,16").arrays
    assert arrays["count/0"].tolist() == [2, 1, 1, 1]
    assert arrays["share"].tolist() == [0.5, 0.25]
    assert arrays["keep_loss/reap"].shape == (2, 4)


def test_what_it_says(make_decoder):
    result = run(make_decoder(), text_of(2), "2,4")
    assert {"rise_reap", "area_reap", "rise_domain"} <= set(result.headlines)
    assert "with random ones by" in result.headlines["rise_reap"].sentence
    assert result.headlines["area_reap"].interval is not None
    for build in result.figures.values():
        to_rgb(build())
    assert run(make_decoder(), make_text([9], width=9)).notes == [ONE_TEXT]
    dense = run(make_decoder(num_experts=0), text_of(1))
    assert "no layer with two or more experts" in dense.notes[0]
    with pytest.raises(ConfigError, match="write numbers above 1"):
        KeepK.Options("1,2")
