"""What a page's search looks through: each layer's quantities and each expert's load; tokens it finds on the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from probes.contract import by_layer
from probes.running.run_folder import RunFolder

if TYPE_CHECKING:
    from markupsafe import Markup


def search_index(runs: Sequence[RunFolder]) -> Markup:
    """JSON for the page's script, an entry a run; nothing in it can end the element that holds it.

    ``quantities``: layer -> ``<probe>: <quantity>`` -> number. ``load``: layer -> of each expert, its assignments as a
    multiple of an even share.
    """
    from markupsafe import Markup

    text = json.dumps([_of_run(run) for run in runs], separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _of_run(run: RunFolder) -> dict[str, Any]:
    quantities: dict[int, dict[str, float]] = {}
    for probe, result in run.results.items():
        for name, value in result.scalars.items():
            key, _, layer = name.rpartition("/layer_")
            if key and layer.isdecimal() and math.isfinite(value):
                quantities.setdefault(int(layer), {})[f"{probe}: {key}"] = float(f"{value:.4g}")
    balance = run.results.get("balance")
    load = by_layer(balance.arrays, "load") if balance is not None else {}
    return {
        "name": run.name,
        "quantities": quantities,
        "load": {layer: [round(float(share) * len(value), 2) for share in value] for layer, value in load.items()},
    }
