"""Multi-head latent attention (DeepSeek-V2 2405.04434, section 2.1), and which attention a model has.

B sequences, S positions, A heads, H hidden, n dimensions of a head that do not turn, r that do, v of its values, k of
the latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebed.model.attention import Attention, KVCache, RMSNorm, turned
from moebed.model.config import ModelConfig
from moebed.model.rope import Rope

_EPS = 1e-6  # of the norms within, whatever the model's is


class LatentAttention(Attention):
    """Keys and values are made of a narrow latent of each token; r dimensions of the keys turn, the same in all heads.

    Queries are made of a latent too, where q_lora_rank is given. A head's order is [n | r], of keys and values [n | v].
    """

    def _build(self, config: ModelConfig) -> None:
        """The layers."""
        assert config.kv_lora_rank is not None
        assert config.qk_nope_head_dim is not None
        self.latent, self.plain, self.turning = config.kv_lora_rank, config.qk_nope_head_dim, config.rotary_dim
        self.value_head_dim = config.value_head_dim
        q_size = self.num_heads * self.head_dim
        self.q_b_proj: nn.Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(config.q_lora_rank, _EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_size, bias=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, self.latent + self.turning, bias=False)
        self.kv_a_norm = RMSNorm(self.latent, _EPS)
        kv_size = self.num_heads * (self.plain + self.value_head_dim)
        self.kv_b_proj = nn.Linear(self.latent, kv_size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None = None) -> Tensor:
        """Attend within x (B, S, H), and to what the cache holds before it: (B, S, H).

        A cache holds what keys and values are made of, k + r numbers of a token. What would make them is multiplied
        into queries and outputs instead, and all heads attend to the one narrow key, of which the value is a part.
        """
        if cache is None:
            return super().forward(x, rope)
        query, latent, shared = self._narrow(x, rope)
        is_first = not cache.length
        kept, _ = cache.append(torch.cat([latent, shared], dim=-1), latent[..., :0])
        if is_first:  # alone, they cost less as wide as heads are
            mixed = self._mix(query, *self._widened(latent, shared))
        else:
            made = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
            to_key, to_value = made.split([self.plain, self.value_head_dim], dim=1)  # (A, n, k), (A, v, k)
            plain, turning = query.split([self.plain, self.turning], dim=-1)
            mixed = self._mix(torch.cat([plain @ to_key, turning], dim=-1), kept, kept)[..., : self.latent]
            mixed = mixed @ to_value.transpose(1, 2)
        return self._linears(mixed.transpose(1, 2).flatten(2), self.o_proj)[0]

    def _project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Rope | None]:
        """Queries and keys (B, A, S, n + r), turned already, and values (B, A, S, v), of x (B, S, H)."""
        query, latent, shared = self._narrow(x, rope)
        return query, *self._widened(latent, shared), None

    def _narrow(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, A, S, n + r), the latent (B, 1, S, k) and keys that turn (B, 1, S, r), of x (B, S, H)."""
        query, narrow = self._linears(x, self.q_proj if self.q_b_proj is None else self.q_a_proj, self.kv_a_proj)
        if self.q_b_proj is not None:
            query = self._linears(self.q_a_norm(query), self.q_b_proj)[0]
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        latent, shared = narrow.unsqueeze(1).split([self.latent, self.turning], dim=-1)
        plain, turning = query.split([self.plain, self.turning], dim=-1)
        query = torch.cat([plain, turned(turning, rope, self.interleaved)], dim=-1)
        return query, self.kv_a_norm(latent), turned(shared, rope, self.interleaved)

    def _widened(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, A, S, n + r) and values (B, A, S, v) of a latent (B, 1, S, k) and keys that turn (B, 1, S, r)."""
        wide = self._linears(latent.squeeze(1), self.kv_b_proj)[0]
        wide = wide.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, A, S, n + v)
        key, value = wide.split([self.plain, self.value_head_dim], dim=-1)
        return torch.cat([key, shared.expand(-1, self.num_heads, -1, -1)], dim=-1), value


def build_attention(config: ModelConfig, index: int = 0) -> Attention:
    """The attention of a layer."""
    return (Attention if config.kv_lora_rank is None else LatentAttention)(config, index)
