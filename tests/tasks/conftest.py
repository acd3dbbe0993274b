from collections.abc import Callable

import pytest
import torch

from moebed.model.decoder import Decoder
from tests.conftest import tiny_config


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    def make(**changes) -> Decoder:
        torch.manual_seed(0)
        return Decoder(tiny_config(**{"initializer_range": 0.3, **changes}))

    return make
