"""Routers that are told the domain: who goes where, what they refuse, and that nothing of it reaches other routers."""

import pytest
import torch

from moebed.errors import ConfigError, UserError
from moebed.model.decoder import Decoder
from moebed.model.generate import generate
from moebed.model.routers import ROUTERS, TokenContext
from moebed.model.routers.reference import block_sizes
from tests.model.routers.router_cases import ALL, BY_DOMAIN, config_of, router_of

IDS = torch.randint(0, 96, (40, 12), generator=torch.Generator().manual_seed(1))
DOMAIN = (torch.arange(40) % 2).unsqueeze(1).expand_as(IDS)  # a sequence is of one


def routed(name: str, domain: torch.Tensor = DOMAIN, ids: torch.Tensor = IDS, **changes):
    """The decision of a router alone, on hidden states that say nothing."""
    torch.manual_seed(0)
    context = TokenContext.of_batch(ids, domain).changed(torch.flatten)
    return router_of(name, **changes)(torch.randn(ids.numel(), 32), None, context)


@pytest.mark.parametrize(
    ("experts", "shares", "sizes"),
    [
        (4, [1, 1], [2, 2]),
        (8, [1, 1, 1], [3, 3, 2]),
        (8, [3, 1], [6, 2]),
        (4, [1000, 1, 1], [2, 1, 1]),
        (3, [1, 1, 1], [1, 1, 1]),
        (64, [0.5, 0.25, 0.25], [32, 16, 16]),
    ],
)
def test_experts_are_dealt_in_proportion_and_every_domain_has_one(experts, shares, sizes):
    found = block_sizes(experts, shares)
    assert sum(found) == experts
    assert found == pytest.approx(sizes, abs=1)
    assert min(found) >= 1


@pytest.mark.parametrize("name", ["oracle", "oracle_hash"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_domain_has_experts_of_its_own(name, top_k):
    routing = routed(name, num_experts_per_tok=top_k)
    assert torch.equal(routing.topk_index // 2, DOMAIN.reshape(-1, 1).expand_as(routing.topk_index))
    outside = routing.router_probs.view(-1, 2, 2).gather(1, 1 - DOMAIN.reshape(-1, 1, 1).expand(-1, 1, 2))
    assert bool((outside == 0).all())
    assert set(routing.topk_index.flatten().tolist()) == {0, 1, 2, 3}


def test_blocks_of_other_sizes():
    options = {"num_domains": 2, "domain_shares": [5, 1]}
    index = routed("oracle", num_experts=6, num_experts_per_tok=1, router_options=options).topk_index.flatten()
    sizes = block_sizes(6, [5, 1])
    assert set(index[DOMAIN.flatten() == 0].tolist()) <= set(range(sizes[0]))
    assert set(index[DOMAIN.flatten() == 1].tolist()) == set(range(sizes[0], 6))


def test_the_oracle_is_the_softmax_router_within_a_block():
    """The same weights and inputs, restricted: 2 of 4 within blocks of 2 are the block, weighed by its softmax."""
    oracle, plain = routed("oracle"), routed("softmax_topk")
    blocks = plain.router_logits.view(-1, 2, 2)[torch.arange(IDS.numel()), DOMAIN.flatten()]
    torch.testing.assert_close(oracle.topk_weight, blocks.softmax(-1).sort(-1, descending=True).values)


def test_what_is_left_of_the_experts_goes_to_the_largest_remainder():
    assert block_sizes(10, [50, 32, 18]) == [5, 3, 2]  # of seven beside one each: 3.5, 2.24, 1.26


def test_each_rotation_of_the_blocks_is_as_likely():
    router = router_of("anti_oracle", num_experts=8, num_experts_per_tok=1, router_options={"num_domains": 4})
    ids, none = torch.arange(2000), torch.zeros(2000, dtype=torch.long)
    for domain in range(4):
        context = TokenContext(ids, none + domain, sequence=ids, position=none)
        share = torch.bincount(router.block_of(context), minlength=4) / 2000
        torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.04)


def test_in_the_anti_oracle_a_block_is_of_no_domain():
    """Each block has as many tokens of either domain, and within a sequence the domains keep apart."""
    torch.manual_seed(2)
    ids = torch.randint(0, 96, (4000, 12))
    domain = torch.arange(12).expand_as(ids) % 2
    block = (routed("anti_oracle", domain, ids, num_experts_per_tok=1).topk_index // 2).view_as(ids)
    late = (block[:, 8:] + domain[:, 8:]) % 2  # once the first tokens have said which block is whose
    assert bool((late == late[:, :1]).all())
    for number in range(2):
        share = block[domain == number].double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / 4000**0.5


def test_the_anti_oracle_knows_nothing_that_comes_later():
    """A token's block stays where tokens after it change, and where its sequence stands among others."""
    whole = routed("anti_oracle", num_experts_per_tok=1).topk_index.view_as(IDS) // 2
    for length in range(1, 12):
        cut = routed("anti_oracle", DOMAIN[5:9, :length], IDS[5:9, :length], num_experts_per_tok=1).topk_index
        assert torch.equal(cut.view(4, length) // 2, whole[5:9, :length])


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_what_has_no_domain_is_refused(name):
    decoder = Decoder(config_of(name)).eval()
    with pytest.raises(UserError, match="needs the domain of each token"):
        decoder(IDS)
    with pytest.raises(UserError, match=f"router {name} needs the domain of each token: it cannot generate text"):
        generate(decoder, IDS[:, :4], 2)


@pytest.mark.parametrize("name", [name for name in ALL if name not in BY_DOMAIN and not ROUTERS[name].needs_context])
def test_no_other_router_is_told_the_domain(name):
    decoder, told = Decoder(config_of(name)).eval(), []
    for router in decoder.routers:
        router.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    with torch.no_grad():
        assert torch.equal(decoder(IDS, domain=DOMAIN).logits, decoder(IDS).logits)
    assert {context[1:] for context in told} == {(None,) * 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router_options": {"num_domains": 5}}, "needs an expert for each of 5 domains; layer 0 has 4"),
        (
            {"router_options": {"num_domains": 3}},
            "gives a domain 1 of 4 experts in layer 0, fewer than",
        ),
        (
            {"router_options": {"num_domains": 2, "domain_shares": [1]}},
            r"domain_shares is \[1.0\]; it must be 2 positive",
        ),
    ],
)
def test_blocks_that_are_too_small_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config_of("oracle", **changes)


def test_how_many_domains_must_be_said():
    from moebed.model.config import ModelConfig
    from tests.conftest import tiny_config

    with pytest.raises(ConfigError, match=r"router_options\.num_domains; it is how many the data have"):
        tiny_config(router="oracle")
    config = config_of("oracle", router_options={"domain_shares": [1, 3]})
    assert ModelConfig.from_dict(config.to_dict()) == config
