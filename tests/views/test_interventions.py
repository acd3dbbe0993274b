"""Interventions by hand: what each makes of a routing, planted effects, causality."""

import numpy as np
import pytest
import torch

from moebed.errors import ConfigError, UserError
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.routers import ROUTERS, Routing
from moebed.views import interventions as iv
from moebed.views.branches import Branches
from moebed.views.intervention_names import parse
from moebed.views.layer import ProbeText
from moebed.views.live import intervene

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, 1.0]])
X = torch.zeros(2, 4)


def decoder_of(**changes):
    settings = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "initializer_range": 0.3, "experts_backend": "loop",
    }  # fmt: skip
    torch.manual_seed(0)
    return Decoder(ModelConfig(**settings | changes)).eval()


def text_of(*lengths):
    ids = torch.randint(64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return ProbeText(ids.masked_fill(~mask, 0), mask, torch.zeros(len(lengths), dtype=torch.long))


def layer(**changes):
    """A layer's context with a router of two experts of four, and the routing that it makes of LOGITS."""
    router = decoder_of(hidden_size=4, num_attention_heads=1, **changes).layers[1].mlp.router
    return iv.LayerContext(1, router), router.choose(LOGITS)


def applied(intervention, **changes):
    """Weights (T, E) before and after."""
    at, routing = layer(**changes)
    changed = intervention.apply(routing, X, at)
    assert bool((changed.topk_weight.diff(dim=1) <= 0).all())
    return iv.assigned_weights(routing), iv.assigned_weights(changed)


def p(*logits):
    e = np.exp(logits)
    return e / e.sum()


def test_three_removals_are_not_the_same():
    base, zero = applied(iv.mask(0, "zero"))
    first = p(2, 1)
    torch.testing.assert_close(base[0], torch.tensor([*first, 0, 0], dtype=torch.float32))
    torch.testing.assert_close(zero[0], torch.tensor([0, first[1], 0, 0], dtype=torch.float32))
    _, drop_norm = applied(iv.mask(0, "drop_norm"))
    torch.testing.assert_close(drop_norm[0], torch.tensor([0.0, 1, 0, 0]))
    _, refill = applied(iv.mask(0, "refill"))
    second = p(1, 0)
    torch.testing.assert_close(refill[0], torch.tensor([0, *second, 0], dtype=torch.float32))
    for changed in (zero, drop_norm, refill):  # the other token did not choose it
        torch.testing.assert_close(changed[1], base[1])


def test_refill_raises_what_is_not_renormalised():
    base, refill = applied(iv.mask(0), norm_topk_prob=False)
    every = p(2, 1, 0, -1)
    assert float(base[0, 1]) == pytest.approx(every[1], rel=1e-5)
    assert float(refill[0, 1]) == pytest.approx(every[1] / (1 - every[0]), rel=1e-5)


def test_of_fewer_than_k_all_run():
    _, kept = applied(iv.keep([3]))
    torch.testing.assert_close(kept, torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 1]]))
    _, even = applied(iv.keep([3]), router="hash")  # which gives each of K the same, a logit of -inf or not
    torch.testing.assert_close(even, torch.tensor([[0.0, 0, 0, 0.5], [0, 0, 0, 0.5]]))
    _, by_layer = applied(iv.keep({1: [3, 2], 2: [0]}))
    assert (by_layer != 0).tolist() == [[False, False, True, True]] * 2


def test_first_ones_and_all_but_one():
    base, top = applied(iv.keep_top(1))
    assert (top != 0).sum(dim=1).tolist() == [1, 1]
    torch.testing.assert_close(top.amax(dim=1), base.amax(dim=1))
    _, dropped = applied(iv.drop_top(1, "zero"))
    torch.testing.assert_close(dropped + top, base)
    _, refilled = applied(iv.drop_top(1, "refill"))
    assert (refilled != 0).tolist() == [[False, True, True, False], [False, True, False, True]]


def test_steering():
    base, forced = applied(iv.force([3]))
    assert forced.argmax(dim=1).tolist() == [3, 3]
    assert float(forced[0, 3] / forced[0, 0]) == pytest.approx(np.exp(0.01), rel=1e-4)
    _, raised = applied(iv.shift([3], 2.5))
    assert (raised != 0).tolist() == [[True, False, False, True], [False, False, True, True]]
    _, same = applied(iv.shift([0, 1, 2, 3], 7.0))
    torch.testing.assert_close(same, base)


def test_the_smallest_change_keeps_the_weights():
    base, swapped = applied(iv.swap())
    assert (swapped != 0).tolist() == [[True, False, True, False], [False, True, True, False]]
    torch.testing.assert_close(swapped.sort(dim=1).values, base.sort(dim=1).values)


@pytest.mark.parametrize("renormalised", [True, False])
def test_random_sets_are_of_equal_compute_and_weight(renormalised):
    at, _ = layer(norm_topk_prob=renormalised)
    logits = torch.randn(4000, 4, generator=torch.Generator().manual_seed(2))
    routing = at.router.choose(logits)
    drawn = iv.random_set(3).apply(routing, X, at)
    weight = iv.assigned_weights(drawn)
    assert ((weight != 0).sum(dim=1) == 2).all()
    torch.testing.assert_close(weight.sum(dim=1), routing.topk_weight.sum(dim=1))
    share = (weight != 0).float().mean(dim=0)
    assert (share - 0.5).abs().max() < 0.04
    elsewhere = iv.random_set(3).apply(routing, X, iv.LayerContext(2, at.router))
    assert 0.3 < ((iv.assigned_weights(elsewhere) != 0) == (weight != 0)).float().mean() < 0.7  # another draw
    cold = iv.assigned_weights(iv.random_set(3, temperature=0.02).apply(routing, X, at))
    assert float(((cold != 0) == (iv.assigned_weights(routing) != 0)).float().mean()) > 0.97


def test_replayed_choices():
    index, weight = torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.0]])
    _, replayed = applied(iv.replay({1: (index, weight)}))
    torch.testing.assert_close(replayed, torch.tensor([[0, 0.3, 0, 0.7], [0.6, 0, 0, 0]]))
    at, routing = layer()
    with pytest.raises(ConfigError, match="2 tokens are to be replayed on a text of 3"):
        iv.replay({1: (index, weight)}).apply(routing, torch.zeros(3, 4), at)


@pytest.mark.parametrize("name", ["swap", "random_set 1", "mask 2", "mask 2 zero", "keep_top 1", "force 1", "keep 0,1"])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in ("oracle", "anti_oracle", "oracle_hash")])
def test_every_router_can_be_changed(router, name):
    options = {"d_low": 4} if router in ("autonomy", "factorised_gate") else {}
    found = intervene(decoder_of(router=router, router_options=options), text_of(9, 7), [parse(name)])
    (rise,) = found.values()
    assert bool(rise.isfinite().any())
    assert float(rise.nan_to_num().abs().max()) > 0


# Planted -------------------------------------------------------------------------------------------------------------


def planted(gate, same=(), silent=()):
    """Two layers whose routers read one direction of the input; experts that are copies, experts that say nothing."""
    decoder = decoder_of(num_hidden_layers=2, num_experts_per_tok=1)
    with torch.no_grad():
        for block in decoder.layers:
            block.mlp.router.weight.zero_()
            block.mlp.router.weight[:, 0] = torch.tensor(gate)
            for matrix in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                for one, other in same:
                    matrix[other] = matrix[one]
            for expert in silent:
                block.mlp.experts.down_proj[expert] = 0
    return decoder


def test_a_swap_for_a_copy_changes_nothing():
    decoder, text = planted([1.0, 0.5, -1.0, -0.5], same=[(0, 1), (2, 3)]), text_of(12, 9)
    same = intervene(decoder, text, [iv.swap()])["swap"]
    assert float(same.nan_to_num().abs().max()) < 1e-6
    with torch.no_grad():
        for block in decoder.layers:
            block.mlp.experts.down_proj[1] *= -1
    assert float(intervene(decoder, text, [iv.swap()])["swap"].nan_to_num().abs().max()) > 1e-2


def test_without_an_expert_that_says_nothing():
    decoder, text = planted([0.0, 0.0, 1.0, 0.5], silent=[2]), text_of(12, 9)
    found = intervene(decoder, text, [iv.mask(2, "zero"), iv.mask(2, "refill")])
    assert float(found["mask 2 zero"].nan_to_num().abs().max()) < 1e-6
    assert float(found["mask 2 refill"].nan_to_num().abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["mask 2 zero @ layer 1", "mask 2 drop_norm @ layers 1,2", "drop_top 2 @ layer 2"])
def test_tokens_before_the_first_change_are_as_they_were(name):
    """By the model's own forward pass, which knows nothing of branches; and exactly so in the branch."""
    decoder, text, one = decoder_of(), text_of(14, 14, 14), parse(name)
    (first, *_) = one.layers_of(decoder.config)
    seen = {}

    def forward(x, experts, context=None, at=first, decide=decoder.layers[first].mlp.router.forward):
        routing = decide(x, experts, context)
        seen["base"] = iv.assigned_weights(routing)
        changed = one.apply(routing, x, iv.LayerContext(at, decoder.layers[at].mlp.router))
        seen["after"] = iv.assigned_weights(changed)
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.layers[first].mlp.router, "forward", forward)
        decoder(text.input_ids)
    changed = (seen["base"] - seen["after"]).abs().amax(dim=1).view(3, 14) > 1e-6
    before = changed.cumsum(dim=1).eq(0).flatten()
    rise = intervene(decoder, text, [one])[one.name]
    if len(one.layers_of(decoder.config)) == 1:
        assert set(rise[before & (text.targets >= 0)].tolist()) <= {0.0}
    after = ~before & (text.targets >= 0)
    assert float((rise[after] != 0).float().mean()) > 0.9


def at_token(one, token):
    """The same intervention, at one token alone: as a change of the whole text."""

    def change(routing, x, layer):
        changed = one.apply(routing, x, layer)
        weight, only = iv.assigned_weights(routing), iv.assigned_weights(changed)
        weight[token] = only[token]
        sorted_weight, index = weight.sort(dim=1, descending=True)
        return routing._replace(topk_index=index, topk_weight=sorted_weight, ragged=True, precomputed=None)

    return iv.Intervention(f"{one.name} at {token}", one.layers, change)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"num_key_value_heads": 1, "post_norms": True}])
@pytest.mark.parametrize("name", ["mask 2 zero @ layer 0", "swap @ layer 1", "random_set 3"])
def test_a_token_changed_alone_is_the_text_changed_there_read_there(name, changes):
    """At every token, the last of a text among them; of a change in all layers too."""
    decoder, text = decoder_of(**changes), text_of(7, 5, 9)
    one = parse(name)
    rows = intervene(decoder, text, [iv.alone(one)])[f"{name} alone"]
    tokens = [token for token in range(21) if text.targets[token] >= 0]
    streams = intervene(decoder, text, [at_token(one, token) for token in tokens])
    wanted = torch.stack([streams[f"{one.name} at {token}"][token] for token in tokens])
    torch.testing.assert_close(rows[tokens], wanted, rtol=0, atol=1e-5)
    assert float(wanted.abs().max()) > 1e-2
    whole = intervene(decoder, text, [one])[one.name]
    assert float((whole - rows).nan_to_num().abs().max()) > 1e-3  # another question has another answer


@pytest.mark.parametrize("name", ["swap @ layer 1", "identity @ layer 0", "random_set 3"])
def test_of_a_text_some_tokens_alone_are_changed(name):
    """The same ones as by themselves with all, and of the others nothing."""
    decoder, text = decoder_of(), text_of(7, 5, 9)
    one = parse(name)
    asked = [iv.alone(one), iv.alone(one, 8)]
    assert [each.name for each in asked] == [f"{name} alone", f"{name} alone at 8 tokens"]
    every, some = intervene(decoder, text, asked).values()
    drawn = iv.drawn_tokens(21, 8)
    assert int(drawn.sum()) == 8
    torch.testing.assert_close(some[drawn], every[drawn], rtol=0, atol=1e-6, equal_nan=True)
    assert set(some[~drawn & (text.targets >= 0)].tolist()) == {0.0}
    assert bool((some[drawn & (text.targets >= 0)] != 0).any())
    assert bool(iv.drawn_tokens(5, 8).all())
    place = iv.drawn_tokens(1000, 300).nonzero().float()
    assert 450 < place.mean() < 550  # of all of the text


def in_text(number, at):
    """A swap in one text alone, at one layer alone."""
    swap, text = iv.swap(), text_of(7, 5, 9)

    def change(routing, x, layer):
        changed, mine = swap.change(routing, x, layer), text.sequence == number
        return routing._replace(topk_index=torch.where(mine.unsqueeze(1), changed.topk_index, routing.topk_index))

    return iv.Intervention(f"in {number}", frozenset({at}), change)


def test_texts_may_be_reached_at_different_layers(monkeypatch):
    """What is not written to is NaN here: a text that a branch comes to later goes on from the base until then."""
    early, late = in_text(0, 0), in_text(2, 1)

    def change(routing, x, layer):
        return (early if layer.index == 0 else late).change(routing, x, layer)

    both = iv.Intervention("both", frozenset({0, 1}), change)
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: torch.full_like(like, torch.nan, **options))
    decoder, text = decoder_of(), text_of(7, 5, 9)
    found = intervene(decoder, text, [both, early, late])
    torch.testing.assert_close(found["both"], found["in 0"] + found["in 2"], rtol=0, atol=1e-6, equal_nan=True)
    for number, name in ((0, "in 0"), (2, "in 2")):
        assert float(found[name][text.sequence == number].nan_to_num().abs().max()) > 1e-3


def test_texts_that_are_not_reached_are_not_run_again(monkeypatch):
    seen, last = {}, Branches.last

    def spied(self, targets):
        seen.update({branch.intervention.name: branch.reached for branch in self.branches})
        return last(self, targets)

    monkeypatch.setattr(Branches, "last", spied)
    text = text_of(7, 5, 9)
    intervene(decoder_of(), text, [in_text(2, 1), iv.identity()])
    assert seen["in 2"].tolist() == (text.sequence == 2).tolist()
    assert bool(seen["identity"].all())


@pytest.mark.parametrize("router", ["expert_norm", "autonomy"])
def test_what_was_computed_for_the_old_choice_is_not_used_for_the_new(router):
    """Of a router that runs experts: weights of a change times the outputs of the experts that it names."""
    options = {"d_low": 4} if router == "autonomy" else {}
    mlp = decoder_of(router=router, router_options=options).layers[1].mlp
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        base = mlp.router(x, mlp.experts)
        assert base.precomputed is not None
        after = iv.swap().apply(base, x, iv.LayerContext(1, mlp.router))
        outputs = mlp.experts.each(x, after.topk_index)  # (T, K, H)
        wanted = (outputs * after.topk_weight.unsqueeze(2)).sum(dim=1)
        found = mlp.combine(x, after, mlp.experts.known_outputs(after))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(after.topk_index, base.topk_index)


def test_sequences_without_tokens_do_not_stand_in_the_way():
    ids = torch.randint(64, (9, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(9, 4, dtype=torch.bool)
    mask[7] = True
    found = intervene(decoder_of(), ProbeText(ids, mask, torch.zeros(9, dtype=torch.long)), [iv.mask(1, layers=[1])])
    assert int(found["mask 1 refill @ layer 1"].isfinite().sum()) == 3


def test_a_text_that_overflows_ends_one_branch_alone():
    decoder, text = decoder_of(), text_of(8)
    burst = iv.Intervention(
        "burst", frozenset({0}), lambda routing, x, at: routing._replace(topk_weight=routing.topk_weight * torch.inf)
    )
    nowhere = iv.Intervention(
        "nowhere", frozenset({0}), lambda routing, x, at: routing._replace(topk_weight=routing.topk_weight * torch.nan)
    )
    found = intervene(decoder, text, [burst, nowhere, iv.mask(1)])
    assert bool(found["burst"].isnan().all())
    assert bool(found["nowhere"].isnan().all())
    assert bool(found["mask 1 refill"].isfinite().any())


# Refused and replayed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("mask 4", "experts 0 to 3, not 4"),
        ("mask 1 @ layer 3", "layer 3 is none with experts; it has 0, 1, 2"),
        ("mask 0,1,2,3", "no expert would be left"),
        ("drop_top 3", "a token has 2 experts"),
    ],
)
def test_what_a_model_has_not_is_refused(written, said):
    with pytest.raises(ConfigError, match=said):
        intervene(decoder_of(), text_of(5), [parse(written)])
    with pytest.raises(ConfigError, match="every token has all experts"):
        intervene(decoder_of(num_experts=2), text_of(5), [iv.swap()])
    with pytest.raises(UserError, match="given twice"):
        intervene(decoder_of(), text_of(5), [iv.swap(), iv.swap()])


def test_choices_of_a_file_are_replayed(tmp_path):
    decoder, text = decoder_of(), text_of(6)
    index = torch.tensor([[0, 1]] * 6)
    path = tmp_path / "routing.npz"
    np.savez(path, **{"topk_index/1": index.numpy(), "topk_weight/1": np.full((6, 2), 0.5, np.float32)})
    one = parse(f"replay {path}")
    assert one.layers == {1}
    wanted = iv.replay({1: (index, torch.full((6, 2), 0.5))})
    found = intervene(decoder, text, [one, wanted])
    torch.testing.assert_close(found[one.name], found[wanted.name], equal_nan=True)
    with pytest.raises(UserError, match=r"no choices to replay"):
        parse(f"replay {tmp_path / 'none.npz'}")


def test_a_routing_is_not_changed_in_place():
    at, routing = layer()
    kept = Routing(*(part.clone() if isinstance(part, torch.Tensor) else part for part in routing))
    for name in ("mask 1 zero", "keep 1", "drop_top 1 refill", "force 2", "shift 1 by 2", "random_set 1", "swap"):
        parse(name).apply(routing, X, at)
    for before, after in zip(kept, routing, strict=True):
        assert before is after or torch.equal(before, after)
