"""What a layout makes of parameters: how much of them each rank holds, and what is trained of them."""

import pytest
import torch

from moebed.model.decoder import Decoder
from moebed.parallel.config import ParallelConfig
from moebed.parallel.sharding import Layout
from tests.conftest import tiny_config
from tests.parallel.forked import call


def _frozen(rank: int, world_size: int, meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        decoder = Decoder(tiny_config(num_shared_experts=1))
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("down_proj" not in name)
    Layout(ParallelConfig(expert=2), world_size, "cpu").apply(decoder, torch.device("cpu"))
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in decoder.named_parameters() if "down_proj" not in name}


@pytest.mark.parametrize("meta", [True, False])
def test_what_is_not_trained_is_not_trained_where_it_is_spread(meta):
    call(_frozen, 2, meta)


def _shared_out(rank: int, world_size: int) -> None:
    decoder = Decoder(tiny_config(num_experts=3, num_experts_per_tok=1))
    Layout(ParallelConfig(), world_size, "cpu").apply(decoder, torch.device("cpu"))
    for name, parameter in decoder.blocks[0].mlp.experts.named_parameters():
        assert parameter.to_local().numel() * world_size == parameter.numel(), name


def test_every_rank_holds_as_much_of_the_experts_however_many_there_are():
    """Of FSDP2, which splits their second axis."""
    call(_shared_out, 2)
