"""Every family's checkpoint streamed to the device, and every class of transformers live on it, beside a CPU.

``python -m tests.emulated_cuda python -m tests.emulated_cuda.models [CASE...]`` prints a line of JSON for each case.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moebed.check.probing import Results, compare, text
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.views.transformers_model import TransformersModel
from probes.registry import PROBES
from probes.running.choosing import probes_for, probes_that_fit
from probes.running.driver import needs_of, run_probes
from tests.checkpoints.families import odd_checkpoints
from tests.views import tiny_transformers


def streamed(family: str, folder: Path, device: str) -> Results:
    """A checkpoint of a family, a layer at a time."""
    if not folder.exists():
        odd_checkpoints.write_base(family, folder)
    model = PretrainedMoE(str(folder), text=text()).to(device)
    probes = [PROBES[name]() for name in probes_for(["all"], True)]
    try:
        return run_probes(model.views(text(), needs_of(probes)), probes)
    finally:
        model.close()


def live(name: str, _: Path, device: str) -> Results:
    """A model of transformers, by the probes that it offers enough for."""
    torch.manual_seed(0)
    model = TransformersModel(tiny_transformers.make(name).to(device).eval())
    names, _ = probes_that_fit(None, model.offers, name)
    probes = [PROBES[name]() for name in names]
    return run_probes(model.views(text(), needs_of(probes)), probes)


CASES: dict[str, Callable[[Path, str], Results]] = {
    **{f"streamed {family}": partial(streamed, family) for family in odd_checkpoints.SIZES},
    **{f"live {name}": partial(live, name) for name in tiny_transformers.MODELS},
}


def main() -> None:
    """Each case named, or all."""
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                wanted, found = (CASES[name](Path(folder) / "model", device) for device in ("cpu", "cuda"))
                compared = compare(found, wanted)
                said = {"case": name, "said": compared.said, "arrays": compared.figures.get("arrays", [])}
            except Exception as error:  # noqa: BLE001  # the other cases are asked too
                said = {"case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
