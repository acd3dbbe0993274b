"""Self-attention, and the key-value cache of generation.

B sequences, S positions, A query heads, G key-value heads, D head width, H hidden.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.model import fused
from moebed.model.config import ModelConfig
from moebed.model.native import attention as native
from moebed.model.rope import Rope

_LOGITS_AT_A_TIME = 1 << 22  # numbers, where no gradient is taken: beyond that they would be most of the memory


def _blocks(count: int, each: int) -> list[slice]:
    """Slices of so many things, no more of them at a time than the logits allow, with so many for each thing."""
    step = max(1, _LOGITS_AT_A_TIME // each)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., size); same shape and dtype."""
        return fused.rms_norm(x, self.weight, self.eps)


def build_norm(config: ModelConfig) -> nn.Module:
    """A norm of the residual stream."""
    return (RMSNorm if config.norm_type == "rms" else nn.LayerNorm)(config.hidden_size, config.rms_norm_eps)


def turned(x: Tensor, rope: Rope, interleaved: bool = False) -> Tensor:
    """x (B, heads, S, D) with its first d dimensions turned by cos and sin (S, d) of their positions.

    Interleaved ones, of which neighbours turn together, are put half of d apart, as they are then in queries and keys.
    """
    width = rope[0].shape[-1]
    first = x[..., :width]
    if interleaved:
        first = first.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if width == x.shape[-1]:
        return fused.rotate(first, *rope)
    return torch.cat([fused.rotate(first, *rope), x[..., width:]], dim=-1)


class KVCache:
    """Keys and values of one layer seen so far, or what they are made of; preallocated for max_length positions."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0
        self.keys = self.values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, G, S, ·) of new positions; returns those of all positions."""
        if self.length == 0:
            self.keys, self.values = (
                one.new_empty(*one.shape[:2], self.max_length, one.shape[3]) for one in (keys, values)
            )
        stop = self.length + keys.shape[2]
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Attention(nn.Module):
    """Causal multi-head or grouped-query attention; other kinds make queries, keys and values otherwise."""

    sinks: nn.Parameter | None  # (A,)

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        scale = config.attention_multiplier
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.cap, self.window = config.attn_logit_softcapping, config.window(index)
        self.needs_logits = config.needs_attention_logits is not None
        self.backend, self.interleaved = config.attention_backend, config.rope_interleave
        self.register_parameter("sinks", None)
        self._build(config)

    def _build(self, config: ModelConfig) -> None:
        """The layers, in the order by which the optimizer's state in a checkpoint finds them again."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_output_bias)
        self.norm_heads = config.qk_norm == "head"
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim if self.norm_heads else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim if self.norm_heads else kv_size, config.rms_norm_eps)
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(self.num_heads))
            draw = partial(nn.init.normal_, mean=0.0, std=config.initializer_range)
            self.sinks.draw = draw  # type: ignore[attr-defined]

    def _project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Rope | None]:
        """Queries (B, A, S, D), keys and values (B, G, S, ·) of x (B, S, H), and what they have yet to be turned by."""
        query, key, value = self._linears(x, self.q_proj, self.k_proj, self.v_proj)
        return self._heads(query, self.q_norm), self._heads(key, self.k_norm), self._heads(value, None), rope

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None = None) -> Tensor:
        """Attend within x (B, S, H), and to what the cache holds before it: (B, S, H)."""
        query, key, value, left = self._project(x, rope)
        turns_within = left is None or (left[0].shape[-1] == self.head_dim and not self.interleaved)
        if cache is None and turns_within and self.uses_native(query, key, value):
            mixed = self._mix_native(query, key, value, left)
        else:
            if left is not None:
                query, key = turned(query, left, self.interleaved), turned(key, left, self.interleaved)
            if cache is not None:
                key, value = cache.append(key, value)
            mixed = self._mix(query, key, value).transpose(1, 2)
        return self._linears(mixed.flatten(2), self.o_proj)[0]  # of mixed (B, S, A, ·)

    @staticmethod
    def _linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """x (B, S, ·) through each of some linear layers."""
        if any(layer.bias is not None for layer in layers):
            return tuple(layer(x) for layer in layers)
        return fused.linears(x, [layer.weight for layer in layers])

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, S, heads·D) -> (B, heads, S, D), normalised where asked."""
        if norm is not None and not self.norm_heads:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_heads:
            x = norm(x)
        return x.transpose(1, 2)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, total = query.shape[2], key.shape[2]
        if self.uses_native(query, key, value):
            return self._mix_native(query, key, value).transpose(1, 2)
        if key.shape[1] != self.num_heads:
            key, value = self._repeated(key), self._repeated(value)
        if self._uses_sdpa(query, total):
            narrow, width = value.shape[-1], query.shape[-1]
            if narrow >= width:
                return self._sdpa(query, key, value)
            # Of one width, or it would be done by plain products, which keep all logits for the backward pass.
            return self._sdpa(query, key, F.pad(value, (0, width - narrow)))[..., :narrow]
        heads = query.shape[:2]
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)  # (B·A, ., D)
        sinks = None if self.sinks is None else self.sinks.repeat(heads[0])  # (B·A,)
        if torch.is_grad_enabled():  # the backward pass needs all logits anyhow
            return self._attend(query, key, value, sinks, slice(0, length)).unflatten(0, heads)
        mixed = []
        for some in _blocks(len(query), length * total):
            own = query[some], key[some], value[some], None if sinks is None else sinks[some]
            mixed.append(torch.cat([self._attend(*own, rows) for rows in _blocks(length, total)], 1))
        return torch.cat(mixed).unflatten(0, heads)

    def _repeated(self, x: Tensor) -> Tensor:
        """Keys or values (B, G, S, ·), as many as there are queries: (B, A, S, ·), of one head without a copy."""
        repeat = self.num_heads // x.shape[1]
        return x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """PyTorch's fused attention, with a mask where the window is shorter than what is seen: (B, A, S, D)."""
        length, total = query.shape[2], key.shape[2]
        causal = length == total and (self.window is None or total <= self.window)
        if causal or self._sees_all(length, total):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=self.scale)
        found = []
        for rows in _blocks(length, 1 if torch.is_grad_enabled() else total):
            mask = self._mask(rows, length, total, query.device)
            found.append(F.scaled_dot_product_attention(query[:, :, rows], key, value, mask, scale=self.scale))
        return torch.cat(found, dim=2)

    def _mix_native(self, query: Tensor, key: Tensor, value: Tensor, rope: Rope | None = None) -> Tensor:
        """(B, S, A, D) from queries and keys that are turned already, or are now."""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return native.causal_attention(query, key, value, self.scale, rope)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rows: slice) -> Tensor:
        """Plain products of some queries (n, S, D) with keys and values (n, S_total, D): (n, rows, D)."""
        length, total = query.shape[1], key.shape[1]
        query, mask = query[:, rows], self._mask(rows, length, total, query.device)
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
        if self.cap is None:
            logits = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=self.scale)  # (n, rows, S_total)
        else:
            logits = torch.bmm(query * self.scale, key.transpose(1, 2)).float()
            logits = self.cap * torch.tanh(logits / self.cap) + hidden
        if sinks is not None:  # of which no value comes (Xiao 2309.17453 found that heads look for such a place)
            logits = torch.cat([logits, sinks.to(logits.dtype).view(-1, 1, 1).expand(-1, logits.shape[1], 1)], dim=-1)
        return logits.softmax(dim=-1)[..., :total].to(value.dtype) @ value

    def uses_native(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the compiled attention serves: where it fits and is asked for, or was measured to be the fastest."""
        sees_all_before = self.window is None or key.shape[2] <= self.window
        if self.backend not in ("auto", "native") or self.needs_logits or not sees_all_before:
            return False
        if native.unfit(query, key) is not None or key.shape != value.shape:
            return False
        return native.is_there() if self.backend == "native" else native.is_fastest(len(key) * self.num_kv_heads)

    def _uses_sdpa(self, query: Tensor, total: int) -> bool:
        if self.needs_logits or self.backend == "math":
            return False
        # On a CPU the backward pass of PyTorch's flash attention is slower in bf16 than the whole of plain products, as
        # long as their (S, S) logits are small; in float32 it is faster.
        narrow_on_cpu = query.device.type == "cpu" and query.dtype.itemsize < 4
        return self.backend == "sdpa" or not narrow_on_cpu or total > 1024

    def _sees_all(self, length: int, total: int) -> bool:
        return length == 1 and (self.window is None or total <= self.window)

    def _mask(self, rows: slice, length: int, total: int, device: torch.device) -> Tensor:
        """(rows, S_total) bool, True where a query may look."""
        query = torch.arange(total - length, total, device=device)[rows].unsqueeze(1)
        key = torch.arange(total, device=device)
        mask = key <= query
        return mask if self.window is None else mask & (key > query - self.window)
