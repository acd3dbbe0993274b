"""Steps of ``moebed check`` that launch the Triton kernels, with the tiles of a GPU, at small sizes in the interpreter.

``TRITON_INTERPRET=1 python -m tests.emulated_cuda python -m tests.emulated_cuda.kernel_steps`` prints a line of JSON
for each row. What the steps do around a launch is what they do on a GPU of that capability.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from moebed.bench import experts
from moebed.check import kernels, speed, tiles
from moebed.check.contract import Found, Place, Row
from moebed.check.kernels import Size
from triton_kernels import configs
from triton_kernels.mlp import op

SMALL = Size(70, 8, 2, 72, 48)  # an expert's rows, H and F are no multiples of a tile
OF_MODELS = dict.fromkeys(tiles.TUNED_ON, SMALL) | {tiles.TUNED_ON[-1]: Size(64, 3, 1, 64, 40)}


def as_on_a_gpu() -> None:
    """Launches take the tiles of the device's capability, and the steps small sizes."""
    capability = torch.cuda.get_device_capability()
    op.choose = lambda _, element, interpreted, width: configs.choose(capability, element, False, width)
    kernels.SIZES["cuda"], kernels.SMALL["cuda"], kernels.CROWDED["cuda"] = (SMALL, Size(1, 1, 1, 8, 8)), SMALL, SMALL
    kernels.TOLERANCES["cuda"] = kernels.TOLERANCES["cpu"]  # the interpreter truncates
    tiles.size_of, tiles.ROUNDS = OF_MODELS.__getitem__, 1
    shape = experts.Shape("small", SMALL.hidden, SMALL.width, SMALL.experts, SMALL.top_k)
    experts.MODELS = dict.fromkeys(experts.MODELS, shape)


def steps(place: Place) -> Iterator[tuple[str, Row]]:
    """Rows, and the step that they are of."""
    yield from (("kernels_bfloat16", row) for row in kernels.bfloat16(place) if row.name != "two runs, every bit")
    for tokens in (None, 16):
        measure: Callable[[], Found] = lambda tokens=tokens: speed.measure(  # noqa: E731
            place.device, "deepseekmoe", tokens or SMALL.tokens, rounds=1, steps=1
        )
        yield "speed", Row(f"{tokens or 'all'} tokens", measure)
    yield from (("tiles", row) for row in tiles.rows(place) if row.name != "compiled")  # by processes of their own


def main() -> None:
    """All rows."""
    as_on_a_gpu()
    with tempfile.TemporaryDirectory() as folder:
        place = Place("cuda", 1, Path(folder), {})
        for step, row in steps(place):
            found = row.measure()
            place.found[row.name] = found
            # The interpreter's time is no measure: another tile than the shipped one is chosen, for a table's sake.
            if step == "tiles" and "tried" in found.figures:
                found = replace(found, figures=found.figures | {"chosen": found.figures["tried"][-1]["tile"]})
                place.found[row.name] = found
            said = {"step": step, "row": row.name, "verdict": found.verdict.value, "said": found.said}
            said |= {key: found.figures[key] for key in ("tried", "rows", "tiles") if key in found.figures}
            print(json.dumps(said, default=str), flush=True)


if __name__ == "__main__":
    sys.exit(main())
