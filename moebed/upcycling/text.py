"""Text through a checkpoint whose layers are read one after another: forwards, and backwards for gradients.

One layer's weights are in memory at a time, in float32, and of the text what enters one layer; for gradients, what
enters each layer, in a file where that is large. Padding exists within attention alone.

B sequences, S positions, T valid tokens, H hidden, D width of the dense FFN, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.keys import KeyMap, Placed
from moebed.checkpoints.streamed import final_norm, head_bias
from moebed.checkpoints.writer import read_bands
from moebed.machine.float32 import exact_products
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block
from moebed.model.losses import token_losses
from moebed.model.rope import RotaryEmbedding
from moebed.model.routers import TokenContext
from moebed.views.attending import attention_groups
from moebed.views.layer import ProbeText
from moebed.views.text_pass import require_finite

_ACTIVATIONS = 1 << 22  # numbers of one activation of an FFN, at a time
_LOGITS = 1 << 24  # at a time
FFN = Callable[[Tensor, TokenContext], Tensor]  # tokens (t, H) and what is known of them (t,) to (t, H)
Content = Callable[[str, Placed], Iterable[Tensor]]


class TextWalk:
    """The valid tokens of a text, and their steps through the layers of a checkpoint.

    Args:
        source: The checkpoint.
        text: Sequences, which fit it.
    """

    def __init__(self, source: Checkpoint, text: ProbeText) -> None:
        self.source, self.text, self.config = source, text, source.config
        self.targets = text.targets
        lengths = text.token_mask.sum(dim=1)
        rotary = RotaryEmbedding(self.config)
        self._rope = rotary.table(int(lengths.max()), torch.device("cpu"))
        self.tokens_at_a_time = max(1, _ACTIVATIONS // max(self.config.intermediate_size or 0, self.config.hidden_size))
        self._groups = [
            rows
            for group in attention_groups(lengths, rotary.boundary)
            for rows in group.split(self._rows_at_a_time(group.shape[1]))
        ]

    def _rows_at_a_time(self, length: int) -> int:
        return max(1, self.tokens_at_a_time // length)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.targets)

    @property
    def num_predicted(self) -> int:
        """Tokens that another one follows."""
        return int((self.targets >= 0).sum())

    def embed(self) -> Tensor:
        """Residual stream (T, H) that enters the first layer."""
        ids, first = self.text.token_ids, 0
        hidden = torch.empty(len(ids), self.config.hidden_size)
        for band in read_bands(self.source, self.source.keys.parameter("embed_tokens.weight")[0].part):
            inside = (ids >= first) & (ids < first + len(band))
            hidden[inside] = band[ids[inside] - first].float()
            first += len(band)
        return hidden * self.config.embedding_multiplier

    def block(self, index: int) -> Block:
        """A layer of the checkpoint."""
        return filled_block(self.source.keys, index, lambda name, placed: read_bands(self.source, placed.part))

    def attend(self, block: Block, hidden: Tensor) -> Tensor:
        """Residual stream (T, H) between a layer's attention and its FFN."""
        attended = torch.empty_like(hidden)
        with exact_products():
            for group in self._groups:
                valid = group >= 0
                attended[group[valid]] = block.attend(hidden[group.clamp(min=0)], self._rope(group.shape[1]))[valid]
        return attended

    def feed_forward(self, block: Block, attended: Tensor, ffn: FFN | None = None) -> Tensor:
        """Residual stream (T, H) behind the layer, with another FFN in place of its own, if given."""
        out, ids = torch.empty_like(attended), self.text.token_ids
        with exact_products():
            for rows in torch.arange(len(attended)).split(self.tokens_at_a_time):
                x = block.pre_ffn_norm(attended[rows])
                known = TokenContext(ids[rows])
                made = ffn(x, known) if ffn is not None else block.feed_forward(x.unsqueeze(0), known)[0][0]
                out[rows] = block.leave(attended[rows], made)
        require_finite(out, "the hidden states of the text")
        return out

    def back(
        self, block: Block, hidden: Tensor, grad: Tensor, watch: Callable[[Tensor, Tensor, Tensor], None]
    ) -> Tensor:
        """Gradient (T, H) of what enters a dense layer, from that of what leaves it.

        Args:
            block: The layer.
            hidden: What enters it, (T, H).
            grad: Of what leaves it, (T, H).
            watch: Is shown, of some tokens (t,), what enters ``down`` (t, D) and its gradient (t, D).
        """
        found = torch.empty_like(grad)
        for group in self._groups:
            valid, inside = group >= 0, group.clamp(min=0)
            behind = grad[inside].masked_fill(~valid.unsqueeze(-1), 0.0)
            with torch.enable_grad(), exact_products():
                entered = hidden[inside].requires_grad_()
                activated: list[Tensor] = []
                down = block.mlp.down_proj
                assert isinstance(down, nn.Module)
                catching = down.register_forward_pre_hook(lambda _, given: activated.append(given[0]))  # noqa: B023
                try:
                    left, _ = block(entered, self._rope(group.shape[1]))
                finally:
                    catching.remove()
                before, of_activated = torch.autograd.grad(left, [entered, activated[0]], behind)
            found[group[valid]] = before[valid]
            watch(group[valid], activated[0].detach()[valid], of_activated[valid])
        require_finite(found, "the gradients of the text")
        return found

    def loss(self, hidden: Tensor) -> float:
        """Mean cross entropy of the next tokens in nats, of what leaves the last layer (T, H)."""
        return self.loss_and_gradient(hidden, gradient=False)[0]

    def loss_and_gradient(self, hidden: Tensor, gradient: bool = True) -> tuple[float, Tensor]:
        """The same, and its gradient (T, H)."""
        norm, head, bias = self._head()
        total, grad = 0.0, torch.zeros_like(hidden) if gradient else hidden.new_empty(0)
        predicted = (self.targets >= 0).nonzero()[:, 0]
        for rows in predicted.split(max(1, _LOGITS // len(head))):
            with torch.set_grad_enabled(gradient), exact_products():
                entered = hidden[rows].requires_grad_(gradient)
                logits = F.linear(norm(entered), head, bias) * self.config.logits_multiplier
                labels = self.targets[rows].unsqueeze(0)
                nats = token_losses(logits.unsqueeze(0), labels).sum() / len(predicted)
                if gradient:
                    (grad[rows],) = torch.autograd.grad(nats, entered)
            total += float(nats.detach())
        return total, grad

    def _head(self) -> tuple[nn.Module, Tensor, Tensor | None]:
        keys, bias = self.source.keys, head_bias(self.source)
        name = "lm_head.weight" if "lm_head.weight" in keys.shapes else "embed_tokens.weight"
        part = keys.parameter(name)[0].part
        head = torch.empty(part.rows, part.columns)
        _fill(head, read_bands(self.source, part))
        return final_norm(self.source), head, None if bias is None else bias.float()


def filled_block(keys: KeyMap, index: int, content: Content) -> Block:
    """A layer in evaluation mode whose float32 parameters, which need no gradient, hold what content gives.

    Args:
        keys: The model, in the names of a family.
        index: The layer.
        content: Bands of rows of a region of a parameter of the decoder, by its name.
    """
    config: ModelConfig = keys.config
    with torch.device("meta"):
        block = Block(config, index).eval()
    state = {}
    for name, parameter in block.named_parameters():
        values = torch.empty(parameter.shape)
        for placed in keys.parameter(f"layers.{index}.{name}"):
            _fill(values[placed.region], content(f"layers.{index}.{name}", placed))
        state[name] = values
    block.load_state_dict(state, strict=False, assign=True)
    return block.requires_grad_(False)


def _fill(region: Tensor, bands: Iterable[Tensor]) -> None:
    flat, first = region.view(-1), 0
    for band in bands:
        flat[first : first + band.numel()] = band.reshape(-1).float()
        first += band.numel()
