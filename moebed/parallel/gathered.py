"""The walk over a model that ranks share: the first rank looks, and the others hand it a layer at a time.

No rank ever holds more of the model than one layer, the embedding or the head beside its own parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.model.attention import build_norm
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block, Decoder
from moebed.model.hyper_experts import AdapterGenerator
from moebed.model.spread import whole
from moebed.parallel.sharding import reshard
from moebed.views.layer import PassedWeights
from moebed.views.live import ModuleWeights, computing_like
from moebed.views.text_pass import band_rows, logits_in_bands

_EMBEDDING, _HEAD, _DONE, _GENERATOR = -1, -2, -3, -4


class GatheredModel:
    """A decoder whose parts are gathered as a TextPass asks for them.

    Rank 0 calls the methods; every other rank is in :meth:`follow` meanwhile, until :meth:`leading` ends.

    Args:
        decoder: The decoder, laid out over ranks.
    """

    def __init__(self, decoder: Decoder) -> None:
        reshard(decoder)
        self._decoder = decoder
        self._block: tuple[int, Block] | None = None
        self._generator: AdapterGenerator | None = None
        self._device = next(decoder.parameters()).device

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self._decoder.config

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0's side; at its end the other ranks go on with their own work, unless it is the process's."""
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            self._tell(_DONE)
            raise
        self._tell(_DONE)

    def follow(self) -> None:
        """The other ranks' side: give what rank 0 asks for."""
        while (part := self._tell(_DONE)) != _DONE:
            for parameter in self._parameters(part):
                whole(parameter.detach())

    def embed(self, ids: Tensor) -> Tensor:
        """Residual stream (N, H) of ids (N,)."""
        (table,) = self._gather(_EMBEDDING)
        return F.embedding(ids.to(self._device), table) * self.config.embedding_multiplier

    def block(self, index: int) -> Block:
        """The layer, with all of its weights; the one before it is let go."""
        if self._block is None or self._block[0] != index:
            self._block = None
            if self._generator is None and self._decoder.adapter_generator is not None:
                with torch.device("meta"):
                    self._generator = AdapterGenerator(self.config)
                _set(self._generator, self._gather(_GENERATOR))
            values = self._gather(index)
            with torch.device("meta"):
                block = Block(self.config, index, self._generator).eval()
            _set(block, values)
            for name, state in self._decoder.blocks[index].named_buffers():  # every rank has it as a whole
                path, _, last = name.rpartition(".")
                setattr(block.get_submodule(path), last, state)
            self._block = index, block
        return self._block[1]

    def layer_weights(self, index: int) -> PassedWeights:
        """The layer's FFN or experts."""
        return ModuleWeights(self.block(index).mlp)

    def head(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits (N, v), band after band of the vocabulary."""
        with torch.device("meta"):
            norm = build_norm(self.config)
        values, table, bias = self._gather_head()
        _set(norm, values)
        x = norm(hidden)
        yield from logits_in_bands(x, table.split(band_rows(len(x))), bias, self.config.logits_multiplier)

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows (N, H) of the head, with the last norm's scale."""
        (scale, *_), table, _ = self._gather_head()
        return table[ids.to(self._device)].float() * (scale * self.config.logits_multiplier)

    def _gather_head(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The last norm's parameters, the head's matrix (V, H), and its bias (V,) if it has one."""
        values, count = self._gather(_HEAD), len(list(self._decoder.norm.parameters()))
        table, *bias = values[count:]
        return values[:count], table, bias[0] if bias else None

    def computing(self) -> AbstractContextManager[object]:
        """In float32, or in what the parameters are in."""
        return computing_like(next(self._decoder.parameters()))

    def _gather(self, part: int) -> list[Tensor]:
        """Parameters of a part in full."""
        self._tell(part)
        return [whole(parameter.detach()) for parameter in self._parameters(part)]

    def _parameters(self, part: int) -> list[Tensor]:
        if part == _EMBEDDING:
            return [self._decoder.embed_tokens.weight]
        if part == _HEAD:
            return [*self._decoder.norm.parameters(), *self._decoder.lm_head.parameters()]
        if part == _GENERATOR:
            assert self._decoder.adapter_generator is not None
            return list(self._decoder.adapter_generator.parameters())
        return list(self._decoder.blocks[part].parameters())

    def _tell(self, part: int) -> int:
        """Rank 0 says what is next; all ranks get to know it."""
        said = torch.tensor(part, device=self._device)
        dist.broadcast(said, src=0)
        return int(said)


def _set(module: nn.Module, values: list[Tensor]) -> None:
    """Give a module its parameters, in their order."""
    for (name, _), value in zip(list(module.named_parameters()), values, strict=True):
        path, _, last = name.rpartition(".")
        module.get_submodule(path).register_parameter(last, nn.Parameter(value, requires_grad=False))
