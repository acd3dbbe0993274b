"""Gated activations inside the kernels: the value, and the value with its derivative, in float32."""

import triton
import triton.language as tl

NAMES = ("silu", "gelu", "gelu_tanh")


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """act(gate), elementwise."""
    # Constants stand inside the functions: the interpreter cannot multiply a tensor by a global one.
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    TWICE_SQRT_2_OVER_PI: tl.constexpr = 1.5957691216057308
    CUBIC: tl.constexpr = 0.044715
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF))
    else:
        # tanh(z) = 2 σ(2z) - 1, so ½ (1 + tanh z) = σ(2z).
        return gate * tl.sigmoid(TWICE_SQRT_2_OVER_PI * (gate + CUBIC * gate * gate * gate))


@triton.jit
def activate_with_slope(gate, ACTIVATION: tl.constexpr):
    """act(gate) and act'(gate), elementwise."""
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    INV_SQRT_2PI: tl.constexpr = 0.3989422804014327
    TWICE_SQRT_2_OVER_PI: tl.constexpr = 1.5957691216057308
    CUBIC: tl.constexpr = 0.044715
    if ACTIVATION == "silu":
        s = tl.sigmoid(gate)
        return gate * s, s * (1.0 + gate * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(gate * SQRT_HALF))
        return gate * cdf, cdf + gate * INV_SQRT_2PI * tl.exp(-0.5 * gate * gate)
    else:
        square = gate * gate
        s = tl.sigmoid(TWICE_SQRT_2_OVER_PI * gate * (1.0 + CUBIC * square))
        return gate * s, s + gate * s * (1.0 - s) * TWICE_SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * square)
