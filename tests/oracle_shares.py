"""The oracles' shares of activations beyond a bound, as another machine may count them."""

import numpy as np

from probes import activations

KEY = "act_gate_frac_above_1e-3"
_ROUNDING = 1e-6


def assert_shares(wanted, count, monkeypatch):
    """Each share lies between those that bounds a rounding higher and lower give.

    An activation next to the bound falls on either side of it, as the processor's products happen to round.

    Args:
        wanted: by key, ``act_gate_frac_above_1e-3/<layer>`` (T, E).
        count: () -> arrays of the probe ``activations`` by key, counted anew.
        monkeypatch: pytest's.
    """
    found = []
    for bound in (activations.ABOVE + _ROUNDING, activations.ABOVE - _ROUNDING):
        with monkeypatch.context() as patch:
            patch.setattr(activations, "ABOVE", bound)
            found.append(count())
    fewer, more = found
    for key in filter(lambda key: key.startswith(KEY), wanted):
        assert (fewer[key] <= wanted[key] + 1e-6).all(), key
        assert (wanted[key] <= more[key] + 1e-6).all(), key
        assert np.mean(more[key] - fewer[key]) < 1e-3, key  # few lie so near that it cannot be told
