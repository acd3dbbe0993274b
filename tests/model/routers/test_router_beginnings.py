"""How routers begin: a module says how its parameters begin, and one whose loss teaches it nothing is named."""

import pytest
import torch
from torch import nn

from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.routers import ROUTERS, GatedRouter, register, untaught
from moebed.training.module import MoEModule
from tests.conftest import tiny_config
from tests.model.routers.router_cases import config_of, domains_of


class Tempered(GatedRouter):
    """A gate with more than a gate."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.zeros(layer.num_experts))
        self.mixing = nn.Parameter(torch.eye(layer.num_experts))


class Orthogonal(GatedRouter):
    """A gate that is filled in place."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        if not self.weight.is_meta:
            nn.init.orthogonal_(self.weight)

    def initial(self, name, parameter):
        return nn.init.orthogonal_(torch.empty(parameter.shape))


@pytest.fixture
def own():
    yield lambda rule: register(rule.__name__)(rule)
    for name in ("Tempered", "Orthogonal"):
        ROUTERS.pop(name, None)


def test_what_a_router_of_ones_own_begins_with_stays(own):
    """Zeros stay zeros, and a temperature of 2 is no number near 0."""
    own(Tempered)
    decoder = Decoder(tiny_config(router="Tempered", initializer_range=0.02))
    for router in decoder.routers:
        assert router.temperature.item() == 2.0
        assert torch.equal(router.shift, torch.zeros(4))
        assert torch.equal(router.mixing, torch.eye(4))
        assert 0.005 < router.weight.std() < 0.04  # the gate is drawn as it always is


def test_a_gate_that_was_filled_stays(own):
    own(Orthogonal)
    for router in Decoder(tiny_config(router="Orthogonal")).routers:
        torch.testing.assert_close(router.weight @ router.weight.T, torch.eye(4), rtol=0, atol=1e-5)


def test_a_router_laid_out_over_ranks_has_to_say(own):
    """There the model is built without memory, so that what __init__ wrote is nowhere."""
    for rule in (Tempered, Orthogonal):
        own(rule)
    with torch.device("meta"):
        silent, telling = (Decoder(tiny_config(router=name)) for name in ("Tempered", "Orthogonal"))
    name = "layers.0.mlp.router."
    with pytest.raises(ConfigError, match=r"router Tempered does not say how its parameter shift begins.*initial\("):
        silent.initial(f"{name}shift", silent.get_parameter(f"{name}shift"))
    found = silent.initial(f"{name}weight", silent.get_parameter(f"{name}weight"))
    assert 0.1 < found.std() < 0.4
    assert telling.initial(f"{name}weight", telling.get_parameter(f"{name}weight")).shape == (4, 32)


def _gradient(config) -> float:
    torch.manual_seed(0)
    decoder = Decoder(config).train()
    for router in decoder.routers:
        router.begin_step(0)
    ids = torch.randint(0, 96, (2, 21))
    output = decoder(ids, domain=domains_of(ids))
    nats = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (nats + sum(v.mean() for r in output.routings for v in (r.losses or {}).values())).backward()
    gradients = [parameter.grad for router in decoder.routers for parameter in router.parameters()]
    return max((float(grad.abs().max()) for grad in gradients if grad is not None), default=0.0)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", list(ROUTERS))
def test_a_router_that_learns_nothing_is_named_and_no_other(name, norm, top_k):
    config = config_of(name, num_experts_per_tok=top_k, norm_topk_prob=norm, router_aux_loss_coef=0.0)
    learns = _gradient(config) > 1e-7
    # The others have nothing to learn.
    taught = name not in ("random", "hash", "oracle_hash", "balanced", "expert_norm", "grap", "locmoe_plus", "kmeans")
    assert (untaught(config) is not None) == (taught and not learns)


def test_it_is_said_where_a_run_begins():
    with pytest.warns(UserWarning, match="norm_topk_prob divides that one weight by itself"):
        MoEModule(tiny_config(num_experts_per_tok=1))


def test_layers_are_named_where_some_have_one_expert_a_token():
    assert "is 1 in layer 1 and" in untaught(tiny_config(num_experts_per_tok=[2, 1]))
    assert untaught(tiny_config(num_experts=1, num_experts_per_tok=1)) is None  # there is nothing to decide
