"""moebed's expert MLP inside models of transformers, as one of their experts implementations.

``use_in(model)`` switches a model in memory, or refuses by the name of what does not fit; ``register()`` makes the name
known, for ``from_pretrained(..., experts_implementation="moebed")``, where experts that do not fit are computed by
transformers' own ``grouped_mm``, which is said once for each of their classes. On a GPU, and in Triton's interpreter,
the Triton kernels compute; on a CPU the compiled ones of ``moebed.model.native``.

T tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moebed.errors import ConfigError
from moebed.machine.settled import settled
from moebed.model import native
from moebed.model.experts import say_once
from moebed.model.grouped import compute_dtype

NAME = "moebed"


def register() -> str:
    """Make the implementation known to transformers; its name. A second time changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME


def use_in(model: nn.Module) -> int:
    """Let moebed compute the experts of a transformers model from now on.

    Returns:
        How many of its modules are experts that moebed computes.

    Raises:
        ConfigError: It has no experts that transformers can hand on, or some that the kernels are not made for, or
            this machine cannot compute them; the model is left as it was.
    """
    experts = [module for module in model.modules() if is_experts(module)]
    if not experts:
        raise ConfigError(
            f"{type(model).__name__} has no experts that transformers can hand to another implementation; "
            "its own code computes them"
        )
    for module in experts:
        reason = why_not(module) or _why_not_here(module)
        if reason is not None:
            raise ConfigError(f"{type(module).__name__}: {reason}; leave its experts to transformers")
    model.set_experts_implementation(register())  # type: ignore[operator]
    return len(experts)


def why_not(module: Any) -> str | None:
    """Why the kernels do not compute what these experts of transformers do; None if they do."""
    facts = {
        "they have no gate": not module.has_gate,
        "gate and up are interleaved": not module.is_concatenated,
        "their matrices are transposed": module.is_transposed,
        "they have biases": module.has_bias,
        "a norm follows them": getattr(module, "has_post_expert_norm", False),
        "they have a gate of their own": has_own_gate(module),
        "they are spread over ranks by transformers": getattr(module, "_is_expert_parallel", False),
    }
    reason = next((words for words, holds in facts.items() if holds), None)
    if reason is None and _activation(module) is None:
        reason = f"activation {type(module.act_fn).__name__} is none of {', '.join(native.ACTIVATIONS)}"
    if reason is None and module.gate_up_proj.dtype != module.down_proj.dtype:
        reason = f"their matrices are {module.gate_up_proj.dtype} and {module.down_proj.dtype}"
    return reason


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, as transformers calls for it.

    Args:
        module: transformers' experts, with ``gate_up_proj (E, 2F, H)`` and ``down_proj (E, H, F)``.
        hidden_states: (T, H).
        top_k_index: (T, K), in any order.
        top_k_weights: (T, K), as applied; they need not sum to 1.

    Returns:
        (T, H), of hidden_states' type.
    """
    rows = hidden_states.to(compute_dtype(hidden_states))
    reason = why_not(module) or _why_not_here(module, rows)
    if reason is not None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        say_once(f"{type(module).__name__}: {reason}; transformers' grouped_mm computes them")
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    gate_up, down, weight = module.gate_up_proj, module.down_proj, top_k_weights.float()
    activation = _activation(module)
    assert activation is not None
    if _by_triton(rows):
        from triton_kernels.mlp import expert_mlp

        gate_up, down = gate_up.to(rows.dtype), down.to(rows.dtype)
        out = expert_mlp(rows, gate_up, down, top_k_index, weight, activation)
    else:
        out = native.expert_mlp(rows, gate_up, down, top_k_index, weight, activation)
    return out.to(hidden_states.dtype)


def is_experts(module: Any) -> bool:
    """Whether transformers' decorator for experts has made this module's class."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def has_own_gate(module: Any) -> bool:
    """Whether experts of transformers join gate and up otherwise than act(gate) ⊙ up."""
    from transformers.integrations import moe

    return type(module)._apply_gate is not moe._default_apply_gate


def _activation(module: Any) -> str | None:
    """The name of the activation in ours; None if it is another, or another formula of the same."""
    from transformers import activations

    act_fn = module.act_fn
    if isinstance(act_fn, (nn.SiLU, activations.SiLUActivation)):
        return "silu"
    if isinstance(act_fn, activations.GELUActivation) and act_fn.act is nn.functional.gelu:
        return "gelu"
    return "gelu_tanh" if isinstance(act_fn, activations.GELUTanh) else None


@settled
def _by_triton(rows: Tensor) -> bool:
    from triton_kernels.mlp.checks import runs_on_cpu

    return rows.device.type != "cpu" or runs_on_cpu()


def _why_not_here(module: Any, rows: Tensor | None = None) -> str | None:
    """Why this machine does not compute these experts, on rows (T, H) where they are given; None if it does."""
    gate_up, down = module.gate_up_proj, module.down_proj
    rows = gate_up.new_empty(1, gate_up.shape[2]) if rows is None else rows
    if _by_triton(rows):
        from triton_kernels import why_not as kernels_why_not

        return kernels_why_not(rows, gate_up, 1)
    return native.unfit(rows, rows.dtype, gate_up, down) or native.load()
