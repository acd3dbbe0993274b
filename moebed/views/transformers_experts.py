"""The experts of a transformers model as probes look at them, whatever its class.

All that is known of them is transformers' experts interface: stacked matrices of all experts, and flags that say how
they lie. T tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.model.in_transformers import has_own_gate
from moebed.model.routers import Routing
from moebed.views.beside import ExpertSums
from moebed.views.layer import ExpertKind, ExpertView, Need, Watch


def why_not_seen(module: Any) -> str | None:
    """Why experts cannot be run one by one; None if they can."""
    down = getattr(module, "down_proj", None)
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    if not isinstance(down, Tensor) or not isinstance(first, Tensor) or down.ndim != 3 or first.ndim != 3:
        return "their matrices are not stacked tensors"
    if getattr(module, "_is_expert_parallel", False):
        return "they are spread over ranks by transformers"
    if not all(one.dtype.is_floating_point and one.dtype.itemsize > 1 for one in (down, first)):
        return f"their matrices are packed as {down.dtype}; load the model in bfloat16 or float32"
    if down.is_meta or first.is_meta:
        return "their matrices are not in memory; load the model without offloading"
    return None


def offered_by(module: Any) -> frozenset[Need]:
    """What can be told of such experts, of their outputs, activations and matrices."""
    needs = {Need.OUTPUTS}
    if module.has_gate and has_own_gate(module):
        return frozenset(needs | {Need.WEIGHTS})
    needs |= {Need.ACTIVATIONS} | ({Need.WEIGHTS} if module.has_gate else set())
    return frozenset(needs)


def remarks_on(module: Any) -> list[str]:
    """What a person should know of what is seen of such experts."""
    kind, found = type(module).__name__, []
    if module.has_bias:
        found.append(f"{kind}: biases of the experts are in their outputs, and left out where matrices are compared")
    if not module.has_gate:
        found.append(f"{kind}: its experts have no gate matrix, so that probes of weights are left out")
    if module.has_gate and has_own_gate(module):
        found.append(f"{kind}: its experts join gate and up by a rule of their own, so that no activation can be shown")
    return found


@dataclass(frozen=True)
class TransformersExperts:
    """The experts of one layer; see ``moebed.views.layer.LayerWeights``.

    Args:
        experts: transformers' module of them all.
        shared: The shared expert beside them, where there is one.
        shared_output: (T, H) what that made of the text.
    """

    experts: Any
    shared: nn.Module | None = None
    shared_output: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts.down_proj)

    def expert_matrix(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one routed expert's ``up`` or ``gate`` (F, H), or ``down`` (H, F); shares memory with the model."""
        if name == "down":
            return self._rows_out("down_proj", index)[rows]
        both = self._rows_out("gate_up_proj", index)  # (2F, H)
        width, second = len(both) // 2, name == "up"
        if not self.experts.is_concatenated:
            return both[int(second) :: 2][rows]
        return (both[width:] if second else both[:width])[rows]

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix."""
        hidden, width = self._rows_out("down_proj", 0).shape
        return (hidden, width) if name == "down" else (width, hidden)

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix, where it is called as those of most models are."""
        weight = getattr(getattr(self.shared, f"{name}_proj", None), "weight", None)
        return weight.detach() if isinstance(weight, Tensor) and weight.ndim == 2 else None

    def reference_matrix(self, name: str) -> Tensor | None:
        """There is no reference beside it."""
        return None

    def adapted(self, x: Tensor, routing: Routing) -> Tensor | None:
        """It has no adapters."""
        return None

    def run_experts(
        self, x: Tensor, watch: Watch | None = None, beside: ExpertSums | None = None
    ) -> Iterator[ExpertView]:
        """What every expert makes of tokens x (T, H); of the shared one, what it made of the text."""
        x = x.to(self.experts.down_proj.dtype)
        for index in range(self.num_experts):
            product, activated = self._activate(index, x)
            if watch is not None:
                seen = self.experts.act_fn(product.chunk(2, dim=-1)[0]) if self.experts.has_gate else activated
                watch(index, slice(0, len(x)), seen.float())
            yield ExpertView(index, self._finish(index, activated).float())
        if self.shared_output is not None:
            yield ExpertView(self.num_experts, self.shared_output.float(), ExpertKind.SHARED)

    def chosen(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        """What the layer's routed experts make of tokens x (T, H) that go to topk_index (T, K): (T, H) of x's type."""
        total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        rows = x.to(self.experts.down_proj.dtype)
        for index in range(self.num_experts):
            token, choice = torch.where(topk_index == index)
            if len(token):
                output = self._finish(index, self._activate(index, rows[token])[1])
                total.index_add_(0, token, (output * topk_weight[token, choice, None]).to(total.dtype))
        return total.to(x.dtype)

    def _activate(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows x (N, H), the first product (N, 2F), or (N, F) without a gate, and what goes into ``down`` (N, F)."""
        product = self._product("gate_up_proj" if self.experts.has_gate else "up_proj", index, x)
        return product, self.experts._apply_gate(product) if self.experts.has_gate else self.experts.act_fn(product)

    def _finish(self, index: int, activated: Tensor) -> Tensor:
        output = self._product("down_proj", index, activated)
        return self.experts.post_expert_norm(output) if getattr(self.experts, "has_post_expert_norm", False) else output

    def _product(self, name: str, index: int, x: Tensor) -> Tensor:
        bias = getattr(self.experts, f"{name}_bias")[index] if self.experts.has_bias else None
        return F.linear(x, self._rows_out(name, index), bias)

    def _rows_out(self, name: str, index: int) -> Tensor:
        """One expert's matrix, with a row for each number that it gives out."""
        matrix: Tensor = getattr(self.experts, name)[index].detach()
        return matrix.T if self.experts.is_transposed else matrix
