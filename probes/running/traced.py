"""A trace of what a probing has kept: the choices that ``routing`` stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moebed.errors import UserError
from moebed.traces.trace import RoutingTrace, text_of
from probes.contract import by_layer
from probes.running import store


def trace_of_results(out: Path) -> RoutingTrace:
    """The choices in ``results/routing.npz``, of a token at most as many as a layer is meant to have.

    Raises:
        UserError: There is no such file, or no layer in it.
    """
    arrays = store.load_arrays(out, "routing")
    choices = {layer: index.astype(np.int64) for layer, index in by_layer(arrays, "topk_index").items()}
    if not choices:
        raise UserError(f"{out}: no layer has a router, so that there is no trace to write")
    experts = {layer: probs.shape[1] for layer, probs in by_layer(arrays, "router_probs").items()}
    ids = np.split(arrays["token_ids"], arrays["sequence_start"][1:])
    domains = [str(arrays["domain_names"][number]) for number in arrays["domain"]]
    said = [str(word) for word in arrays.get("token_text", ())]
    return RoutingTrace(out.name, "moebed", choices, experts, text_of(ids, domains, said))
